"""Measure how the costs of a worker grow: `python -m paceline.bench.growth_workers`.

Each figure is the time of one message, one step of constant size, or one change, on a worker that
holds more and more: prompts that wait at a prefill worker, imports that a decode worker waits for,
leases, blocks of the pool. There is no model. A figure that grows with the column is a cost that
will stop the engine thread one day. Times are the median CPU time of the thread, because others
may use the machine. Writes JSON with hardware and versions to --output, or prints it.
"""

import argparse
import gc
import itertools
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np

from paceline.bench.environment import write_result
from paceline.decode_worker.outcomes import Admitted
from paceline.decode_worker.scheduler import DecodeScheduler
from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.prefix_cache import PrefixCache
from paceline.engine.step_plan import StepPlan, StepResult
from paceline.failpoints import Failpoints
from paceline.kv_transfer.lease import FirstToken, Lease, LeaseTable, Progress
from paceline.prefill_worker.core import PrefillCore
from paceline.prefill_worker.scheduler import PrefillScheduler
from paceline.request import AttemptKey, Work
from paceline.sampling_params import SamplingParams
from paceline.worker.core import Peer

BLOCK_TOKENS = 16
PROMPT_TOKENS = 100
PROMPT_BLOCKS = 9
"""Blocks of a prompt of up to 115 tokens, and one to grow."""
NUM_RUNNING = 64
NUM_SESSIONS = 4
NUM_REPEATS = 60
PEER = Peer("decode-0", 1, "127.0.0.1:1")
FIRST_TOKENS = (FirstToken(0, 1),)

Times = dict[str, float]
ArgumentT = TypeVar("ArgumentT")


class SilentRouters:
    """Implements `paceline.worker.core.RouterPort`; nobody listens."""

    def send_admission(self, *arguments: object, **named: object) -> None: ...

    def send_output(self, *arguments: object) -> None: ...

    def send_failure(self, *arguments: object) -> None: ...

    def send_phase(self, *arguments: object) -> None: ...


def time_each(operation: Callable[[ArgumentT], object], arguments: Iterable[ArgumentT]) -> float:
    """Call the operation with each argument; give the median of the microseconds."""
    times_ns = []
    for argument in arguments:
        started_ns = time.thread_time_ns()
        operation(argument)
        times_ns.append(time.thread_time_ns() - started_ns)
    return round(statistics.median(times_ns) / 1000, 1)


def time_again(operation: Callable[[], object]) -> float:
    """Call the operation again and again."""
    return time_each(lambda _: operation(), range(NUM_REPEATS))


def works() -> Iterable[Work]:
    """Make requests whose prompts have nothing in common, and lengths of every remainder."""
    rng = np.random.default_rng(0)
    for number in itertools.count():
        yield Work(
            key=AttemptKey(f"request-{number}", 1),
            choices=(0,),
            stream_ids=(number,),
            prompt=rng.integers(0, 128_000, PROMPT_TOKENS + number % BLOCK_TOKENS, dtype=np.int32),
            output=np.empty(0, dtype=np.int32),
            sampling=SamplingParams(max_tokens=1000, seed=number),
        )


def result_of(plan: StepPlan | None) -> StepResult:
    assert plan is not None
    return StepResult(plan.step_id, np.zeros(len(plan.sample_slots), dtype=np.int32))


def measure_prefill(num_waiting: int) -> Times:
    """Messages and steps of 512 tokens, beside prompts that wait and their leases."""
    num_more = 4 * NUM_REPEATS
    allocator = BlockAllocator((num_waiting + num_more) * PROMPT_BLOCKS)
    leases = LeaseTable(allocator, ttl_s=1000.0)
    scheduler: PrefillScheduler[int] = PrefillScheduler(
        allocator,
        PrefixCache(allocator, BLOCK_TOKENS, bytes(32)),
        block_tokens=BLOCK_TOKENS,
        max_num_seqs=num_waiting + num_more,
        max_num_batched_tokens=512,
        age_bound_s=2.0,
        max_model_len=4096,
        eos_token_ids=(),
    )
    routers = SilentRouters()
    core = PrefillCore(
        scheduler, leases, routers, Failpoints(), worker_id="prefill-0", unix_offset_s=0.0
    )
    source = iter(works())
    for number, work in enumerate(itertools.islice(source, num_waiting)):
        core.dispatch(number % NUM_SESSIONS, work, PEER, 0.0)
    gc.collect()
    gc.freeze()  # as a worker does when it is ready
    more = list(itertools.islice(source, NUM_REPEATS))
    times = {
        "dispatch": time_each(lambda work: core.dispatch(0, work, PEER, 1.0), more),
        "load for a router": time_again(core.load),
        "cancel": time_each(lambda work: core.cancel(0, work.key, (), 1.0), more),
    }
    for work in more[:10]:
        core.dispatch(NUM_SESSIONS, work, PEER, 1.0)
    session = [NUM_SESSIONS]
    times["end of a session with 10"] = time_each(lambda one: core.end_session(one, 1.0), session)
    plans: list[StepPlan | None] = []
    planned_us, applied_us = [], []
    for _ in range(NUM_REPEATS):
        planned_us.append(time_each(lambda now: plans.append(core.plan(now)), [1.0]))
        applied_us.append(time_each(lambda plan: core.apply(result_of(plan), 1.0), plans[-1:]))
    times["plan"] = round(statistics.median(planned_us), 1)
    times["apply"] = round(statistics.median(applied_us), 1)
    core.check_integrity()
    return times


def measure_decode(num_waiting: int) -> Times:
    """Messages and steps of 64 rows, beside requests whose KV is still to be imported."""
    num_held = NUM_RUNNING + num_waiting
    num_spare = 4 * NUM_REPEATS * PROMPT_BLOCKS
    allocator = BlockAllocator(num_held * PROMPT_BLOCKS + num_spare)
    scheduler = DecodeScheduler(
        allocator,
        PrefixCache(allocator, BLOCK_TOKENS, bytes(32)),
        block_tokens=BLOCK_TOKENS,
        max_num_seqs=num_held + 2 * NUM_REPEATS,
        max_num_batched_tokens=1024,
        local_prefill_tokens=0,
        watermark_blocks=0,
        promise_ttl_s=1000.0,
        prefill_age_bound_s=2.0,
        eos_token_ids=(),
        max_model_len=2048,
    )
    source = iter(works())

    def admit(work: Work, session: int = 0) -> None:
        answer = scheduler.admit(work, session, has_source=True, now=0.0)
        assert isinstance(answer, Admitted), answer

    for work in itertools.islice(source, NUM_RUNNING):
        admit(work)
        scheduler.imported(work.key, FIRST_TOKENS, 0.0)
        scheduler.confirmed(work.key, 0.0)
    for number, work in enumerate(itertools.islice(source, num_waiting)):
        admit(work, number % NUM_SESSIONS)
    more = list(itertools.islice(source, NUM_REPEATS))
    gc.collect()
    gc.freeze()
    times = {
        "admit": time_each(admit, more),
        "load for a router": time_again(scheduler.load),
        "progress of an import": time_each(
            lambda work: scheduler.import_progressed(work.key, 1.0), more
        ),
        "expire nothing": time_again(lambda: scheduler.expire(2.0)),
        "cancel": time_each(lambda work: scheduler.cancel(work.key, now=2.0), more),
    }
    for work in more:
        scheduler.import_ended(work.key)
    for work in itertools.islice(source, 10):
        admit(work, NUM_SESSIONS)
    session = [NUM_SESSIONS]
    times["end of a session with 10"] = time_each(
        lambda one: scheduler.end_session(one, 2.0), session
    )

    def step() -> None:
        scheduler.apply(result_of(scheduler.plan(3.0)), 3.0)

    times["plan and apply"] = time_again(step)
    # From here on nothing is spare: each row that needs a block costs a victim.
    scheduler.tidy()
    allocator.allocate(scheduler.load().num_free_blocks)
    victims_us: list[float] = []
    while len(victims_us) < NUM_REPEATS:
        started_ns = time.thread_time_ns()
        plan = scheduler.plan(3.0)
        planned_ns = time.thread_time_ns() - started_ns
        num_victims = len(scheduler.apply(result_of(plan), 3.0).failures)
        if num_victims:
            victims_us.append(planned_ns / num_victims / 1000)
    times["plan with preemption, each victim"] = round(statistics.median(victims_us), 1)
    return times


def measure_leases(num_leases: int) -> Times:
    """Changes of single leases of 4 blocks, beside others."""
    allocator = BlockAllocator(4)
    block_ids = allocator.allocate(4)
    table = LeaseTable(allocator, ttl_s=100.0)
    numbers = itertools.count()

    def grant(reader: str, now: float) -> Lease:
        key = AttemptKey(f"request-{next(numbers)}", 1)
        lease = table.grant(key, reader, now, (0,))
        table.extend(lease, block_ids)
        table.publish(lease, Progress(64, FIRST_TOKENS))
        return lease

    others = [grant(f"reader-{number % 8}", 0.0) for number in range(num_leases)]
    # One of these is due each second from 110 s on; the others are renewed until then.
    for number in range(NUM_REPEATS):
        grant("forgetful", 10.0 + number)
    for lease in others:
        table.renew(lease.reader, 90.0, (lease.lease_id,))
    gc.collect()
    gc.freeze()
    leases: list[Lease] = []
    times = {
        "grant": time_again(lambda: leases.append(grant("reader", 95.0))),
        "renew": time_each(lambda one: table.renew("reader", 96.0, (one.lease_id,)), leases),
        "expire one": time_each(table.expire, [110.0 + n for n in range(NUM_REPEATS)]),
        "confirm": time_each(lambda one: table.confirm(one.lease_id, "reader", 170.0), leases),
        "settle 60": time_each(lambda _: table.settle(), [None]),
        "count of undecided leases": time_again(lambda: table.num_undecided),
    }
    for _ in range(10):
        grant("lost", 170.0)
    times["loss of a reader with 10"] = time_each(
        lambda reader: table.revoke_reader(reader, "gone", 170.0), ["lost"]
    )
    assert table.num_undecided == num_leases
    table.check_integrity()
    return times


def measure_blocks(num_blocks: int) -> Times:
    """Changes of 64 blocks of a full pool, all of it in the prefix cache and evictable."""
    allocator = BlockAllocator(num_blocks)
    cache = PrefixCache(allocator, BLOCK_TOKENS, bytes(32))
    rng = np.random.default_rng(0)
    size = 64
    context = np.empty(0, dtype=np.int32)
    for _ in range(num_blocks // size):
        context = rng.integers(0, 128_000, size * BLOCK_TOKENS, dtype=np.int32)
        chain = cache.match(context[:1], "").chain
        block_ids = allocator.allocate(size)
        for number, block_id in enumerate(block_ids):
            tokens = context[number * BLOCK_TOKENS : (number + 1) * BLOCK_TOKENS]
            chain = cache.insert(chain, tokens, block_id)
        allocator.release(block_ids)
    gc.collect()
    gc.freeze()
    taken: list[list[int]] = []
    return {
        "match 64": time_again(lambda: taken.append(cache.match(context, "").block_ids)),
        "release 64 cached": time_each(allocator.release, taken),
        "allocate 64 by evicting": time_again(lambda: taken.append(allocator.allocate(size))),
        "pin 64": time_each(allocator.pin, taken[NUM_REPEATS:]),
        "unpin 64": time_each(allocator.unpin, taken[NUM_REPEATS:]),
        "release 64": time_each(allocator.release, taken[NUM_REPEATS:]),
    }


def bytes_of_decided_lease(num_blocks: int, num_leases: int = 200) -> int:
    """Measure what a table keeps of each lease that was confirmed and settled."""
    allocator = BlockAllocator(num_blocks)
    block_ids = allocator.allocate(num_blocks)
    table = LeaseTable(allocator, ttl_s=100.0)
    tracemalloc.start()
    for number in range(num_leases):
        lease = table.grant(AttemptKey(f"request-{number}", 1), "reader", 0.0, (0,))
        table.extend(lease, block_ids)
        table.publish(lease, Progress(num_blocks * BLOCK_TOKENS, FIRST_TOKENS))
        table.confirm(lease.lease_id, "reader", 0.0)
        table.settle()
    num_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return num_bytes // num_leases


def by_size(measure: Callable[[int], Times], sizes: list[int]) -> dict[str, Times]:
    """Give each operation's microseconds by size."""
    table: dict[str, Times] = {}
    for size in sizes:
        for name, time_us in measure(size).items():
            table.setdefault(name, {})[str(size)] = time_us
        gc.unfreeze()
        gc.collect()
    return table


def sizes_of(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    waiting = [1_000, 10_000, 100_000]
    parser.add_argument("--prompts", type=sizes_of, default=waiting, help="at a prefill worker")
    parser.add_argument("--imports", type=sizes_of, default=waiting, help="at a decode worker")
    parser.add_argument("--leases", type=sizes_of, default=waiting)
    parser.add_argument("--blocks", type=sizes_of, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--lease-blocks", type=sizes_of, default=[64, 512, 6250])
    parser.add_argument("--output", type=Path, help="JSON file; default: standard output")
    options = parser.parse_args()
    config = {
        "num_prompt_tokens": PROMPT_TOKENS,
        "block_tokens": BLOCK_TOKENS,
        "num_running": NUM_RUNNING,
        "num_sessions": NUM_SESSIONS,
        "num_repeats": NUM_REPEATS,
    }
    result = {
        "prefill_us_by_waiting_prompts": by_size(measure_prefill, options.prompts),
        "decode_us_by_waiting_imports": by_size(measure_decode, options.imports),
        "lease_us_by_leases": by_size(measure_leases, options.leases),
        "block_us_by_pool": by_size(measure_blocks, options.blocks),
        "bytes_of_a_decided_lease_by_blocks": {
            str(size): bytes_of_decided_lease(size) for size in options.lease_blocks
        },
    }
    write_result(options.output, "growth_workers", config, result)


if __name__ == "__main__":
    main()
