"""A whole deployment on loopback without Ray: worker processes, and a router in the test's process.

It replaces dead workers like the controller does, so that tests of failure can be quick and exact.
"""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from worker_process import WorkerHandle

from paceline.engine.model_config import read_model_config
from paceline.engine.model_source import ModelFolder
from paceline.router.model import ServedModel
from paceline.router.server import Router
from paceline.router.settings import RouterSettings
from paceline.router.worker_view import Role, WorkerMember
from paceline.v1 import inference_pb2, inference_pb2_grpc

DEADLINE_S = 60.0


@dataclass
class Output:
    """What a client got."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    """By choice, in the order of arrival; each token's index was checked."""
    text: dict[int, str] = field(default_factory=dict)
    finish_reasons: dict[int, int] = field(default_factory=dict)
    usage: Any = None
    timeline: list[Any] = field(default_factory=list)
    phase_times: Any = None

    def take(self, response: Any) -> None:
        tokens = self.tokens.setdefault(response.choice, [])
        for token in response.tokens:
            assert token.index == len(tokens), f"index {token.index} after {len(tokens)} tokens"
            tokens.append(token.token_id)
        self.text[response.choice] = self.text.get(response.choice, "") + response.text
        if response.finish_reason:
            self.finish_reasons[response.choice] = response.finish_reason
        if response.HasField("usage"):
            self.usage = response.usage
            self.phase_times = response.phase_times
            self.timeline = list(response.timeline)


class Deployment:
    """Built by `run_deployment`."""

    def __init__(
        self,
        model: dict[str, Any],
        folder: ModelFolder,
        tokenizer_folder: Path,
        log: Path,
        *,
        kv: dict[str, Any],
        prefill: dict[str, Any],
        decode: dict[str, Any],
        router: dict[str, Any],
    ) -> None:
        self._config = {
            "model": model,
            "model_folder": {
                "path": str(folder.path),
                "revision": folder.revision,
                "name": folder.name,
            },
            "kv": kv,
        }
        self._settings = {"prefill": prefill, "decode": decode}
        self._log = log
        self._version = 0
        self._numbers = {role: itertools.count() for role in self._settings}
        self.workers: list[WorkerHandle] = []
        config = read_model_config(folder.path)
        max_model_len = model.get("max_model_len") or config.max_position_embeddings
        self._router = Router(
            RouterSettings(grpc_port=0, **router),
            ServedModel(
                folder.name,
                max_model_len,
                config.vocab_size,
                tuple(config.eos_token_ids),
                tokenizer_folder,
            ),
            router_id="router-0",
            incarnation=time.time_ns(),
        )
        self._channel: grpc.aio.Channel | None = None

    @property
    def router(self) -> Router:
        return self._router

    @property
    def stub(self) -> "inference_pb2_grpc.InferenceServiceAsyncStub":
        assert self._channel is not None
        return inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def start(self, num_prefill: int, num_decode: int) -> None:
        await self._router.start()
        self._channel = grpc.aio.insecure_channel(self._router.address)
        handles = [self.spawn("prefill") for _ in range(num_prefill)]
        handles += [self.spawn("decode") for _ in range(num_decode)]
        for handle in handles:
            await self.join(handle)

    def spawn(self, role: str, number: int | None = None, **environment: str) -> WorkerHandle:
        """Start a worker's process; `join` makes it a member."""
        number = next(self._numbers[role]) if number is None else number
        return WorkerHandle(
            role,
            number,
            self._log,
            environment=environment,
            settings=self._settings[role],
            **self._config,
        )

    async def join(self, handle: WorkerHandle) -> None:
        await asyncio.to_thread(handle.wait_started)
        self.workers = [w for w in self.workers if w.worker_id != handle.worker_id]
        self.workers.append(handle)
        await self._tell_membership()
        await self.eventually(
            lambda: all(link.is_connected for link in self._router.status().workers), "connected"
        )

    async def replace(self, dead: WorkerHandle) -> WorkerHandle:
        """Do what the controller does when a worker has died."""
        dead.wait_dead()
        number = int(dead.worker_id.rpartition("-")[2])
        handle = self.spawn(dead.role, number)
        await self.join(handle)
        return handle

    async def remove(self, handle: WorkerHandle) -> None:
        """Scale down: drain, wait until idle, stop."""
        handle.ask("drain")
        await self.eventually(lambda: handle.ask("status")["is_idle"], "idle after drain")
        self.workers.remove(handle)
        await self._tell_membership()
        await asyncio.to_thread(handle.stop)

    def worker(self, role: str) -> WorkerHandle:
        return next(worker for worker in self.workers if worker.role == role)

    async def generate(self, request: inference_pb2.GenerateRequest) -> Output:
        output = Output()
        async for response in self.stub.Generate(request, timeout=DEADLINE_S * 3):
            output.take(response)
        return output

    async def eventually(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not await asyncio.to_thread(condition):
            assert time.monotonic() < deadline, f"not {what} within {DEADLINE_S} s"
            await asyncio.sleep(0.02)

    async def assert_nothing_left(self) -> None:
        """Every worker is idle, whole, and has every block free again."""
        for worker in self.workers:

            def all_free(worker: WorkerHandle = worker) -> bool:
                status = worker.ask("status")
                free = status["num_free_blocks"] == status["num_blocks"]
                return bool(status["is_idle"] and free and status["num_running"] == 0)

            await self.eventually(all_free, f"{worker.worker_id} empty")
            await asyncio.to_thread(worker.ask, "check_integrity")

    async def stop(self) -> None:
        if self._channel is not None:
            await self._channel.close()
        await self._router.stop()
        for worker in self.workers:
            await asyncio.to_thread(worker.stop)

    async def _tell_membership(self) -> None:
        self._version += 1
        members = [
            WorkerMember(w.worker_id, Role(w.role), w.incarnation, w.address) for w in self.workers
        ]
        live = {w.worker_id: (w.worker_id, w.incarnation, w.address) for w in self.workers}
        prefill = [live[w.worker_id] for w in self.workers if w.role == "prefill"]
        for worker in self.workers:
            if worker.is_alive:
                sources = prefill if worker.role == "decode" else []
                peers = {"live": list(live.values()), "sources": sources}
                await asyncio.to_thread(worker.ask, "membership", **peers)
        await self._router.update_membership(self._version, members)


@asynccontextmanager
async def run_deployment(
    model: dict[str, Any],
    folder: ModelFolder,
    tokenizer_folder: Path,
    log: Path,
    *,
    num_prefill: int = 1,
    num_decode: int = 1,
    kv: dict[str, Any] | None = None,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    router: dict[str, Any] | None = None,
) -> AsyncIterator[Deployment]:
    """Run a deployment; on the way out, stop it in good order."""
    defaults = {"num_threads": 1, "num_kv_blocks": 512, "max_num_seqs": 16}
    deployment = Deployment(
        model,
        folder,
        tokenizer_folder,
        log,
        kv=kv or {},
        prefill=defaults | (prefill or {}),
        decode=defaults | (decode or {}),
        router={"drain_timeout_s": 0.1} | (router or {}),
    )
    try:
        await deployment.start(num_prefill, num_decode)
        yield deployment
    finally:
        await deployment.stop()


def token_request(
    prompt: list[int], *, max_tokens: int = 16, request_id: str = "", **sampling: Any
) -> inference_pb2.GenerateRequest:
    """Greedy unless a temperature is given; ends by its length alone unless told otherwise."""
    settings = {"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens} | sampling
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt),
        sampling=inference_pb2.SamplingParams(**settings),
        request_id=request_id,
        include_timeline=True,
    )
