"""A whole deployment gives the tokens that transformers gives, whatever the scheduling does."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from deployment import Deployment, Output, run_deployment, token_request
from reference import Reference, greedy_tokens
from tiny_models import CONFIGS, VOCAB_SIZE, prepare, write_tiny_model

NUM_TOKENS = 20
COLOCATED = {"num_prefill": 0, "decode": {"local_prefill_tokens": "unlimited"}}


def make_prompts(count: int, longest: int, *, shared: int = 0) -> list[list[int]]:
    """Random prompts of mixed length; the first `shared` tokens are the same in all."""
    draw = random.Random(count)
    start = [draw.randrange(3, VOCAB_SIZE) for _ in range(shared)]
    return [
        start + [draw.randrange(3, VOCAB_SIZE) for _ in range(draw.randint(1, longest))]
        for _ in range(count)
    ]


async def generate_all(
    deployment: Deployment, prompts: list[list[int]], **sampling: Any
) -> list[Output]:
    wanted = {"max_tokens": NUM_TOKENS} | sampling
    requests = [token_request(prompt, **wanted) for prompt in prompts]
    return list(await asyncio.gather(*map(deployment.generate, requests)))


async def outputs_of(
    path: Path, prompts: list[list[int]], max_tokens: int = NUM_TOKENS, **options: Any
) -> list[Output]:
    """Run the prompts together in a fresh deployment; nothing may be left afterwards."""
    model, folder = prepare(path, path / "cache")
    async with run_deployment(model, folder, path, path / "workers.log", **options) as deployment:
        outputs = await generate_all(deployment, prompts, max_tokens=max_tokens)
        await deployment.assert_nothing_left()
    return outputs


def assert_prefill_is_what_its_worker_measured(output: Output) -> None:
    chunks = [span for span in output.timeline if span.phase == "prefill"]
    computed_s = max(chunk.end_s for chunk in chunks) - min(chunk.start_s for chunk in chunks)
    assert output.phase_times.prefill_s == pytest.approx(computed_s, abs=1e-5)
    assert output.phase_times.wait_s > 0
    assert {chunk.worker_id for chunk in chunks} <= {"prefill-0", "decode-0"}


@pytest.mark.parametrize("transport", ["shm", "torch_distributed"])
async def test_greedy_output_is_transformers_output(tmp_path: Path, transport: str) -> None:
    reference = write_tiny_model(tmp_path)
    prompts = make_prompts(12, longest=150)
    outputs = await outputs_of(
        tmp_path,
        prompts,
        kv={"transport": transport},
        prefill={"max_num_batched_tokens": 32},
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.tokens[0] == greedy_tokens(reference, prompt, NUM_TOKENS)
        assert_prefill_is_what_its_worker_measured(output)


async def test_the_colocated_form_gives_the_same_output(tmp_path: Path) -> None:
    reference = Reference(write_tiny_model(tmp_path, "qwen3"))
    prompts = make_prompts(8, longest=150)
    for prompt, output in zip(
        prompts, await outputs_of(tmp_path, prompts, **COLOCATED), strict=True
    ):
        reference.check(prompt, output.tokens[0])
        assert_prefill_is_what_its_worker_measured(output)


async def test_preempted_sequences_come_back_with_the_same_tokens(tmp_path: Path) -> None:
    reference = Reference(write_tiny_model(tmp_path))
    prompts = make_prompts(10, longest=60)
    # 16 blocks admit four or five of these sequences and hold two of them to their end.
    outputs = await outputs_of(
        tmp_path, prompts, 100, decode={"num_kv_blocks": 16, "watermark_blocks": 0}
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        reference.check(prompt, output.tokens[0])
    assert sum(output.usage.resumed for output in outputs) > 0


async def test_a_cached_prefix_is_not_moved_again_and_changes_nothing(tmp_path: Path) -> None:
    reference = Reference(write_tiny_model(tmp_path))
    model, folder = prepare(tmp_path, tmp_path / "cache")
    first, *others = make_prompts(6, longest=40, shared=64)
    async with run_deployment(model, folder, tmp_path, tmp_path / "workers.log") as deployment:
        outputs = await generate_all(deployment, [first])
        outputs += await generate_all(deployment, others)
        await deployment.assert_nothing_left()
    for prompt, output in zip([first, *others], outputs, strict=True):
        reference.check(prompt, output.tokens[0])
    assert [output.usage.cached_tokens for output in outputs[1:]] == [64] * len(others)

    def tokens_moved(output: Output) -> int:
        return sum(span.num_tokens for span in output.timeline if span.phase == "kv_transfer")

    for prompt, output in zip(others, outputs[1:], strict=True):
        assert tokens_moved(output) <= len(prompt) - 64 + 15


async def test_reads_begin_while_later_chunks_are_still_computed(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    [prompt] = make_prompts(1, longest=1, shared=900)
    [output] = await outputs_of(tmp_path, [prompt], prefill={"max_num_batched_tokens": 64})
    reads = [span for span in output.timeline if span.phase == "kv_transfer"]
    chunks = [span for span in output.timeline if span.phase == "prefill"]
    assert len(chunks) > 10
    assert min(read.end_s for read in reads) < max(chunk.start_s for chunk in chunks)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("form", ["shm", "torch_distributed", "colocated"])
async def test_every_architecture_under_pressure(
    tmp_path: Path, architecture: str, form: str
) -> None:
    """Chunks of 16 to 512, n > 1, prefix hits and preemption, all at once."""
    reference = Reference(write_tiny_model(tmp_path, architecture))
    model, folder = prepare(tmp_path, tmp_path / "cache")
    prompts = make_prompts(10, longest=200, shared=48)
    for chunk in (16, 64, 512):
        sizes = {"max_num_batched_tokens": chunk, "num_kv_blocks": 64, "max_num_seqs": 12}
        options: dict[str, Any] = {"prefill": sizes, "decode": sizes | {"watermark_blocks": 0}}
        if form == "colocated":
            options["decode"] |= COLOCATED["decode"]
            options["num_prefill"] = 0
        else:
            options["kv"] = {"transport": form}
        async with run_deployment(
            model, folder, tmp_path, tmp_path / "workers.log", **options
        ) as deployment:
            outputs = await generate_all(deployment, prompts, n=2)
            await deployment.assert_nothing_left()
        for prompt, output in zip(prompts, outputs, strict=True):
            for choice in range(2):
                reference.check(prompt, output.tokens[choice])
    print(f"{reference.num_excused} of {reference.num_tokens} tokens excused")
