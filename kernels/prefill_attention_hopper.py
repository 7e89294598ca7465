"""The tiles of `prefill_attention_triton` on Hopper GPUs: keys and values come by bulk copies.

Same formula and same arguments. Triton's own compiler neither copies blocks of a paged pool in bulk
nor lets one step's softmax run beside the next step's product, so the kernel is written in Gluon,
where both are explicit (the scheme is FlashAttention-3's, Shah 2024).

`why_not_specialized` lists what it is not for. Gluon has no interpreter: the tests run the parts as
threads, on a stand-in.
"""

import dataclasses
import functools
import math
import weakref
from typing import NamedTuple

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from paceline.kernels.launch import launch
from paceline.kernels.prefill_attention_hopper_kernel import prefill_attention_hopper_kernel
from paceline.kernels.prefill_tiles import TileTable, num_pool_rows, why_not_specialized

ROWS = 64
"""Of half a tile: the least that 4 warps multiply, and all that their registers hold sums of"""


@dataclasses.dataclass(frozen=True, slots=True)
class _Memory:
    """What a descriptor asks of its tensor: kept in its place, so that no pool is kept."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


class _PoolRows(NamedTuple):
    """The pool as rows of a head: the same for every layer and step."""

    descriptor: TensorDescriptor
    """Of all rows from the pool's first"""
    block: int
    """Rows from one block to the next; likewise those below"""
    layer: int
    kv_head: int
    value: int


def launch_prefill_attention_hopper(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    offsets: torch.Tensor,
    tile_table: TileTable,
    scale: float,
    *,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """Do what `prefill_attention_triton` does, which has checked the arguments.

    Raises ValueError for what the kernel cannot do.
    """
    tiles, entries = tile_table
    if tiles.block_m != 2 * ROWS:
        raise ValueError(f"tiles have {tiles.block_m} rows, not {2 * ROWS}: choose other tiles")
    rows = _pool_rows(weakref.ref(kv), kv.data_ptr(), tiles.block_n)
    if lengths.shape[0] == 0:  # the kernel looks at a row for unused entries, too
        return
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, _, block_tokens = kv.shape[2:5]
    num_tiles = entries.shape[0]
    num_head_tiles = num_heads // tiles.heads_per_tile
    total = num_tiles * num_head_tiles
    num_programs = min(_num_sms(q.device), total)
    launch(prefill_attention_hopper_kernel, (num_programs,))(
        q,
        rows.descriptor,
        out,
        tables,
        lengths,
        offsets,
        entries,
        num_tiles,
        -(-total // num_programs),
        scale * math.log2(math.e),
        *q.stride()[:2],
        layer * rows.layer,
        rows.value,
        rows.block,
        rows.kv_head,
        *out.stride()[:2],
        tables.stride(0),
        HEADS=tiles.heads_per_tile,
        NUM_HEAD_TILES=num_head_tiles,
        SHARERS=num_head_tiles // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_TOKENS=block_tokens,
        WINDOW=window or 0,
        ROWS=ROWS,
        BLOCK_N=tiles.block_n,
        STAGES=tiles.num_stages,
        num_warps=4,
    )


@functools.lru_cache(maxsize=8)
def _pool_rows(pool: weakref.ref[torch.Tensor], address: int, block_n: int) -> _PoolRows:
    """Check a pool and describe it: once, as this takes longer than the rest of a launch.

    address: where the pool, which must be alive, begins. Neither it nor its memory is kept.
    """
    kv = pool()
    assert kv is not None
    reason = why_not_specialized(kv)
    if reason is not None:
        raise ValueError(f"{reason}: choose other tiles")
    block_tokens, head_dim = kv.shape[4:]
    token_stride = kv.stride(4)
    descriptor = TensorDescriptor(
        _Memory(address, kv.dtype),
        [num_pool_rows(kv), head_dim],
        [token_stride, 1],
        [min(block_tokens, block_n), head_dim],
        gl.NVMMASharedLayout(128, 16, 2),
    )
    return _PoolRows(descriptor, *(kv.stride(dim) // token_stride for dim in range(4)))


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
