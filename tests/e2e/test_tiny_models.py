"""A whole deployment gives the tokens that transformers gives."""

import asyncio
import random
from pathlib import Path

import pytest
from deployment import run_deployment, token_request
from tiny_models import VOCAB_SIZE, greedy_reference, prepare, write_tiny_model


def make_prompts(count: int, longest: int) -> list[list[int]]:
    draw = random.Random(count)
    return [
        [draw.randrange(3, VOCAB_SIZE) for _ in range(draw.randint(1, longest))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("transport", ["shm", "torch_distributed"])
async def test_greedy_output_is_transformers_output(tmp_path: Path, transport: str) -> None:
    reference = write_tiny_model(tmp_path)
    model, folder = prepare(tmp_path, tmp_path / "cache")
    prompts = make_prompts(12, longest=150)
    async with run_deployment(
        model,
        folder,
        tmp_path,
        tmp_path / "workers.log",
        kv={"transport": transport},
        prefill={"max_num_batched_tokens": 32},
    ) as deployment:
        outputs = await asyncio.gather(
            *(deployment.generate(token_request(prompt, max_tokens=12)) for prompt in prompts)
        )
        await deployment.assert_nothing_left()
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.tokens[0] == greedy_reference(reference, prompt, 12)
