"""Deployments on a GPU give transformers' tokens, whatever is launched how, and survive kill -9.

Two workers share the GPU. NCCL allows that from 2.30 on with NCCL_MULTI_RANK_GPU_ENABLE=1.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import check_moments
from reference import Reference
from smollm2 import LONG, check_prompts, smollm2_folder, smollm2_reference

from paceline.engine.model_source import ModelFolder

shares_the_gpu = pytest.mark.skipif(
    os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1" and torch.cuda.device_count() < 2,
    reason="NCCL needs a second GPU, or NCCL_MULTI_RANK_GPU_ENABLE=1 and NCCL 2.30",
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
POOL = {"device": "cuda", "num_kv_blocks": 4000}
COLOCATED = {"num_prefill": 0, "decode": {"local_prefill_tokens": "unlimited"}}
FORMS: dict[str, dict[str, Any]] = {
    "graphs and overlap": {},
    "no graphs": {"enforce_eager": True},
    "no overlap": {"async_scheduling": False},
    "neither": {"enforce_eager": True, "async_scheduling": False},
}


@pytest.fixture(scope="module")
def folder() -> ModelFolder:
    return smollm2_folder()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return smollm2_reference("cuda")


@pytest.mark.parametrize("form", FORMS)
async def test_forty_prompts_on_one_worker_give_the_reference_s_tokens(
    folder: ModelFolder, reference: Reference, tmp_path: Path, form: str
) -> None:
    options = {"num_prefill": 0, "decode": POOL | COLOCATED["decode"] | FORMS[form]}
    await check_prompts(folder, reference, tmp_path / "workers.log", LONG, options)


@shares_the_gpu
async def test_forty_prompts_over_nccl_give_the_reference_s_tokens(
    folder: ModelFolder, reference: Reference, tmp_path: Path
) -> None:
    options = {"kv": {"transport": "torch_distributed"}, "prefill": POOL, "decode": POOL}
    await check_prompts(folder, reference, tmp_path / "workers.log", LONG, options)


@shares_the_gpu
async def test_streams_survive_a_kill_of_either_worker(tmp_path: Path) -> None:
    transport = {"transport": "torch_distributed"}
    await check_moments(
        tmp_path, ["reading", "middle token"], pool={"device": "cuda"}, kv=transport
    )


async def test_streams_survive_a_kill_of_the_one_worker_of_the_colocated_form(
    tmp_path: Path,
) -> None:
    await check_moments(
        tmp_path, ["middle token"], ("decode",), pool={"device": "cuda"}, **COLOCATED
    )
