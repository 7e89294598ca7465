"""How decode attention is cut for `decode_attention_triton`, and the memory that it needs."""

import dataclasses
from typing import NamedTuple

import torch

_LARGE_TILE_BYTES = 64 * 1024
"""Of keys and values together, for launches with fewer programs than would hide each other's waits.
"""
_SMALL_TILE_BYTES = 32 * 1024
"""For launches that fill every multiprocessor several times over."""
_PROGRAMS_PER_SM = 4
"""Of small tiles: as many as a Hopper's registers hold at once"""
_SHARES_PER_ROW = 16
"""At most, on average: the shares of a row are merged one after another"""


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeTiles:
    """How a launch is cut."""

    block_m: int
    """Queries of a kv head in a program, a power of 2 of at least 16 (the matrix unit's tile)"""
    block_n: int
    """Tokens of context in a step of the loop, likewise"""
    num_shares: int
    """Even shares of the rows' contexts, for each tile of queries of a kv head: as many as run at
    once"""
    num_warps: int = 4
    num_stages: int = 3
    start_tiles: int = 2
    """What beginning a second row and merging cost, in the time of so many tiles beside others"""
    one_row: bool = False
    """No share is of two rows: the kernel has no loop over them, and is faster by a tenth"""

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name} must be a power of 2 of at least 16, got {value}")
        if self.num_shares < 1:
            raise ValueError(f"num_shares must be at least 1, got {self.num_shares}")

    def num_programs(self, num_rows: int) -> int:
        """Return the programs for each tile of queries of a kv head, which take a share each."""
        return max(self.num_shares, num_rows)

    def num_m_tiles(self, num_queries: int) -> int:
        """Return the tiles that the queries of a kv head are cut into."""
        return -(-num_queries // self.block_m)

    def kept_queries(self, num_queries: int) -> int:
        """Return how many queries of a tile a share keeps results of: a power of 2."""
        return min(self.block_m, next_power_of_2(num_queries))


def choose_tiles(
    num_rows: int,
    *,
    num_kv_heads: int,
    num_queries: int,
    head_dim: int,
    dtype: torch.dtype,
    num_sms: int,
) -> DecodeTiles:
    """Return the tiles for a launch of so many rows, whatever their lengths.

    num_queries: T * group, of one kv head.
    """
    padded_dim = max(16, next_power_of_2(head_dim))
    if dtype is torch.float32:  # without matrix units, products are unrolled in registers
        most = 16
    else:
        most = 64 if padded_dim <= 128 else 32
    block_m = min(most, max(16, next_power_of_2(num_queries)))
    head_tiles = num_kv_heads * -(-num_queries // block_m)
    if dtype is torch.float32:
        tiles = (_SMALL_TILE_BYTES, 8, 3, _PROGRAMS_PER_SM, False)
    elif 2 * num_rows * head_tiles > num_sms or block_m == 64 or padded_dim > 128:
        tiles = (_SMALL_TILE_BYTES, 2 if block_m == 16 else 4, 3, _PROGRAMS_PER_SM, False)
    else:
        tiles = (_LARGE_TILE_BYTES, 4, 5, 1, True)
    tile_bytes, num_warps, num_stages, per_sm, one_row = tiles
    block_n = min(128, max(16, tile_bytes // (2 * padded_dim * dtype.itemsize)))
    num_shares = max(1, min(per_sm * num_sms // head_tiles, _SHARES_PER_ROW * num_rows))
    return DecodeTiles(
        block_m,
        block_n,
        num_shares,
        num_warps=num_warps,
        num_stages=num_stages,
        one_row=one_row,
    )


class DecodeWorkspace(NamedTuple):
    """Memory of rows in several shares, for launches on one stream, one after the other.

    Owned by the caller, who keeps it as long as a graph uses it.
    """

    partials: torch.Tensor
    """float32, contiguous: the shares' outputs and the logarithms of their sums"""
    counters: torch.Tensor
    """int32, contiguous, one for each row and tile of queries; all 0 between launches: each leaves
    them so"""

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
    head_tiles = num_kv_heads * tiles.num_m_tiles(num_queries)
    if tiles.num_shares == 1:
        return 0, 0
    # A share begins within one row and may end within another.
    num_kept = 2 * tiles.num_programs(num_rows) * tiles.kept_queries(num_queries)
    return head_tiles * num_kept * (head_dim + 1), head_tiles * num_rows


def next_power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is not less than n, n > 0."""
    return 1 << (n - 1).bit_length()
