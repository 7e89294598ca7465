"""How a product of few rows is cut for `skinny_matmul_triton`, and what memory its splits need."""

import dataclasses
from typing import NamedTuple

import torch

LINE_BYTES = 128
"""Of the L2 cache"""
_MIN_PROGRAMS = 96
"""Programs wanted at least: with 4 stages these keep the 132 multiprocessors of an H200 reading."""


@dataclasses.dataclass(frozen=True, slots=True)
class SkinnyTiles:
    """How a product is cut. Sizes are powers of 2, of at least 16."""

    block_m: int
    block_n: int
    """Rows of the weight; a gated product takes as many of the gate and of up."""
    block_k: int
    num_splits: int
    """Programs along K, 1 to 8"""
    num_warps: int = 4
    num_stages: int = 3
    weight_first: bool = False
    """Multiply W x^T, so that the weight is the operand that matrix units take 64 rows of"""
    launch_early: bool = False
    """Programmatic dependent launch, Hopper and later: start while the kernel ahead ends"""
    prefetch: int = 0
    """With it, elements of each row of the weight, a power of 2, that are fetched into the L2 while
    the kernel ahead still runs; 0: none"""


def choose_tiles(
    num_rows: int, num_outputs: int, inner: int, dtype: torch.dtype, gated: bool = False
) -> SkinnyTiles:
    """Return the tiles for a product of M rows, N outputs and K.

    For bf16 these were within 5 % of the best of a sweep over the products of an 8B model on an
    H200, M = 1 to 64, whose other tiles are not kept; times with these are in
    bench/results/kernels_h200.json. The sizes for small products and for float32 are not timed.
    """
    block_m = min(64, max(16, _power_of_2(num_rows)))
    if dtype == torch.float32:
        # Without matrix units: small tiles, because their products are unrolled in registers.
        block_n, block_k, num_stages = 32, 32, 3
    else:
        is_small = _cdiv(num_outputs, 64) < _MIN_PROGRAMS // 4
        block_n = 32 if is_small else 64
        block_k = 64 if gated and block_m == 64 else 128
        num_stages = 5 if gated or block_m == 64 else 6
    tile_outputs = 2 * block_n if gated else block_n
    num_tiles = _cdiv(num_rows, block_m) * _cdiv(num_outputs, tile_outputs)
    num_splits = 1
    while num_splits < 4 and num_tiles * num_splits < _MIN_PROGRAMS:
        if inner < 4 * block_k * num_splits:  # each split keeps at least 2 steps along K
            break
        num_splits *= 2
    steps = _cdiv(_cdiv(inner, block_k), num_splits)
    return SkinnyTiles(
        block_m,
        block_n,
        block_k,
        num_splits,
        num_stages=max(3, min(num_stages, steps)),  # stages that are never filled take time, too
        weight_first=dtype != torch.float32,
    )


def choose_prefetch(
    num_outputs: int, inner: int, tiles: SkinnyTiles, dtype: torch.dtype, num_bytes: int
) -> int:
    """Return the elements of each row to prefetch, so that all programs fetch about `num_bytes`."""
    line = LINE_BYTES // dtype.itemsize
    part = _cdiv(_cdiv(inner, tiles.block_k), tiles.num_splits) * tiles.block_k
    elements = min(part, num_bytes // (num_outputs * tiles.num_splits * dtype.itemsize))
    return 0 if elements < line or inner < line else 1 << (elements.bit_length() - 1)


class SkinnyWorkspace(NamedTuple):
    """Memory of split products on one stream, for products one after the other.

    Owned by the caller, who keeps it as long as a graph uses it.
    """

    partials: torch.Tensor
    """float32, contiguous; of `workspace_size`"""
    counters: torch.Tensor
    """int32, contiguous, one for each tile; all 0 between products: each leaves them so"""

    @classmethod
    def allocate(
        cls, num_partials: int, num_tiles: int, device: torch.device | str
    ) -> "SkinnyWorkspace":
        """Allocate for products of up to so many partial sums and tiles of the output."""
        return cls(
            torch.empty(num_partials, dtype=torch.float32, device=device),
            torch.zeros(num_tiles, dtype=torch.int32, device=device),
        )


def workspace_size(
    num_rows: int, num_outputs: int, tiles: SkinnyTiles, gated: bool = False
) -> tuple[int, int]:
    """Return the partial sums and the tiles of a product: what `allocate` takes; 0, 0 unsplit."""
    if tiles.num_splits == 1:
        return 0, 0
    num_column_tiles = _cdiv(num_outputs, 2 * tiles.block_n if gated else tiles.block_n)
    num_partials = tiles.num_splits * num_rows * num_outputs
    return num_partials, num_column_tiles * _cdiv(num_rows, tiles.block_m)


def _cdiv(total: int, part: int) -> int:
    return -(-total // part)


def _power_of_2(number: int) -> int:
    """Return the least power of 2 that is not below it."""
    return 1 << (number - 1).bit_length()
