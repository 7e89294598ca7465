"""Measure one router alone: `python -m paceline.bench.router_throughput [--output FILE]`.

Three processes: the router; a simulated worker that sends one token a stream and step, without a
model; and this one, the client. Reported are

- tokens/s that reached the client, and tokens per second of the router's own CPU time: what a
  router on a core of its own can carry, whatever else shares this machine;
- the time that router and dispatch add to a request: the client's time for a request of one token
  through the router, less its time for the same work when it asks the worker itself. The worker
  answers at once, and requests are sent one by one.
"""

import argparse
import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from paceline.bench.environment import write_result
from paceline.grpc_options import CLIENT_CHANNEL
from paceline.internal.v1 import worker_pb2, worker_pb2_grpc
from paceline.router.capacity import UNLIMITED_LOCAL_PREFILL
from paceline.router.model import ServedModel
from paceline.router.server import Router
from paceline.router.settings import RouterSettings
from paceline.router.worker_view import Role, WorkerMember
from paceline.v1 import inference_pb2, inference_pb2_grpc
from paceline.wire import pack_uint32

VOCAB_SIZE = 256
PROMPT_TOKENS = 64
NUM_BLOCKS = 1 << 20
MAX_NUM_SEQS = 1 << 16
MAX_MODEL_LEN = 1 << 16
HEARTBEAT_S = 0.5


class InstantWorker(worker_pb2_grpc.WorkerServiceServicer):
    """A decode worker that computes nothing: every stream gets a token each `step_s` seconds."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._streams: dict[int, tuple[int, int]] = {}
        """stream id -> (tokens sent, tokens wanted)"""
        self._ids: dict[tuple[str, int], list[int]] = {}
        self._num_seen = 0
        self._writing = asyncio.Lock()

    async def Session(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        hello = (await context.read()).hello
        welcome = worker_pb2.Welcome(
            worker_id="decode-0",
            incarnation=hello.worker_incarnation,
            num_blocks=NUM_BLOCKS,
            block_tokens=16,
            max_num_seqs=MAX_NUM_SEQS,
            local_prefill_tokens=UNLIMITED_LOCAL_PREFILL,
            load=self._load(),
        )
        await self._write(context, worker_pb2.SessionResponse(welcome=welcome))
        tasks = [
            asyncio.create_task(self._step_for_ever(context)),
            asyncio.create_task(self._beat(context)),
        ]
        try:
            while isinstance(request := await context.read(), worker_pb2.SessionRequest):
                await self._take(request, context)
        finally:
            for task in tasks:
                task.cancel()

    async def _take(self, request: worker_pb2.SessionRequest, context: Any) -> None:
        if request.WhichOneof("message") == "cancel":
            cancel = request.cancel
            for stream_id in self._ids.pop((cancel.request_id, cancel.attempt), []):
                self._streams.pop(stream_id, None)
            return
        work = request.admit.work
        self._num_seen += 1
        key = (work.request_id, work.attempt)
        admission = worker_pb2.Admission(request_id=key[0], attempt=key[1], admitted=True)
        await self._write(context, worker_pb2.SessionResponse(admission=admission))
        self._ids[key] = list(work.stream_ids)
        for stream_id in work.stream_ids:
            self._streams[stream_id] = (0, work.sampling.max_tokens)
        if self._step_s == 0:
            await self._step(context)

    async def _step_for_ever(self, context: Any) -> None:
        next_s = time.monotonic()
        while self._step_s:
            await self._step(context)
            next_s = max(next_s + self._step_s, time.monotonic())
            await asyncio.sleep(next_s - time.monotonic())

    async def _beat(self, context: Any) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self._write(context, worker_pb2.SessionResponse(step=worker_pb2.StepReport()))

    async def _step(self, context: Any) -> None:
        if not self._streams:
            return
        ids = list(self._streams)
        indices = [self._streams[stream_id][0] for stream_id in ids]
        finished = []
        for stream_id in ids:
            num_sent, wanted = self._streams[stream_id]
            if num_sent + 1 == wanted:
                del self._streams[stream_id]
                finished.append(stream_id)
            else:
                self._streams[stream_id] = (num_sent + 1, wanted)
        step = worker_pb2.StepReport(
            stream_ids=pack_uint32(ids),
            indices=pack_uint32(indices),
            token_ids=pack_uint32([65 + index % 26 for index in indices]),
            finished_stream_ids=pack_uint32(finished),
            finish_reasons=bytes([inference_pb2.FINISH_REASON_LENGTH]) * len(finished),
            load=self._load(),
        )
        await self._write(context, worker_pb2.SessionResponse(step=step))

    async def _write(self, context: Any, message: worker_pb2.SessionResponse) -> None:
        async with self._writing:
            await context.write(message)

    def _load(self) -> worker_pb2.Load:
        return worker_pb2.Load(
            credit_blocks=NUM_BLOCKS,
            credit_sequences=MAX_NUM_SEQS,
            num_dispatches_seen=self._num_seen,
            num_running=len(self._streams),
            num_free_blocks=NUM_BLOCKS,
        )


async def _until_told(pipe: Connection) -> None:
    await asyncio.get_running_loop().run_in_executor(None, pipe.recv)


def run_worker(pipe: Connection, step_s: float) -> None:
    """Serve a simulated worker until the pipe says something."""

    async def serve() -> None:
        server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(InstantWorker(step_s), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        pipe.send(f"127.0.0.1:{port}")
        await _until_told(pipe)
        await server.stop(None)

    asyncio.run(serve())


def run_router(pipe: Connection, folder: Path, worker_address: str) -> None:
    """Serve a router in front of that worker until the pipe says something."""

    async def serve() -> None:
        model = ServedModel("simulated", MAX_MODEL_LEN, VOCAB_SIZE, (), folder)
        router = Router(RouterSettings(grpc_port=0, drain_timeout_s=0.0), model)
        await router.start()
        worker = WorkerMember("decode-0", Role.DECODE, 1, worker_address)
        await router.update_membership(1, [worker])
        pipe.send(router.address)
        await _until_told(pipe)
        await router.stop()

    asyncio.run(serve())


def make_request(max_tokens: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[1] * PROMPT_TOKENS),
        sampling=inference_pb2.SamplingParams(max_tokens=max_tokens, temperature=0.0),
    )


async def measure_added_time(
    router_address: str, worker_address: str, num_requests: int
) -> dict[str, Any]:
    """Time requests of one token, one after the other, through the router and without it."""
    async with (
        grpc.aio.insecure_channel(router_address, options=CLIENT_CHANNEL) as to_router,
        grpc.aio.insecure_channel(worker_address, options=CLIENT_CHANNEL) as to_worker,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(to_router)

        async def through_router() -> None:
            async for _ in stub.Generate(make_request(1)):
                pass

        session = worker_pb2_grpc.WorkerServiceStub(to_worker).Session()
        await session.write(worker_pb2.SessionRequest(hello=worker_pb2.Hello()))
        await session.read()

        async def directly() -> None:
            work = worker_pb2.Work(
                request_id="direct",
                stream_ids=[1],
                prompt_token_ids=[1] * PROMPT_TOKENS,
                sampling=inference_pb2.SamplingParams(max_tokens=1),
            )
            await session.write(worker_pb2.SessionRequest(admit=worker_pb2.Admit(work=work)))
            for _ in ("admission", "step"):
                await session.read()

        async def seconds(call: Callable[[], Awaitable[None]]) -> list[float]:
            times = []
            for _ in range(num_requests):
                start_s = time.perf_counter()
                await call()
                times.append(time.perf_counter() - start_s)
            return times

        await seconds(through_router)  # warm up
        routed, direct = (
            _quantiles(await seconds(through_router)),
            _quantiles(await seconds(directly)),
        )
        session.cancel()
    return {
        "one_token_through_router_ms": routed,
        "one_token_without_router_ms": direct,
        "added_ms": {name: round(routed[name] - direct[name], 3) for name in routed},
    }


async def measure_throughput(
    address: str, router: psutil.Process, num_streams: int, max_tokens: int
) -> dict[str, Any]:
    """Run many streams at once and count what arrives."""
    counts = {"tokens": 0, "messages": 0}

    async with grpc.aio.insecure_channel(address, options=CLIENT_CHANNEL) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def one_stream() -> None:
            async for message in stub.Generate(make_request(max_tokens)):
                counts["tokens"] += len(message.tokens)
                counts["messages"] += 1

        start_s, cpu_start_s = time.perf_counter(), _cpu_s(router)
        await asyncio.gather(*(one_stream() for _ in range(num_streams)))
        wall_s, cpu_s = time.perf_counter() - start_s, _cpu_s(router) - cpu_start_s
    return {
        "tokens": counts["tokens"],
        "tokens_per_message": round(counts["tokens"] / counts["messages"], 3),
        "tokens_per_s": round(counts["tokens"] / wall_s),
        "tokens_per_router_cpu_s": round(counts["tokens"] / cpu_s),
        "messages_per_router_cpu_s": round(counts["messages"] / cpu_s),
        "router_cpu_share": round(cpu_s / wall_s, 3),
    }


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _quantiles(seconds: list[float]) -> dict[str, float]:
    return {
        name: round(float(np.quantile(seconds, q)) * 1e3, 3)
        for name, q in (("median", 0.5), ("p99", 0.99))
    }


def write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: token_id for token_id, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def measure(step_s: float, num_streams: int, max_tokens: int, num_requests: int) -> dict[str, Any]:
    """Start worker and router, measure, stop them. With `step_s` 0, measure the time of one
    request."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        worker_pipe, worker_end = spawn.Pipe()
        worker = spawn.Process(target=run_worker, args=(worker_end, step_s))
        worker.start()
        worker_address = worker_pipe.recv()
        router_pipe, router_end = spawn.Pipe()
        router = spawn.Process(target=run_router, args=(router_end, Path(folder), worker_address))
        router.start()
        try:
            address = router_pipe.recv()
            if step_s == 0:
                return asyncio.run(measure_added_time(address, worker_address, num_requests))
            process = psutil.Process(router.pid)
            return asyncio.run(measure_throughput(address, process, num_streams, max_tokens))
        finally:
            for pipe in (router_pipe, worker_pipe):
                pipe.send("stop")
            router.join(10)
            worker.join(10)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one router with a simulated worker.")
    parser.add_argument("--streams", type=int, default=256, help="concurrent requests")
    parser.add_argument("--tokens", type=int, default=256, help="output tokens of each")
    parser.add_argument("--step-ms", type=float, default=10.0, help="the worker's step, over 0")
    parser.add_argument("--requests", type=int, default=500, help="requests of one token")
    parser.add_argument("--output", type=Path, help="file for the JSON; default: print it")
    options = parser.parse_args()
    config = {
        "streams": options.streams,
        "tokens": options.tokens,
        "step_ms": options.step_ms,
        "requests": options.requests,
    }
    sizes = (options.streams, options.tokens, options.requests)
    result = {
        **measure(options.step_ms / 1e3, *sizes),
        **measure(0.0, *sizes),
    }
    write_result(options.output, "router_throughput", config, result)


if __name__ == "__main__":
    main()
