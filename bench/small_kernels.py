"""The kernels between products and attention, as `paceline.bench.kernels` times them.

A case makes the calls of one operation on rotating inputs, ours and PyTorch's best, and counts the
bytes that it must move. PyTorch's sampling is what a plain server does: a sort, top-k and top-p on
the sorted scores, and a draw, without penalties.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from paceline.engine.gpu.sampler import GpuSampler
from paceline.engine.step_plan import SlotStart
from paceline.kernels.block_copy_triton import block_copy_triton, block_gather_triton
from paceline.kernels.rms_norm_triton import rms_norm_triton
from paceline.kernels.rope_kv_write_triton import rope_cos_sin, rope_kv_write_triton
from paceline.kernels.silu_mul_triton import silu_mul_triton
from paceline.sampling_params import SamplingParams

Call = Callable[[], object]


class Shape(NamedTuple):
    """Sizes of a model; the defaults are Llama-3-8B's."""

    hidden: int = 4096
    inner: int = 14336
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_tokens: int = 16
    vocab_size: int = 128_256
    rotated_bytes: int = 512 << 20
    """Of inputs, several times the L2 cache"""


class Case(NamedTuple):
    """One operation at one size."""

    ours: Sequence[Call]
    theirs: Sequence[Call]
    """Empty: PyTorch has no such operation."""
    num_bytes: int


def small_kernel_cases(
    shape: Shape, counts: Sequence[int], samples: Sequence[int], device: str
) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield (operation and size, how to make its case); counts: tokens; samples: rows of logits."""
    for count in counts:
        yield f"rms_norm {count}", partial(norm_case, shape, count, device)
        yield f"silu_mul {count}", partial(silu_case, shape, count, device)
        yield f"rope_kv_write {count}", partial(rope_case, shape, count, device)
    for count in samples:
        for name, sampling in SAMPLING.items():
            case = partial(sampling_case, shape, count, sampling, device)
            yield f"sampling, {name} {count}", case
    for count in samples:
        yield f"block_copy {count}", partial(copy_case, shape, count, device)
        yield f"block_gather {count}", partial(gather_case, shape, count, device)


def norm_case(shape: Shape, count: int, device: str) -> Case:
    xs = _rotated(shape, device, count, shape.hidden)
    out = torch.zeros_like(xs[0])
    weight = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)
    return Case(
        [partial(rms_norm_triton, x, weight, 1e-5, out=out) for x in xs],
        [partial(F.rms_norm, x, (shape.hidden,), weight, 1e-5) for x in xs],
        2 * xs[0].nbytes,
    )


def silu_case(shape: Shape, count: int, device: str) -> Case:
    xs = _rotated(shape, device, count, 2 * shape.inner)
    out = torch.empty((count, shape.inner), dtype=torch.bfloat16, device=device)

    def theirs(x: torch.Tensor) -> object:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    return Case(
        [partial(silu_mul_triton, x, out=out) for x in xs],
        [partial(theirs, x) for x in xs],
        xs[0].nbytes + out.nbytes,
    )


def rope_case(shape: Shape, count: int, device: str) -> Case:
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    xs = _rotated(shape, device, count, (heads + 2 * kv_heads) * dim)
    num_blocks = -(-count // shape.block_tokens)
    kv = torch.zeros(
        (num_blocks, 1, kv_heads, 2, shape.block_tokens, dim), dtype=torch.bfloat16, device=device
    )
    tables = torch.randperm(num_blocks, device=device, dtype=torch.int32).view(1, -1)
    positions = torch.arange(count, dtype=torch.int32, device=device)
    rows = torch.zeros(count, dtype=torch.int32, device=device)
    frequencies = 1.0 / 10_000 ** (torch.arange(0, dim, 2, device=device) / dim)
    cos_sin = rope_cos_sin(count, frequencies, 1.0)

    def ours(x: torch.Tensor) -> object:
        return rope_kv_write_triton(x, cos_sin, positions, rows, tables, kv, 0, num_heads=heads)

    written = count * (heads + 2 * kv_heads) * dim * 2
    return Case([partial(ours, x) for x in xs], (), xs[0].nbytes + written + cos_sin.nbytes)


SAMPLING = {
    "greedy": SamplingParams(temperature=0.0),
    "temperature": SamplingParams(temperature=0.8, seed=0),
    "all": SamplingParams(
        temperature=0.8, top_k=50, top_p=0.9, seed=0, repetition_penalty=1.1, presence_penalty=0.1
    ),
}


def sampling_case(shape: Shape, count: int, sampling: SamplingParams, device: str) -> Case:
    size = shape.vocab_size
    tokens = np.arange(min(1000, size), dtype=np.int32)
    sampler = GpuSampler(count, count, size, torch.bfloat16, (), torch.device(device))
    starts = [SlotStart(slot, sampling, 0, tokens, tokens[:0]) for slot in range(count)]
    sampler.start(torch.from_numpy(sampler.encode_starts(starts)).to(device), count)
    rows = torch.arange(count, dtype=torch.int32, device=device)
    xs = _rotated(shape, device, count, size)
    is_random = not sampling.is_greedy
    kind = sampler.kind_of(np.arange(count, dtype=np.int32))

    def theirs(x: torch.Tensor) -> object:
        if not is_random:
            return x.argmax(dim=-1)
        scores = x.float() / sampling.temperature
        if sampling.top_k:
            values, order = scores.sort(dim=-1, descending=True)
            weights = values.softmax(dim=-1)
            values.masked_fill_(weights.cumsum(dim=-1) - weights > sampling.top_p, -torch.inf)
            values[:, sampling.top_k :] = -torch.inf
            scores = scores.scatter(1, order, values)
        noise = torch.empty_like(scores).exponential_()
        return scores.softmax(dim=-1).div_(noise).argmax(dim=-1)

    return Case(
        [partial(sampler.sample, x, rows, rows, kind) for x in xs],
        [partial(theirs, x) for x in xs],
        xs[0].nbytes,
    )


def copy_case(shape: Shape, count: int, device: str) -> Case:
    blocks, sources = _blocks(shape, count, device)
    targets = sources + count
    return Case(
        [partial(block_copy_triton, blocks, sources, targets)],
        [partial(_index_copy, blocks, sources, targets)],
        2 * count * blocks.shape[1],
    )


def gather_case(shape: Shape, count: int, device: str) -> Case:
    blocks, sources = _blocks(shape, count, device)
    staging = torch.empty((count, blocks.shape[1]), dtype=torch.uint8, device=device)
    return Case(
        [partial(block_gather_triton, blocks, sources, staging)],
        [partial(torch.index_select, blocks, 0, sources, out=staging)],
        2 * staging.nbytes,
    )


def _index_copy(blocks: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> object:
    return blocks.index_copy_(0, targets, blocks.index_select(0, sources))


def _blocks(shape: Shape, count: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of 32 layers, and the ids of the first `count` of them, in random order."""
    layer_bytes = 2 * 2 * shape.num_kv_heads * shape.block_tokens * shape.head_dim
    blocks = torch.zeros((2 * count, 32 * layer_bytes), dtype=torch.uint8, device=device)
    return blocks, torch.randperm(count, device=device)


def _rotated(shape: Shape, device: str, rows: int, width: int) -> list[torch.Tensor]:
    """Random inputs, together larger than the cache, but no more than a graph holds with ease."""
    number = max(2, min(32, shape.rotated_bytes // (2 * rows * width)))
    return [torch.randn((rows, width), dtype=torch.bfloat16, device=device) for _ in range(number)]
