"""Measure goodput under overload: `python -m paceline.bench.overload [--output FILE]`.

Three processes: a router; a simulated prefill worker and decode worker of known capacity; and this
one, the client. It sends requests at random moments, at several multiples of the workers' capacity
one after the other, and never again what was refused. Every request has the same deadline. Reported
for each load are

- goodput: requests a second that were answered in full within their deadline, once the load has
  lasted for one deadline;
- how the others ended, and how soon a refusal came;
- the latency of those that were answered;
- tokens that the workers computed for requests that were not answered.
"""

import argparse
import asyncio
import multiprocessing
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np

from paceline.bench.environment import write_result
from paceline.bench.router_throughput import write_tokenizer
from paceline.bench.simulated_workers import (
    MAX_OUTPUT_TOKENS,
    MIN_OUTPUT_TOKENS,
    ComputedTokens,
    SimulatedRates,
    run_workers,
)
from paceline.grpc_options import CLIENT_CHANNEL
from paceline.router.model import ServedModel
from paceline.router.server import Router
from paceline.router.settings import RouterSettings
from paceline.router.worker_view import WorkerMember
from paceline.v1 import inference_pb2, inference_pb2_grpc

PROMPT_TOKENS = 256
MAX_TOKENS = 64
"""Of each request; it ends earlier, as most do."""
LOADS = (0.5, 1.0, 2.0, 5.0, 0.5)
GRACE_S = 2.0
"""After its deadline: then the client gives up on an answer."""


class Ended(NamedTuple):
    """One request, as its client saw it."""

    status: str
    latency_s: float
    ended_s: float
    """By the event loop's clock."""


@dataclass
class Segment:
    """What became of the requests that were sent at one load."""

    load: float
    from_s: float
    """Requests that ended before it do not count for goodput."""
    until_s: float
    """No request is sent after it, and none that ends after it counts for goodput."""
    ended: list[Ended] = field(default_factory=list)

    def summary(self, deadline_s: float, computed: ComputedTokens) -> dict[str, Any]:
        statuses = Counter(end.status for end in self.ended)
        good = [e for e in self.ended if e.status == "OK" and e.latency_s <= deadline_s]
        num_good = sum(self.from_s <= end.ended_s <= self.until_s for end in good)
        refused = [e.latency_s for e in self.ended if e.status == "RESOURCE_EXHAUSTED"]
        return {
            "load": self.load,
            "sent": len(self.ended),
            "goodput_per_s": round(num_good / (self.until_s - self.from_s), 2),
            "statuses": dict(sorted(statuses.items())),
            "latency_s": _quantiles([end.latency_s for end in good]),
            "refused_after_s": _quantiles(refused),
            "computed_tokens": computed.num_all,
            "wasted_tokens": computed.num_wasted,
            "wasted_share": round(computed.num_wasted / max(1, computed.num_all), 3),
        }


def _quantiles(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {
        name: round(float(np.quantile(seconds, q)), 3) for name, q in (("p50", 0.5), ("p99", 0.99))
    }


def run_router(pipe: Connection, folder: Path, workers: list[WorkerMember]) -> None:
    """Serve a router in front of these workers until the pipe says something."""

    async def serve() -> None:
        model = ServedModel("simulated", 1 << 12, 256, (), folder)
        router = Router(RouterSettings(grpc_port=0, drain_timeout_s=0.0), model)
        await router.start()
        await router.update_membership(1, workers)
        pipe.send(router.address)
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        await router.stop()

    asyncio.run(serve())


async def send(
    stub: "inference_pb2_grpc.InferenceServiceAsyncStub", num_output: int, deadline_s: float
) -> Ended:
    """Send one request that ends after `num_output` tokens, which its first token says."""
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[num_output] + [1] * (PROMPT_TOKENS - 1)),
        sampling=inference_pb2.SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0),
        timeout_s=deadline_s,
    )
    loop, status = asyncio.get_running_loop(), "OK"
    began_s = loop.time()
    try:
        async for _ in stub.Generate(request, timeout=deadline_s + GRACE_S):
            pass
    except grpc.aio.AioRpcError as error:
        status = error.code().name
    return Ended(status, loop.time() - began_s, loop.time())


async def run_segment(
    stub: "inference_pb2_grpc.InferenceServiceAsyncStub",
    segment: Segment,
    capacity_per_s: float,
    deadline_s: float,
    random: np.random.Generator,
) -> None:
    """Send for the segment's time and wait for every answer."""
    loop = asyncio.get_running_loop()
    next_s = loop.time()
    calls = []
    while True:
        next_s += random.exponential(1 / (segment.load * capacity_per_s))
        if next_s > segment.until_s:
            break
        await asyncio.sleep(max(0.0, next_s - loop.time()))
        num_output = int(random.integers(MIN_OUTPUT_TOKENS, MAX_OUTPUT_TOKENS + 1))
        calls.append(asyncio.create_task(send(stub, num_output, deadline_s)))
    segment.ended.extend(await asyncio.gather(*calls))


async def measure(
    address: str, workers: Connection, rates: SimulatedRates, deadline_s: float, duration_s: float
) -> list[dict[str, Any]]:
    loop, random = asyncio.get_running_loop(), np.random.default_rng(1)
    capacity_per_s = rates.prefill_tokens_per_s / PROMPT_TOKENS
    results = []
    async with grpc.aio.insecure_channel(address, options=CLIENT_CHANNEL) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for load in LOADS:
            from_s = loop.time() + deadline_s
            segment = Segment(load, from_s, from_s + duration_s)
            await run_segment(stub, segment, capacity_per_s, deadline_s, random)
            workers.send("say")
            computed: ComputedTokens = await loop.run_in_executor(None, workers.recv)
            results.append(segment.summary(deadline_s, computed))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure goodput under overload.")
    parser.add_argument("--deadline-s", type=float, default=4.0, help="of each request")
    parser.add_argument(
        "--duration-s", type=float, default=20.0, help="of each load, after the first deadline"
    )
    parser.add_argument("--output", type=Path, help="file for the JSON; default: print it")
    options = parser.parse_args()
    rates = SimulatedRates(prefill_tokens_per_s=20 * PROMPT_TOKENS, step_s=0.02, num_slots=32)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        workers_pipe, workers_end = spawn.Pipe()
        workers = spawn.Process(target=run_workers, args=(workers_end, rates))
        workers.start()
        router_pipe, router_end = spawn.Pipe()
        arguments = (router_end, Path(folder), workers_pipe.recv())
        router = spawn.Process(target=run_router, args=arguments)
        router.start()
        try:
            address = router_pipe.recv()
            result = asyncio.run(
                measure(address, workers_pipe, rates, options.deadline_s, options.duration_s)
            )
        finally:
            for pipe in (router_pipe, workers_pipe):
                pipe.send("stop")
            router.join(10)
            workers.join(10)
    config = {
        "deadline_s": options.deadline_s,
        "duration_s": options.duration_s,
        "prompt_tokens": PROMPT_TOKENS,
        "max_tokens": MAX_TOKENS,
        "output_tokens": [MIN_OUTPUT_TOKENS, MAX_OUTPUT_TOKENS],
        "capacity_per_s": rates.prefill_tokens_per_s / PROMPT_TOKENS,
        **rates._asdict(),
    }
    write_result(options.output, "overload", config, result)


if __name__ == "__main__":
    main()
