"""SmolLM2 through a whole deployment gives what transformers gives, token by token."""

from pathlib import Path
from typing import Any

import pytest
from reference import Reference
from smollm2 import LONG, SHORT, check_prompts, smollm2_folder, smollm2_reference

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
