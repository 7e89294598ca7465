"""Measure the time that blocks cost: `python -m paceline.bench.block_allocator [--output FILE]`.

Writes JSON: nanoseconds a block for each operation, the best of several rounds, because on a
shared machine everything that disturbs a round only adds to it; the median is beside it. The pool
has the size of a large GPU's, and its free list is shuffled first, as it is after hours of
serving.
"""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from paceline.bench.environment import write_result
from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.prefix_cache import PrefixCache

BLOCK_TOKENS = 16
SEED = 0


class Measurement:
    """Rounds of named operations on many blocks each."""

    def __init__(self) -> None:
        self._rounds_ns: dict[str, list[float]] = {}

    def time(self, name: str, num_blocks: int, operation: Callable[[], object]) -> None:
        """Run `operation` once, as one round of `name`."""
        started_ns = time.perf_counter_ns()
        operation()
        elapsed_ns = time.perf_counter_ns() - started_ns
        self._rounds_ns.setdefault(name, []).append(elapsed_ns / num_blocks)

    def results(self) -> dict[str, dict[str, float]]:
        return {
            name: {
                "best_ns": round(min(rounds), 1),
                "median_ns": round(statistics.median(rounds), 1),
            }
            for name, rounds in self._rounds_ns.items()
        }


def measure_allocator(measurement: Measurement, num_blocks: int, batch: int) -> None:
    """Allocate and use up to half the pool, `batch` blocks a call (a context) or one (growth)."""
    allocator = BlockAllocator(num_blocks)
    everything = allocator.allocate(num_blocks)
    random.Random(SEED).shuffle(everything)
    allocator.release(everything)
    num_used = num_blocks // 2 // batch * batch
    tables: list[list[int]] = []

    def allocate() -> None:
        for _ in range(num_used // batch):
            tables.append(allocator.allocate(batch))  # noqa: PERF401 - a scheduler's loop

    def each(change: Callable[[list[int]], None]) -> Callable[[], None]:
        def run() -> None:
            for table in tables:
                change(table)

        return run

    suffix = f", {batch} a call"
    measurement.time("allocate" + suffix, num_used, allocate)
    measurement.time("share" + suffix, num_used, each(allocator.share))
    measurement.time("release shared" + suffix, num_used, each(allocator.release))
    measurement.time("pin" + suffix, num_used, each(allocator.pin))
    measurement.time("unpin" + suffix, num_used, each(allocator.unpin))
    measurement.time("release" + suffix, num_used, each(allocator.release))
    tables.clear()
    allocator.check_integrity()


def measure_cache(measurement: Measurement, num_blocks: int, batch: int) -> None:
    """Fill the pool with cached contexts, match them, then allocate by evicting them all."""
    allocator = BlockAllocator(num_blocks)
    cache = PrefixCache(allocator, BLOCK_TOKENS, bytes(32))
    generator = np.random.default_rng(SEED)
    num_contexts = num_blocks // batch
    contexts = generator.integers(
        0, 128_000, (num_contexts, batch * BLOCK_TOKENS + 1), dtype=np.int32
    )
    tables = [allocator.allocate(batch) for _ in range(num_contexts)]

    def insert() -> None:
        for context, table in zip(contexts, tables, strict=True):
            chain = cache.match(context[:1], "").chain
            for number, block_id in enumerate(table):
                tokens = context[number * BLOCK_TOKENS : (number + 1) * BLOCK_TOKENS]
                chain = cache.insert(chain, tokens, block_id)

    def release() -> None:
        for table in tables:
            allocator.release(table)

    def match() -> None:
        for context in contexts:
            cache.match(context, "")

    def evict() -> None:
        for _ in range(num_contexts):
            allocator.allocate(batch)

    num_cached = num_contexts * batch
    measurement.time("insert", num_cached, insert)
    measurement.time("release cached", num_cached, release)
    measurement.time("match evictable", num_cached, match)
    measurement.time("release cached again", num_cached, release)
    measurement.time("allocate by evicting", num_cached, evict)
    allocator.check_integrity()


def measure(num_blocks: int, batch: int, num_rounds: int) -> dict[str, object]:
    """Run everything, in rounds, so that a slow moment of the machine shows as such."""
    measurement = Measurement()
    gc.collect()
    gc.freeze()  # as a worker does after warm-up
    for _ in range(num_rounds):
        measure_allocator(measurement, num_blocks, batch)
        measure_allocator(measurement, num_blocks, 1)
        measure_cache(measurement, num_blocks, batch)
    results = measurement.results()
    suffix = f", {batch} a call"
    both = results["allocate" + suffix]["best_ns"] + results["release" + suffix]["best_ns"]
    return {"allocate_and_release_ns_per_block": round(both, 1), "ns_per_block": results}


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--num-blocks", type=int, default=50_000, help="size of the pool")
    parser.add_argument("--blocks-per-call", type=int, default=64, help="a context of 1,024 tokens")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="file to write; default: standard output")
    options = parser.parse_args()
    config = {
        "num_blocks": options.num_blocks,
        "blocks_per_call": options.blocks_per_call,
        "block_tokens": BLOCK_TOKENS,
        "num_rounds": options.rounds,
        "seed": SEED,
    }
    result = measure(options.num_blocks, options.blocks_per_call, options.rounds)
    write_result(options.output, "block_allocator", config, result)


if __name__ == "__main__":
    main()
