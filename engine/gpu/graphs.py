"""CUDA graphs of decode steps: one for each of a few batch sizes; a step takes the next larger.

    rows           1 2 3 4 5 6 7 8 9 ...
    captured as    1 2 4 4 8 8 8 8 16 ...         rows that pad have no slot, and do nothing

A graph replays hundreds of kernels by one call, at the addresses and shapes that it was captured
with. All share one pool of memory, since one runs at a time.
"""

import gc
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Return the batch sizes to capture: close together where padding would cost most."""
    steps = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, *range(384, 4097, 128)]
    return (*(size for size in steps if size < max_num_seqs), max_num_seqs)


class StepGraphs(Generic[Result]):
    """What was captured for each size. On a CPU device, each step is computed instead."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes = tuple(sorted(sizes))
        self._is_cuda = device.type == "cuda"
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._results: dict[int, Result] = {}
        self._compute: dict[int, Callable[[], Result]] = {}

    def size_for(self, num_rows: int) -> int | None:
        """Return the smallest size that holds so many rows, if any does."""
        number = bisect_left(self.sizes, num_rows)
        return self.sizes[number] if number < len(self.sizes) else None

    def capture(
        self, compute_of: Callable[[int], Callable[[], Result]], on_captured: Callable[[], None]
    ) -> None:
        """Capture `compute_of(size)()` for every size, the largest first, so that it makes the pool
        of memory that the others fit into.

        It must work on tensors that stay where they are, and wait for nothing.
        """
        pool = torch.cuda.graph_pool_handle() if self._is_cuda else None
        # A collection meanwhile could free a tensor of another stream, which capture forbids.
        gc.collect()
        gc.disable()
        try:
            for size in reversed(self.sizes):
                compute = compute_of(size)
                if self._is_cuda:
                    compute()  # compiles kernels and makes cuBLAS allocate, which capture forbids
                    torch.cuda.synchronize()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool):
                        self._results[size] = compute()
                    self._graphs[size] = graph
                else:
                    self._compute[size] = compute
                on_captured()
        finally:
            gc.enable()

    def replay(self, size: int) -> Result:
        """Launch a captured step; its result is in the same tensors each time."""
        if self._is_cuda:
            self._graphs[size].replay()
        else:
            self._results[size] = self._compute[size]()
        return self._results[size]

    def result(self, size: int) -> Result:
        """Return what the last replay of a size gave, or will give."""
        return self._results[size]

    def close(self) -> None:
        """Free the graphs and their memory."""
        self._graphs.clear()
        self._results.clear()
        self._compute.clear()
