"""How the new tokens of a step's rows are cut into tiles for `prefill_attention_triton`.

Planned on the CPU, without Triton.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillTiles:
    """How the work is cut. Sizes are powers of 2, of at least 16."""

    block_m: int
    """Query rows: queries times `heads_per_tile`; rows that this does not fill idle"""
    block_n: int
    """Keys; one step gathers them from as many blocks as they lie in"""
    heads_per_tile: int
    """Query heads of one key-value head in a tile: a divisor of the group"""
    heads_at_once: int
    """Head tiles launched beside each other, a divisor of num_heads / heads_per_tile: all of them
    puts the largest tiles of every head first; fewer keep less of the pool in use at a time."""
    num_warps: int
    num_stages: int
    specialized: bool = False
    """Taken by `prefill_attention_hopper`; see `why_not_specialized`"""

    @property
    def queries(self) -> int:
        """Queries of a tile."""
        return self.block_m // self.heads_per_tile


def why_not_specialized(kv: torch.Tensor) -> str | None:
    """Return what about the pool or its device `prefill_attention_hopper` cannot do, or None.

    Elsewhere than on GPUs the device is not looked at: stand-ins run the kernel there.
    """
    block_tokens, head_dim = kv.shape[4:]
    token_stride = kv.stride(4)
    if kv.is_cuda and torch.cuda.get_device_capability(kv.device) != (9, 0):
        return f"{kv.device} is no Hopper GPU"
    if kv.dtype not in (torch.float16, torch.bfloat16):
        return f"the pool is of {kv.dtype}, not of 16 bits"
    if head_dim not in (64, 128):
        return f"heads have {head_dim} elements, not 64 or 128"
    if block_tokens < 8 or block_tokens & (block_tokens - 1):
        return f"blocks have {block_tokens} tokens, not a power of 2 from 8"
    if token_stride % 8 or kv.data_ptr() % 16:
        return f"the pool's tokens, {token_stride} elements apart, do not lie at 16-byte borders"
    if any(kv.stride(dim) % token_stride for dim in range(4)):
        return f"the pool's strides {kv.stride()} are no multiples of a token's"
    if num_pool_rows(kv) >= 1 << 31:
        return f"the pool spans {num_pool_rows(kv)} rows of a head, not fewer than 2**31"
    return None


def is_faster_specialized(max_new_tokens: int, max_keys: int) -> bool:
    """Say whether `prefill_attention_hopper` is the faster one, for bf16 and head dim 128.

    max_keys: of the longest context, new tokens included. On an H200 short chunks fill too few of
    its tiles of 128 rows, unless a long prefix makes up for that: it was slower for 256 and 512 new
    tokens, faster for 512 behind 8,192. At 1,024 it is 10 % faster, but its launch takes 100 us of
    a CPU, three times that of a Triton kernel, and a lone prompt of that length waits for launches.
    The times of 1,024 are in bench/results/kernels_h200.json, those of shorter chunks not kept.
    """
    return max_new_tokens > 256 and max_new_tokens * max_keys > 1024 * 1024


def num_pool_rows(kv: torch.Tensor) -> int:
    """Return how many rows of a head the pool spans, from its first to its last."""
    distance = sum((kv.shape[dim] - 1) * kv.stride(dim) for dim in range(5))
    return 1 + distance // kv.stride(4)


def choose_tiles(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    max_new_tokens: int,
    *,
    specialized: bool = False,
) -> PrefillTiles:
    """Return the tiles for rows of up to `max_new_tokens`; each different result compiles anew.

    specialized: for `prefill_attention_hopper`, where `why_not_specialized` says nothing against it
    and `is_faster_specialized`.

    For bf16 and head dim 128 these were within 2 % of the best of a sweep on an H200 for 1,024,
    2,048 and 8,192 tokens; its other tiles are not kept, times with these are in
    bench/results/kernels_h200.json. The other sizes are such that, compiled for a
    Hopper GPU, they fit into its shared memory and registers; they are not timed.
    """
    if specialized:
        return PrefillTiles(128, 128, 1, num_heads, 4, 2, specialized=True)
    if dtype == torch.float32:  # without matrix units: small tiles, unrolled in registers
        block_m, block_n = (64, 32) if head_dim <= 64 else (64, 16) if head_dim <= 128 else (32, 16)
        num_stages = 3
    else:
        block_m, block_n = 128, 128 if head_dim <= 64 else 64 if head_dim <= 128 else 32
        num_stages = 3
        if max_new_tokens <= 1024:  # smaller tiles, so that every multiprocessor has some
            block_m, block_n, num_stages = 64, min(block_n, 64), 2
    num_warps = 4 if dtype != torch.float32 and head_dim <= 128 else 8
    heads_per_tile = 1
    if 2 * max_new_tokens <= block_m:
        # Short chunks fill a tile only with several heads; they share what is read, too.
        group = num_heads // num_kv_heads
        fitting = max(1, block_m // max(1, max_new_tokens))
        heads_per_tile = max(n for n in range(1, group + 1) if group % n == 0 and n <= fitting)
        rows = max(1, max_new_tokens) * heads_per_tile
        block_m = min(block_m, max(16, 1 << (rows - 1).bit_length()))
        if block_m <= 64 and dtype != torch.float32:
            num_warps = 4
    return PrefillTiles(
        block_m, block_n, heads_per_tile, num_heads // heads_per_tile, num_warps, num_stages
    )


class TileTable(NamedTuple):
    """Which tile of queries each program takes: made once a step, used by every layer."""

    tiles: PrefillTiles
    entries: torch.Tensor
    """int32 [N, 2]: row and, within its new tokens, the tile's first query; row -1: no tile"""


def make_tile_table(
    starts: npt.NDArray[np.int32],
    num_new_tokens: npt.NDArray[np.int32],
    tiles: PrefillTiles,
    num_tiles: int | None = None,
) -> TileTable:
    """Cut the rows' new tokens into tiles, those that see most keys first; on the CPU.

    starts, num_new_tokens: [R]; 0 new tokens leave a row out, whatever `offsets` will say of it.
    num_tiles: the table's size, for launches that are captured; unneeded entries are -1.
    """
    if starts.shape != num_new_tokens.shape or starts.ndim != 1:
        raise ValueError(
            f"starts {list(starts.shape)} and num_new_tokens {list(num_new_tokens.shape)} must be "
            f"of one length"
        )
    per_row = -(-num_new_tokens.astype(np.int64) // tiles.queries)
    needed = int(per_row.sum())
    size = needed if num_tiles is None else num_tiles
    if needed > size:
        raise ValueError(
            f"{int(num_new_tokens.sum())} new tokens in {len(starts)} rows need {needed} tiles of "
            f"{tiles.queries} queries, and the table has {size}"
        )
    rows = np.repeat(np.arange(len(starts)), per_row)
    firsts = (np.arange(needed) - np.repeat(np.cumsum(per_row) - per_row, per_row)) * tiles.queries
    num_keys = starts[rows] + np.minimum(firsts + tiles.queries, num_new_tokens[rows])
    order = np.argsort(-num_keys, kind="stable")
    entries = np.full((size, 2), -1, np.int32)
    entries[:needed, 0] = rows[order]
    entries[:needed, 1] = firsts[order]
    return TileTable(tiles, torch.from_numpy(entries))


def most_tiles(num_tokens: int, num_rows: int, tiles: PrefillTiles) -> int:
    """Return how many tiles any rows may need that have so many new tokens in all."""
    return min(num_tokens, num_tokens // tiles.queries + num_rows)
