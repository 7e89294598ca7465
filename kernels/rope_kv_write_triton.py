"""Rotate queries and keys, norm them first where the model says so, and write keys and values to
the paged pool, in one Triton kernel (reference: kernels.rope_kv_write).

    x = x / sqrt(mean(x^2) + eps) * weight           queries and keys, only with q_norm and k_norm
    y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin       queries and keys, halves of a head; Su 2021
    pool[block, layer, kv_head, k|v, slot] = rotated key | value
        block = tables[row_of_token[t], positions[t] // block_tokens]
        slot = positions[t] % block_tokens

    qkv [T, (num_heads + 2 num_kv_heads) head_dim]: query heads, key heads, value heads
    pool kv [blocks, layers, kv_heads, 2, block_tokens, head_dim], any strides, head contiguous
    float32, bfloat16 or float16; float32 inside, rounded once (the reference rounds cos, sin and
    the norm's output too)

    heads of a token    |q q q q|q q q q|k k v v|       each piece is one program: heads are alike
    programs            |   0   |   1   |   2   |       but for where the result goes
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from paceline.kernels.launch import launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int32, torch.int64)


class Tile(NamedTuple):
    """The heads of one token that a program takes."""

    num_heads: int
    num_warps: int


def choose_tile(num_tokens: int, head_dim: int) -> Tile:
    """Choose by the tokens: few need small pieces to keep a whole GPU busy.

    Times with these: bench/results/kernels_h200.json. Others were not tried.
    """
    wide = 2 if head_dim > 128 else 1
    if num_tokens <= 64:
        return Tile(4 // wide, 1)
    if num_tokens <= 512:
        return Tile(8 // wide, 2)
    return Tile(16 // wide, 4)


def rope_cos_sin(
    num_positions: int, inverse_frequencies: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return cos, then sin, of every position's angles: float32 [num_positions, head_dim].

    inverse_frequencies: float32 [head_dim / 2]; scale multiplies cos and sin. Made once, since
    exact cosines of large angles are slow in a kernel.
    """
    positions = torch.arange(num_positions, dtype=torch.float32, device=inverse_frequencies.device)
    angles = torch.outer(positions, inverse_frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(scale)


# A step's tokens behind those that decode begin anywhere: no other kernel for each alignment.
@triton.jit(
    do_not_specialize=["num_positions"],
    do_not_specialize_on_alignment=["positions_ptr", "rows_ptr"],
)
def _rope_kv_write_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,
    out_ptr,
    cos_sin_ptr,
    positions_ptr,
    rows_ptr,
    tables_ptr,
    kv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    num_positions,
    qkv_stride,
    out_stride,
    out_head_stride,
    cos_sin_stride,
    tables_stride,
    block_stride,
    head_stride,
    value_stride,
    slot_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, HALF)
    half: tl.constexpr = HEAD_DIM // 2
    is_pair = pairs < half
    is_query = heads < NUM_HEADS
    is_rotary = heads < NUM_HEADS + NUM_KV_HEADS
    if LAUNCH_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.load(rows_ptr + token).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    if (row >= 0) & (position < num_positions):
        block = tl.load(tables_ptr + row * tables_stride + position // BLOCK_TOKENS)
        inside = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & is_pair[None, :]
        x_ptrs = qkv_ptr + token * qkv_stride + heads[:, None] * HEAD_DIM + pairs[None, :]
        x1 = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(x_ptrs + half, mask=inside, other=0.0).to(tl.float32)
        n1, n2 = x1, x2
        if NORM:
            mean_square = tl.sum(x1 * x1 + x2 * x2, axis=1) / HEAD_DIM
            inverse = tl.rsqrt(mean_square + eps)[:, None]
            q_ptrs, k_ptrs = q_norm_ptr + pairs, k_norm_ptr + pairs
            q1 = tl.load(q_ptrs, mask=is_pair, other=0.0).to(tl.float32)
            q2 = tl.load(q_ptrs + half, mask=is_pair, other=0.0).to(tl.float32)
            k1 = tl.load(k_ptrs, mask=is_pair, other=0.0).to(tl.float32)
            k2 = tl.load(k_ptrs + half, mask=is_pair, other=0.0).to(tl.float32)
            n1 = x1 * inverse * tl.where(is_query[:, None], q1[None, :], k1[None, :])
            n2 = x2 * inverse * tl.where(is_query[:, None], q2[None, :], k2[None, :])
        angle_ptrs = cos_sin_ptr + position * cos_sin_stride + pairs
        cos = tl.load(angle_ptrs, mask=is_pair, other=0.0)[None, :]
        sin = tl.load(angle_ptrs + half, mask=is_pair, other=0.0)[None, :]
        # Which product is rounded is written out: attention that rotates has to give these bits.
        y1 = tl.where(is_rotary[:, None], tl.fma(n2, -sin, n1 * cos), x1)
        y2 = tl.where(is_rotary[:, None], tl.fma(n1, sin, n2 * cos), x2)
        y1, y2 = y1.to(qkv_ptr.dtype.element_ty), y2.to(qkv_ptr.dtype.element_ty)

        query_ptrs = out_ptr + token * out_stride + heads[:, None] * out_head_stride
        query_ptrs += pairs[None, :]
        to_query = inside & is_query[:, None]
        tl.store(query_ptrs, y1, mask=to_query)
        tl.store(query_ptrs + half, y2, mask=to_query)

        kv_heads = heads - tl.where(is_rotary, NUM_HEADS, NUM_HEADS + NUM_KV_HEADS)
        kv_heads = kv_heads.to(tl.int64)
        slot_ptr = kv_ptr + block.to(tl.int64) * block_stride
        slot_ptr += (position % BLOCK_TOKENS) * slot_stride
        pool_ptrs = slot_ptr + kv_heads[:, None] * head_stride + pairs[None, :]
        pool_ptrs += tl.where(is_rotary, 0, 1)[:, None] * value_stride
        to_pool = inside & (heads >= NUM_HEADS)[:, None]
        tl.store(pool_ptrs, y1, mask=to_pool)
        tl.store(pool_ptrs + half, y2, mask=to_pool)


def rope_kv_write_triton(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    row_of_token: torch.Tensor,
    tables: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    *,
    num_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
    launch_early: bool = False,
) -> torch.Tensor:
    """Write the tokens' keys and values into layer `layer` of the pool; return the rotated queries
    [T, num_heads, head_dim].

    cos_sin: of `rope_cos_sin`. positions: int32 or int64 [T], tokens of the sequence ahead of each.
    row_of_token: int32 or int64 [T], the row of `tables`, int32 [R, columns], that holds the
    token's sequence. A token of row -1, or of a position past the columns or past `cos_sin`, does
    nothing: neither its queries nor the pool are written.

    out: where the queries go, [T, num_heads, head_dim]; None: into qkv, of which the result is
    then a view. launch_early: overlap with the end of the kernel ahead (programmatic dependent
    launch, Hopper and later).
    """
    num_kv_heads, block_tokens, head_dim = kv.shape[2], kv.shape[4], kv.shape[5]
    all_heads = num_heads + 2 * num_kv_heads
    num_tokens = qkv.shape[0]
    _check(qkv, kv, layer, [num_tokens, all_heads * head_dim])
    _check_indices(num_tokens, positions, row_of_token, tables)
    check_rotation(head_dim, cos_sin, q_norm, k_norm)
    if out is None:
        out = qkv[:, : num_heads * head_dim].view(num_tokens, num_heads, head_dim)
    elif (
        list(out.shape) != [num_tokens, num_heads, head_dim]
        or out.dtype != qkv.dtype
        or out.stride(2) != 1
    ):
        raise ValueError(
            f"out must be {qkv.dtype} [{num_tokens}, {num_heads}, {head_dim}] with contiguous "
            f"heads, got {out.dtype} {list(out.shape)} of strides {list(out.stride())}"
        )
    if tile is None:
        tile = choose_tile(num_tokens, head_dim)
    if num_tokens:
        plane = kv.select(1, layer)
        options = {"launch_pdl": True} if launch_early else {}
        launch(_rope_kv_write_kernel, (num_tokens, triton.cdiv(all_heads, tile.num_heads)))(
            qkv,
            out,
            cos_sin,
            positions,
            row_of_token,
            tables,
            plane,
            q_norm,
            k_norm,
            eps,
            min(cos_sin.shape[0], tables.shape[1] * block_tokens),
            qkv.stride(0),
            out.stride(0),
            out.stride(1),
            cos_sin.stride(0),
            tables.stride(0),
            plane.stride(0),
            plane.stride(1),
            plane.stride(2),
            plane.stride(3),
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=head_dim,
            BLOCK_TOKENS=block_tokens,
            NORM=q_norm is not None,
            HEADS=tile.num_heads,
            HALF=triton.next_power_of_2(head_dim // 2),
            LAUNCH_EARLY=launch_early,
            num_warps=tile.num_warps,
            **options,
        )
    return out


def check_rotation(
    head_dim: int,
    cos_sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
) -> None:
    """Raise ValueError for what heads of that size cannot be rotated and normed with."""
    if (
        list(cos_sin.shape[1:]) != [head_dim]
        or cos_sin.dtype is not torch.float32
        or cos_sin.stride(1) != 1
    ):
        raise ValueError(
            f"cos_sin must be float32 [positions, {head_dim}] with contiguous rows, got "
            f"{cos_sin.dtype} {list(cos_sin.shape)} of strides {list(cos_sin.stride())}"
        )
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm go together: got one of them")
    for weight in (q_norm, k_norm):
        if weight is not None and (list(weight.shape) != [head_dim] or weight.stride(0) != 1):
            raise ValueError(
                f"norm weights must be contiguous [{head_dim}], got {list(weight.shape)}"
            )


def _check(qkv: torch.Tensor, kv: torch.Tensor, layer: int, shape: list[int]) -> None:
    if kv.dim() != 6 or kv.shape[3] != 2 or kv.shape[5] % 2 or kv.stride(5) != 1:
        raise ValueError(
            "kv must be [blocks, layers, kv_heads, 2, block_tokens, head_dim] with contiguous "
            f"heads of an even size, got {list(kv.shape)} of strides {list(kv.stride())}"
        )
    if not 0 <= layer < kv.shape[1]:
        raise ValueError(f"layer {layer} is outside the pool of {kv.shape[1]} layers")
    if list(qkv.shape) != shape or qkv.stride(1) != 1:
        raise ValueError(
            f"qkv must be {shape} with contiguous rows, got {list(qkv.shape)} of strides "
            f"{list(qkv.stride())}"
        )
    if qkv.dtype not in DTYPES or qkv.dtype != kv.dtype:
        raise ValueError(
            "qkv and kv must be of one dtype, float32, bfloat16 or float16, got "
            f"{qkv.dtype} and {kv.dtype}"
        )


def _check_indices(
    num_tokens: int,
    positions: torch.Tensor,
    row_of_token: torch.Tensor,
    tables: torch.Tensor,
) -> None:
    for name, indices in (("positions", positions), ("row_of_token", row_of_token)):
        if (
            list(indices.shape) != [num_tokens]
            or indices.dtype not in INDEX_DTYPES
            or not indices.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be contiguous int32 or int64 [{num_tokens}], got {indices.dtype} "
                f"{list(indices.shape)}"
            )
    if tables.dim() != 2 or tables.dtype is not torch.int32 or tables.stride(1) != 1:
        raise ValueError(
            "tables must be int32 [rows, columns] with contiguous rows, got "
            f"{tables.dtype} {list(tables.shape)} of strides "
            f"{list(tables.stride())}"
        )
