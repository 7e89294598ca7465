"""Measure how a router's costs grow: `python -m paceline.bench.growth_router`.

The dispatcher runs alone, on one thread, with workers that only count what they are sent. Measured
are its events by the number of workers and of waiting requests, and the death of a worker: the
longest time that one turn of the event loop takes, and all turns together. Times are of this
thread's CPU, so that a busy machine disturbs them little.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from paceline.bench.environment import write_result
from paceline.errors import CancelledError
from paceline.request import AttemptKey, Work
from paceline.router.active_request import ActiveRequest
from paceline.router.capacity import WorkerPool
from paceline.router.dispatch import Dispatcher
from paceline.router.journal import RequestJournal
from paceline.router.settings import RouterSettings
from paceline.router.worker_messages import TokenColumns, WorkerClaim
from paceline.router.worker_view import Role, WorkerLoad, WorkerMember, WorkerView
from paceline.sampling_params import SamplingParams

NUM_EVENTS = 20
NUM_SEQUENCES = 10_000
NUM_BLOCKS = 10**6
PROMPT = np.zeros(100, np.int32)
FULL = WorkerLoad(num_dispatches_seen=10**9)


class CountingWorkers:
    """Commands that go nowhere; the last work that was admitted is kept."""

    def __init__(self) -> None:
        self.num_sent = 0
        self.admitted: Work | None = None

    def prefill(self, worker_id: str, work: Work, reader: WorkerMember) -> None:
        self.num_sent += 1

    def admit(self, worker_id: str, work: Work, source: WorkerMember | None) -> None:
        self.num_sent += 1
        self.admitted = work

    def cancel(self, worker_id: str, key: AttemptKey, choices: tuple[int, ...]) -> None:
        self.num_sent += 1

    def claim(self, worker_id: str, claim: WorkerClaim) -> None:
        self.num_sent += 1


class SilentText:
    """Text without words."""

    def push(self, token_id: int) -> bool:
        return False

    def flush(self) -> bool:
        return False

    def take(self) -> str:
        return ""


class MeasuredRouter:
    """A dispatcher with workers of both roles."""

    def __init__(self, num_workers: int, num_waiting: int = 0) -> None:
        settings = RouterSettings(max_queue_requests=10**6)
        self.workers = CountingWorkers()
        self.dispatcher = Dispatcher(settings, self.workers)
        self._numbers = count()
        for number in range(num_workers):
            for role in Role:
                self.join(role, number, FULL if num_waiting else None)
        self.waiting = [self.submit() for _ in range(num_waiting)]

    def join(self, role: Role, number: int, load: WorkerLoad | None = None) -> None:
        member = WorkerMember(f"{role.value}-{number}", role, 1, "")
        pool = WorkerPool(NUM_BLOCKS, 16, NUM_SEQUENCES, 0)
        room = WorkerLoad(NUM_BLOCKS, NUM_SEQUENCES, num_free_blocks=NUM_BLOCKS)
        self.dispatcher.worker_joined(WorkerView(member, pool, load or room), 0.0)

    def submit(self) -> ActiveRequest:
        request = self.new_request()
        self.dispatcher.submit(request, 0.0)
        return request

    def new_request(self) -> ActiveRequest:
        sampling = SamplingParams(max_tokens=50, seed=1)
        number = next(self._numbers)
        journal = RequestJournal(PROMPT, sampling, [SilentText()])
        return ActiveRequest(f"r{number}", f"r{number}@router", journal, float(number))


def cpu_s(function: Callable[[], object]) -> float:
    began_s = time.thread_time()
    function()
    return time.thread_time() - began_s


def median_us(functions: Sequence[Callable[[], object]]) -> float:
    """Return the median over events, each a function that is called once."""
    return round(float(np.median([cpu_s(function) for function in functions])) * 1e6, 1)


def measure_workers(num_workers: int) -> dict[str, float]:
    """Measure events among as many prefill and as many decode workers."""
    router = MeasuredRouter(num_workers)
    dispatcher = router.dispatcher
    requests = [router.new_request() for _ in range(NUM_EVENTS)]
    submit_us = median_us([partial(dispatcher.submit, request, 0.0) for request in requests])
    work = router.workers.admitted
    assert work is not None
    [attempt] = requests[-1].attempts.values()
    dispatcher.admission(attempt.decode_id, attempt.key, None, 0, 0.0)
    steps = [TokenColumns(work.stream_ids, [index], [7]) for index in range(NUM_EVENTS)]
    tokens_us = median_us(
        [partial(dispatcher.tokens, attempt.decode_id, step, 0.0) for step in steps]
    )
    full = MeasuredRouter(num_workers, num_waiting=10)
    return {
        "submit_and_dispatch_us": submit_us,
        "tokens_us": tokens_us,
        "cancel_us": cancel_us(dispatcher, requests),
        "load_changed_us": load_changed_us(full.dispatcher),
    }


def measure_waiting(num_waiting: int) -> dict[str, float]:
    """Measure events while so many requests wait, and 10 + 10 workers have no room."""
    router = MeasuredRouter(10, num_waiting)
    dispatcher = router.dispatcher
    requests = [router.new_request() for _ in range(NUM_EVENTS)]
    middle = router.waiting[num_waiting // 2 :][:NUM_EVENTS]
    return {
        "submit_us": median_us([partial(dispatcher.submit, request, 0.0) for request in requests]),
        "cancel_us": cancel_us(dispatcher, middle),
        "load_changed_us": load_changed_us(dispatcher),
        "next_timer_us": median_us([partial(dispatcher.next_timer_s, 0.0)] * NUM_EVENTS),
    }


def cancel_us(dispatcher: Dispatcher, requests: list[ActiveRequest]) -> float:
    gone = CancelledError("the client went away")
    return median_us([partial(dispatcher.fail, request, gone, 0.0) for request in requests])


def load_changed_us(dispatcher: Dispatcher) -> float:
    return median_us([partial(dispatcher.load_changed, "decode-1", FULL, 0.0)] * NUM_EVENTS)


def measure_death(num_requests: int) -> dict[str, float]:
    """Measure how requests of a decode worker that dies come back, and go to another one."""
    router = MeasuredRouter(1)
    dispatcher = router.dispatcher
    for _ in range(num_requests):
        router.submit()
    turns_s = [cpu_s(lambda: dispatcher.worker_lost("decode-0", 0.0)), *_catch_up(dispatcher)]
    again_s = [cpu_s(lambda: router.join(Role.DECODE, 1)), *_catch_up(dispatcher)]
    return {
        "longest_pause_ms": round(max(turns_s + again_s) * 1e3, 1),
        "back_in_queue_ms": round(sum(turns_s) * 1e3, 1),
        "sent_again_ms": round(sum(again_s) * 1e3, 1),
    }


def _catch_up(dispatcher: Dispatcher) -> list[float]:
    """Give the dispatcher its turns of the event loop."""
    turns_s = []
    while dispatcher.next_timer_s(0.0) == 0.0:
        turns_s.append(cpu_s(lambda: dispatcher.dispatch(0.0)))
    return turns_s


def measure(sizes: dict[str, list[int]]) -> dict[str, Any]:
    return {
        "by_workers": {str(n): measure_workers(n) for n in sizes["workers"]},
        "by_waiting": {str(n): measure_waiting(n) for n in sizes["waiting"]},
        "death": {str(n): measure_death(n) for n in sizes["running"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how a router's costs grow.")
    add = parser.add_argument
    add("--workers", type=int, nargs="+", default=[10, 100, 1000], help="of each role")
    add("--waiting", type=int, nargs="+", default=[1000, 10_000, 100_000])
    add("--running", type=int, nargs="+", default=[256, 1024, 4096], help="at a worker that dies")
    add("--output", type=Path, help="file for the JSON; default: print it")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("workers", "waiting", "running")}
    write_result(options.output, "growth_router", sizes, measure(sizes))


if __name__ == "__main__":
    main()
