"""The real thing: Ray, controller, router and workers with a tiny model, under load and attack."""

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import torch
from deployment import Output, token_request
from fake_deployment import SilentWatcher
from reference import Reference
from tiny_models import prepare, write_tiny_model

from paceline.cluster import lifecycle, ray_head
from paceline.cluster.cli.clients import control
from paceline.cluster.runtime_folder import VARIABLE
from paceline.cluster.settings import DeploymentSettings
from paceline.v1 import control_pb2, inference_pb2, inference_pb2_grpc

NAME = "tiny"
DEADLINE_S = 100.0
PROMPTS = [[5 + (7 * position + number) % 300 for position in range(80)] for number in range(6)]


class Cluster(NamedTuple):
    address: str
    reference: Reference


on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1" and torch.cuda.device_count() < 4,
        reason="needs 4 GPUs, or one and NCCL 2.30 with NCCL_MULTI_RANK_GPU_ENABLE=1",
    ),
]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=on_a_gpu)])
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    path = tmp_path_factory.mktemp("model")
    reference = Reference(write_tiny_model(path))
    prepare(path, path / "cache")
    runtime = Path(tempfile.mkdtemp(prefix="pl-", dir="/tmp"))
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv(VARIABLE, str(runtime))
    workers: dict[str, Any] = {"num_threads": 1, "num_kv_blocks": 256, "max_num_seqs": 16}
    if request.param == "cuda":
        share = 1.0 if torch.cuda.device_count() >= 4 else 0.25
        workers |= {"device": "cuda", "resources": {"GPU": share}}
    settings = DeploymentSettings.model_validate(
        {
            "deployment": NAME,
            "model": {"path": str(path), "dtype": "float32"},
            "router": {"grpc_port": 0},
            "prefill": workers | {"max_num_batched_tokens": 32},
            "decode": workers,
        }
    )
    started = lifecycle.up(settings, "test.yaml", SilentWatcher())
    with control(NAME) as api:
        (router,) = [p for p in api.status().processes if p.role == "router"]
    yield Cluster(router.address, reference)
    lifecycle.down(NAME)
    assert started.record.ray_folder is not None
    assert ray_head.find_processes(started.record.ray_folder) == []
    assert list(runtime.glob("*")) == []
    monkeypatch.undo()
    shutil.rmtree(runtime, ignore_errors=True)


def process(worker_id: str) -> control_pb2.Process:
    with control(NAME) as api:
        (found,) = [p for p in api.status().processes if p.worker_id == worker_id]
    return found


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not await asyncio.to_thread(_holds, condition):
        assert time.monotonic() < deadline, f"not {what} within {DEADLINE_S} s"
        await asyncio.sleep(0.05)


def _holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except ValueError:  # the process is not in the status, for now
        return False


async def generate(
    stub: "inference_pb2_grpc.InferenceServiceAsyncStub",
    request: inference_pb2.GenerateRequest,
    output: Output,
) -> None:
    async for response in stub.Generate(request, timeout=DEADLINE_S):
        output.take(response)


async def run_beside(cluster: Cluster, num_tokens: int, action: Callable[[], None]) -> None:
    """Run requests, do something once all stream, and compare every token in the end."""
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        outputs = [Output() for _ in PROMPTS]
        requests = [token_request(prompt, max_tokens=num_tokens) for prompt in PROMPTS]
        running = [
            asyncio.create_task(generate(stub, request, output))
            for request, output in zip(requests, outputs, strict=True)
        ]
        # Seen here: in the status, which is seconds old at times, they may have ended unseen.
        await until(lambda: all(output.tokens for output in outputs), "streaming")
        await asyncio.to_thread(action)
        await asyncio.gather(*running)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert len(output.tokens[0]) == num_tokens
        cluster.reference.check(prompt, output.tokens[0])


def is_whole(worker_id: str) -> bool:
    found = process(worker_id)
    return (
        found.state == control_pb2.PROCESS_STATE_READY
        and found.num_running == 0
        and found.num_free_blocks == found.num_blocks
    )


@pytest.mark.parametrize("worker_id", ["decode-0", "prefill-0"])
async def test_streams_outlive_a_killed_worker_and_its_replacement_is_whole(
    cluster: Cluster, worker_id: str
) -> None:
    old = process(worker_id)
    await run_beside(cluster, 400, lambda: os.kill(old.pid, signal.SIGKILL))
    await until(lambda: process(worker_id).incarnation > old.incarnation, "replaced")
    for each in ("prefill-0", "decode-0"):
        await until(lambda each=each: is_whole(each), f"{each} whole")


async def test_pools_scale_up_and_down_under_load_and_no_request_fails(cluster: Cluster) -> None:
    def scale(**pools: int) -> None:
        with control(NAME) as api:
            api.stub.Scale(control_pb2.ScaleRequest(pools=pools), timeout=10)

    await run_beside(cluster, 300, lambda: scale(decode=2, prefill=2))
    await until(lambda: is_whole("decode-1") and is_whole("prefill-1"), "scaled up")
    await run_beside(cluster, 300, lambda: scale(decode=1, prefill=1))
    with control(NAME) as api:
        await until(lambda: len(api.status().processes) == 3, "scaled down")
