"""How the contexts of a decode step's rows are cut for `decode_attention_triton`, and the memory
that the parts need.
"""

import dataclasses
from typing import NamedTuple

import torch

MAX_SPLITS = 128

_LARGE_TILE_BYTES = 64 * 1024
"""Of keys and values together, for launches with fewer programs than would hide each other's waits.
"""
_SMALL_TILE_BYTES = 32 * 1024
"""For launches that fill every multiprocessor several times over."""


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeTiles:
    """How a launch is cut. All but the last two are powers of 2."""

    block_m: int
    """Queries of a kv head in a program, at least 16 (the matrix unit's tile)"""
    block_n: int
    """Tokens of context in a step of the loop, at least 16"""
    num_splits: int
    """Parts that a row's context is cut into at most; 1 needs no merging"""
    min_tiles: int = 1
    """Tiles of block_n tokens that a split has at least"""
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        for name, least in (("block_m", 16), ("block_n", 16), ("num_splits", 1), ("min_tiles", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"{name} must be a power of 2 of at least {least}, got {value}")
        if self.num_splits > MAX_SPLITS:
            raise ValueError(f"num_splits must be at most {MAX_SPLITS}, got {self.num_splits}")

    def num_m_tiles(self, num_queries: int) -> int:
        """Return the tiles that the queries of a kv head are cut into."""
        return -(-num_queries // self.block_m)


def choose_tiles(
    num_rows: int,
    *,
    num_kv_heads: int,
    num_queries: int,
    head_dim: int,
    dtype: torch.dtype,
    max_context: int,
    num_sms: int,
) -> DecodeTiles:
    """Return the tiles for a launch.

    num_queries: T * group, of one kv head. max_context: tokens that a row may attend to, at most;
    a longer one is computed as well, only in larger parts. For bf16, head dim 128 and groups of 4
    these were within 3 % of the best of a sweep on an H200 whose other tiles are not kept; times
    with these: bench/results/kernels_h200.json. The other sizes fit in registers and shared memory
    by the compiler's report for sm_90 and are not timed.
    """
    padded_dim = max(16, next_power_of_2(head_dim))
    if dtype is torch.float32:  # without matrix units, products are unrolled in registers
        most = 16
    else:
        most = 64 if padded_dim <= 128 else 32
    block_m = min(most, max(16, next_power_of_2(num_queries)))
    programs = max(1, num_rows * num_kv_heads * -(-num_queries // block_m))
    fills_the_card = programs >= 2 * num_sms
    if dtype is torch.float32:
        tile_bytes, num_warps, num_stages = _SMALL_TILE_BYTES, 8, 3
    elif fills_the_card or block_m == 64 or padded_dim > 128:
        tile_bytes, num_warps, num_stages = _SMALL_TILE_BYTES, (2 if block_m == 16 else 4), 3
    else:
        tile_bytes, num_warps, num_stages = _LARGE_TILE_BYTES, 4, 5
    block_n = min(128, max(16, tile_bytes // (2 * padded_dim * dtype.itemsize)))
    num_splits = 1
    while (
        num_splits < MAX_SPLITS
        and 2 * num_splits * programs <= num_sms
        and num_splits * block_n < max_context
    ):
        num_splits *= 2
    return DecodeTiles(block_m, block_n, num_splits, num_warps=num_warps, num_stages=num_stages)


class DecodeWorkspace(NamedTuple):
    """Memory of contexts in parts, for launches on one stream, one after the other.

    Owned by the caller, who keeps it as long as a graph uses it.
    """

    partials: torch.Tensor
    """float32, contiguous: the parts' outputs and the logarithms of their sums"""
    counters: torch.Tensor
    """int32, contiguous, one for each tile of queries; all 0 between launches: each leaves them so
    """

    @classmethod
    def allocate(
        cls, num_partials: int, num_counters: int, device: torch.device | str
    ) -> "DecodeWorkspace":
        """Allocate for launches that need up to so many of each, as `workspace_size` says."""
        return cls(
            torch.empty(num_partials, dtype=torch.float32, device=device),
            torch.zeros(num_counters, dtype=torch.int32, device=device),
        )


def workspace_size(
    num_rows: int, *, num_kv_heads: int, num_queries: int, head_dim: int, tiles: DecodeTiles
) -> tuple[int, int]:
    """Return the partials and the counters of a launch; num_queries is T * group, of a kv head."""
    if tiles.num_splits == 1:
        return 0, 0
    heads = num_rows * num_kv_heads
    partials = heads * tiles.num_splits * num_queries * (head_dim + 1)
    return partials, heads * tiles.num_m_tiles(num_queries)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is not less than n, n > 0."""
    return 1 << (n - 1).bit_length()
