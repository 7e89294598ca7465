"""CUDA graphs of steps: one for each of a few shapes; a step takes the least that it fits into.

    decode rows    1 2 3 4 5 6 7 8 9 ...
    captured as    1 2 4 4 8 8 8 8 16 ...         rows that pad have no slot, and do nothing

A graph replays hundreds of kernels by one call, at the addresses and shapes that it was captured
with. All of a `StepGraphs` share one pool of memory, since one runs at a time.
"""

import gc
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch

Shape = TypeVar("Shape", bound=Hashable)
Result = TypeVar("Result")

PROMPT_TOKENS = (16, 32, 64, 128, 256, 384, 512, 640, 768, 1024)
"""From 128 on its multiples: cuBLAS takes longer for 448 tokens of an 8B model than for 512. Larger
steps take a GPU longer than their launches take a CPU."""
FEW_ROWS = 64
TOKENS_STEP = 128
"""Of the sizes that larger steps are padded to; see `padded_tokens`."""


class PromptShape(NamedTuple):
    """What a step with tokens of prompts is padded to."""

    num_tokens: int
    num_rows: int
    """And samples"""


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Return the batch sizes to capture: close together where padding would cost most."""
    steps = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, *range(384, 4097, 128)]
    return (*(size for size in steps if size < max_num_seqs), max_num_seqs)


def size_for(sizes: Sequence[int], num_rows: int) -> int | None:
    """Return the smallest size that holds so many rows, if any does."""
    number = bisect_left(sizes, num_rows)
    return sizes[number] if number < len(sizes) else None


def prompt_shapes(max_num_seqs: int, max_num_tokens: int) -> tuple[PromptShape, ...]:
    """Return the shapes to capture of steps with prompts: for few rows, and some for all."""
    shapes = []
    for num_tokens in PROMPT_TOKENS:
        if num_tokens <= max_num_tokens:
            most = min(num_tokens, max_num_seqs)
            shapes.append(PromptShape(num_tokens, min(FEW_ROWS, most)))
            if most > FEW_ROWS and num_tokens.bit_count() == 1:
                shapes.append(PromptShape(num_tokens, most))
    return tuple(shapes)


def shape_for(shapes: Sequence[PromptShape], num_tokens: int, num_rows: int) -> PromptShape | None:
    """Return the first shape that holds so many, if any does."""
    fitting = (s for s in shapes if s.num_tokens >= num_tokens and s.num_rows >= num_rows)
    return next(fitting, None)


def padded_tokens(num_tokens: int, max_num_tokens: int) -> int:
    """Return what a step without a shape is padded to: one of few sizes, all launched at start-up.

    cuBLAS loads a kernel when it first takes it, and that launch waits for the device. Products
    have tiles of as many rows, so that padding takes no time.
    """
    return min(-(-num_tokens // TOKENS_STEP) * TOKENS_STEP, max_num_tokens)


class StepGraphs(Generic[Shape, Result]):
    """What was captured for each shape. On a CPU device, each step is computed instead."""

    def __init__(self, shapes: Sequence[Shape], device: torch.device) -> None:
        """shapes: from the smallest to the largest."""
        self.shapes = tuple(shapes)
        self._is_cuda = device.type == "cuda"
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        self._results: dict[Shape, Result] = {}
        self._compute: dict[Shape, Callable[[], Result]] = {}

    def __contains__(self, shape: Shape) -> bool:
        """Whether it was captured."""
        return shape in self._graphs or shape in self._compute

    def capture(
        self, compute_of: Callable[[Shape], Callable[[], Result]], on_captured: Callable[[], None]
    ) -> None:
        """Capture `compute_of(shape)()` for every shape, the largest first, so that it makes the
        pool of memory that the others fit into.

        It must work on tensors that stay where they are, and wait for nothing.
        """
        pool = torch.cuda.graph_pool_handle() if self._is_cuda else None
        # A collection meanwhile could free a tensor of another stream, which capture forbids.
        gc.collect()
        gc.disable()
        try:
            for shape in reversed(self.shapes):
                compute = compute_of(shape)
                if self._is_cuda:
                    compute()  # compiles kernels and makes cuBLAS allocate, which capture forbids
                    torch.cuda.synchronize()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph, pool=pool):
                        self._results[shape] = compute()
                    self._graphs[shape] = graph
                else:
                    self._compute[shape] = compute
                on_captured()
        finally:
            gc.enable()

    def replay(self, shape: Shape) -> Result:
        """Launch a captured step; its result is in the same tensors each time."""
        if self._is_cuda:
            self._graphs[shape].replay()
        else:
            self._results[shape] = self._compute[shape]()
        return self._results[shape]

    def result(self, shape: Shape) -> Result:
        """Return what the last replay of a shape gave, or will give."""
        return self._results[shape]

    def close(self) -> None:
        """Free the graphs and their memory."""
        self._graphs.clear()
        self._results.clear()
        self._compute.clear()
