"""SmolLM2 through a whole deployment gives what transformers gives, token by token."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from deployment import run_deployment
from reference import Reference
from smollm2 import (
    LONG,
    MODEL,
    SHORT,
    check_prompts,
    llama_cpp_prompts,
    smollm2_folder,
    smollm2_reference,
    text_request,
)

from paceline.engine.model_source import ModelFolder

TRANSPORTS: dict[str, dict[str, Any]] = {
    "shm": {"kv": {"transport": "shm"}},
    "gloo": {"kv": {"transport": "torch_distributed"}},
    "colocated": {"num_prefill": 0, "decode": {"local_prefill_tokens": "unlimited"}},
}


@pytest.fixture(scope="module")
def folder() -> ModelFolder:
    return smollm2_folder()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return smollm2_reference()


async def test_short_prompts_run_together(
    folder: ModelFolder, reference: Reference, tmp_path: Path
) -> None:
    await check_prompts(folder, reference, tmp_path / "workers.log", SHORT, TRANSPORTS["shm"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("form", TRANSPORTS)
async def test_forty_prompts_of_mixed_length_run_together(
    folder: ModelFolder, reference: Reference, tmp_path: Path, form: str
) -> None:
    await check_prompts(folder, reference, tmp_path / "workers.log", LONG, TRANSPORTS[form])


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_texts_have_llama_cpps_tokens_and_transformers_continuation(
    folder: ModelFolder, reference: Reference, tmp_path: Path
) -> None:
    prompts = llama_cpp_prompts()
    assert len(prompts) >= 40
    pool = {"num_kv_blocks": 1400, "max_num_seqs": 64, "num_threads": 2}
    settings: dict[str, Any] = {"prefill": pool, "decode": pool}
    log = tmp_path / "workers.log"
    async with run_deployment(MODEL, folder, folder.path, log, **settings) as deployment:
        outputs = await asyncio.gather(
            *(deployment.generate(text_request(text)) for text in prompts)
        )
        await deployment.assert_nothing_left()
    for (text, ids), output in zip(prompts.items(), outputs, strict=True):
        assert output.usage.prompt_tokens == len(ids), text
        reference.check(ids, output.tokens[0])
    print(f"{reference.num_excused} of {reference.num_tokens} tokens excused")
