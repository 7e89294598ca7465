"""What a GPU can do at best, measured in the same run as what is compared with it."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

NUM_REPLAYS = 9


class Rates(NamedTuple):
    """The two ceilings of a GPU."""

    read_bytes_per_s: float
    matrix_flop_per_s: float
    """Of bf16"""

    def floor_s(self, num_bytes: float, flops: float) -> float:
        """The shortest time in which one operation can move and compute so much."""
        return max(num_bytes / self.read_bytes_per_s, flops / self.matrix_flop_per_s)


Calls = Sequence[Callable[[], object]]


def graph_seconds(calls: Calls) -> float:
    """Time one of the calls, each captured once in one graph; the median of replays."""
    return seconds_in_turn(calls)[0]


def seconds_in_turn(*sides: Calls) -> list[float]:
    """Time one call of each side as `graph_seconds` does, the sides' graphs replayed in turn: a GPU
    that has worked hard is slower for a while.
    """
    graphs = [_captured(calls) for calls in sides]
    event: Any = torch.cuda.Event
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(NUM_REPLAYS):
        for calls, graph, taken in zip(sides, graphs, seconds, strict=True):
            start, end = (event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            taken.append(start.elapsed_time(end) / 1000 / len(calls))
    return [statistics.median(taken) for taken in seconds]


def _captured(calls: Calls) -> torch.cuda.CUDAGraph:
    """Return a graph of the calls that has run once."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return graph


def random_bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def measure_rates() -> Rates:
    """Time a reduction far larger than the L2 cache, and a large product of random data."""
    data = torch.ones(2 << 30, device="cuda", dtype=torch.uint8).view(torch.float32)
    read_rate = data.nbytes / graph_seconds([data.sum] * 3)
    a, b = random_bf16(8192, 8192), random_bf16(8192, 8192)
    return Rates(read_rate, 2 * 8192**3 / graph_seconds([lambda: a @ b] * 10))
