"""Run the phases one after the other: `python -m paceline.bench.faults --output FILE`.

Each phase has a deployment of its own. The result says for each how many requests were answered
and that no token differed, how long streams stood still, when a replacement was ready, and what
the processes used. A phase that is asked for 0 faults is left out.
"""

import argparse
import asyncio
import contextlib
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from paceline.bench.environment import write_result
from paceline.bench.faults.deployment import Control, deployment, write_files
from paceline.bench.faults.injection import Fault, Injector
from paceline.bench.faults.requests import make_requests
from paceline.bench.faults.streams import Streams
from paceline.bench.faults.watch import Watch, wait_until
from paceline.bench.record import Distribution

NUM_REQUESTS = 36
SETTLE_S = 60.0
"""For the last replacements to start, and everything to be given back."""
FAILPOINTS = {
    "chunk": "30-300",
    "published": "20-200",
    "progressed": "30-300",
    "reading": "30-300",
    "read_done": "30-300",
    "confirm_sent": "15-150",
    "confirm_received": "15-150",
    "queued": "20-200",
    "token": "500-5000",
}
"""At which of its hits a moment kills the worker that passes it: some seconds of work."""
Inject = Callable[[Injector], Awaitable[None]]


async def run_phase(
    arguments: argparse.Namespace, folder: Path, inject: Inject, failpoints: str = ""
) -> dict[str, Any]:
    """Stream through the faults; return what was seen."""
    file = write_files(folder, arguments.workers, {})
    async with deployment(file, failpoints) as addresses:
        control = Control(addresses.controller)
        watch = Watch(control)
        watching = asyncio.create_task(watch.run())
        try:
            streams = Streams(addresses.router, make_requests(NUM_REQUESTS, arguments.seed))
            await streams.learn()
            injector = Injector(watch, Random(arguments.seed))
            end = asyncio.Event()
            running = asyncio.create_task(streams.run(arguments.clients, end))
            started_s = time.monotonic()
            try:
                await inject(injector)
                await asyncio.sleep(arguments.mean_s)
            finally:
                end.set()
                await running
            seconds = time.monotonic() - started_s
            leaks = await _settle(watch)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await control.close()
    return {
        "seconds": round(seconds, 1),
        "requests": {
            "completed": streams.num_completed,
            "resumed": streams.num_resumed,
            "tokens": streams.num_tokens,
            "altered": streams.differences,
            "failed": dict(streams.errors),
            "refused": dict(streams.refusals),
            "unlike_without_faults": NUM_REQUESTS - len(streams.usable),
        },
        "faults": _by_kind(injector.faults, streams, watch),
        "leaks": leaks,
        "longest_silence_of_control_api_s": round(watch.longest_silence_s, 2),
        "resources": _resources(watch),
    }


async def _settle(watch: Watch) -> list[str]:
    await wait_until(lambda: not watch.leaks(), SETTLE_S)
    return watch.leaks()


def _by_kind(faults: list[Fault], streams: Streams, watch: Watch) -> dict[str, Any]:
    return {
        kind: _summary([fault for fault in faults if fault.kind == kind], streams, watch)
        for kind in sorted({fault.kind for fault in faults})
    }


def _summary(faults: list[Fault], streams: Streams, watch: Watch) -> dict[str, Any]:
    gaps = [streams.longest_gap_s(fault.at_s) for fault in faults]
    replaced = [
        at_s - fault.at_s
        for fault in faults
        for victim in fault.victims
        if (at_s := watch.replaced_s(victim)) is not None
    ]
    return {
        "num_faults": len(faults),
        "num_processes": sum(len(fault.victims) for fault in faults),
        "longest_gap_s": _distribution(gaps),
        "replaced_after_s": _distribution(replaced),
    }


def _distribution(values: list[float]) -> dict[str, float] | None:
    found = Distribution.of(values)
    if found is None:
        return None
    return {name: round(value, 3) for name, value in asdict(found).items()} | {
        "most": round(max(values), 3)
    }


def _resources(watch: Watch) -> list[dict[str, Any]]:
    """Give the processes that lived longest: growth needs time to be seen."""
    entries = sorted(watch.resources.values(), key=lambda entry: entry.first_s - entry.last_s)
    return [
        {
            "role": entry.role,
            "watched_s": round(entry.last_s - entry.first_s, 1),
            "private_bytes, descriptors, threads": {
                "first": entry.first,
                "last": entry.last,
                "most": entry.most,
            },
        }
        for entry in entries[:6]
    ]


def phases(arguments: argparse.Namespace) -> dict[str, tuple[Inject, str]]:
    """Say what each phase injects, and its failpoints."""
    mean_s = arguments.mean_s
    soak_kills = round(arguments.soak_s / arguments.soak_interval_s)
    chosen: dict[str, tuple[int, Inject, str]] = {
        "kills": (arguments.kills, lambda i: i.kills(arguments.kills, mean_s), ""),
        "stops": (
            arguments.stops,
            lambda i: i.stops(arguments.stops, mean_s, arguments.longest_stop_s),
            "",
        ),
        "failpoints": (
            arguments.failpoint_kills,
            lambda i: i.failpoints(arguments.failpoint_kills),
            ",".join(f"{name}:kill@{hits}" for name, hits in FAILPOINTS.items()),
        ),
        "soak": (
            soak_kills,
            lambda i: i.kills(soak_kills, arguments.soak_interval_s),
            "",
        ),
    }
    return {name: (inject, points) for name, (count, inject, points) in chosen.items() if count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--stops", type=int, default=300)
    parser.add_argument("--failpoint-kills", type=int, default=200)
    parser.add_argument("--mean-s", type=float, default=0.5, help="between two faults, on average")
    parser.add_argument("--longest-stop-s", type=float, default=8.0)
    parser.add_argument("--soak-s", type=float, default=1800.0)
    parser.add_argument("--soak-interval-s", type=float, default=30.0, help="between two kills")
    parser.add_argument("--workers", type=int, default=2, help="in each pool")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = {}
    for name, (inject, points) in phases(arguments).items():
        with tempfile.TemporaryDirectory() as folder:
            result[name] = asyncio.run(run_phase(arguments, Path(folder), inject, points))
    config = {name: value for name, value in vars(arguments).items() if name != "output"}
    write_result(arguments.output, "faults", config, result)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
