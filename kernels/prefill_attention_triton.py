"""Causal attention of chunks of new tokens over their paged contexts, on a GPU (prefill).

    y[i] = softmax(q[i] K[low : start + i + 1]^T scale) V[low : start + i + 1]    i = 0 .. n - 1
    low = max(0, start + i + 1 - window), or 0

    q, y [T, num_heads, head_dim]: the new tokens of all rows, one row after the other
    pool kv [blocks, layers, kv_heads, 2, block_tokens, head_dim]; float32, float16 or bfloat16

Row r has `lengths[r]` tokens of context. The last `offsets[r + 1] - offsets[r]` of them are new,
and start counts the others: earlier chunks, or a cached prefix. The keys and values of all of them
are in the pool already, in blocks `tables[r]`.

Softmax by a running maximum and sum, in float32 (FlashAttention-2, Dao 2023); weights are rounded
to the pool's dtype before they multiply V. float32 products are IEEE's, not TF32.

A program takes a tile: some queries of one row, of one query head, or of several that share a
key-value head (heads vary fastest within the tile). It walks over keys in up to three loops, so
that only the edges pay for masks, and blocks outside the window are never touched:

    keys      low          left             right       end
    query 0    |##########|################|#           |
    query 1    | #########|################|#####       |
    query 2    |   #######|################|##########  |
                  window         whole         diagonal

Which program takes which tile is a table that the host makes from the step's plan (see
`prefill_tiles`), with the tiles that see most keys first. Everything else about the rows is read
on the device. Specialised tiles are taken by `prefill_attention_hopper` instead.
"""

import math

import torch
import triton
import triton.language as tl

from paceline.kernels.launch import launch
from paceline.kernels.prefill_tiles import PrefillTiles, TileTable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def prefill_attention_triton(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    offsets: torch.Tensor,
    tile_table: TileTable,
    scale: float,
    *,
    window: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention output [T, num_heads, head_dim] in q's dtype.

    q and kv may have any strides, but elements of a head lie beside each other. tables: int32
    [R, columns] block ids, of which those of the context are read; lengths: int32 [R] tokens of
    the context, the new ones included; offsets: int32 [R + 1] first token of each row among the T.
    All on q's device, as is the table of tiles.

    Nothing is written for tokens that no tile covers, nor for rows of length 0. Raises ValueError
    for what the kernel cannot do.
    """
    _check(q, kv, layer, scale, window)
    _check_rows(tables, lengths, offsets)
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.shape != q.shape or out.dtype != q.dtype or out.stride(2) != 1:
        raise ValueError(
            f"out must be {q.dtype} {list(q.shape)} with elements of a head beside each other, got "
            f"{out.dtype} {list(out.shape)} of strides {out.stride()}"
        )
    tiles, entries = tile_table
    num_heads, head_dim = q.shape[1], q.shape[2]
    _check_tiles(tiles, entries, num_heads, kv.shape[2])
    num_tiles = entries.shape[0]
    if num_tiles == 0:
        return out
    if tiles.specialized:
        # Gluon, which not every Triton has, is asked for only where it runs.
        from paceline.kernels.prefill_attention_hopper import launch_prefill_attention_hopper

        launch_prefill_attention_hopper(
            q, kv, layer, tables, lengths, offsets, tile_table, scale, window=window, out=out
        )
        return out
    num_head_tiles = num_heads // tiles.heads_per_tile
    grid = (tiles.heads_at_once, num_tiles, num_head_tiles // tiles.heads_at_once)
    launch(_prefill_attention_kernel, grid)(
        q,
        kv[:, layer, :, 0],
        kv[:, layer, :, 1],
        out,
        tables,
        lengths,
        offsets,
        entries,
        scale * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        kv.stride(0),
        kv.stride(2),
        kv.stride(4),
        out.stride(0),
        out.stride(1),
        tables.stride(0),
        GROUP=num_heads // kv.shape[2],
        HEADS=tiles.heads_per_tile,
        HEAD_DIM=head_dim,
        BLOCK_TOKENS=kv.shape[4],
        WINDOW=window,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        # On a CPU: the interpreter's product takes the bits of bfloat16 for integers.
        WIDEN=q.is_cpu and q.dtype == torch.bfloat16,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out


def _check(q: torch.Tensor, kv: torch.Tensor, layer: int, scale: float, window: int | None) -> None:
    if q.dim() != 3 or kv.dim() != 6 or kv.shape[3] != 2 or q.shape[2] != kv.shape[5]:
        raise ValueError(
            f"q {list(q.shape)} and kv {list(kv.shape)} must be [T, heads, head_dim] and [blocks, "
            f"layers, kv_heads, 2, block_tokens, head_dim]"
        )
    if q.dtype not in DTYPES or kv.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype} and kv {kv.dtype}; both must be the same of {DTYPES}")
    if q.stride(2) != 1 or kv.stride(5) != 1:
        raise ValueError(
            f"elements of a head must lie beside each other; the strides are {q.stride()} of q and "
            f"{kv.stride()} of kv"
        )
    num_heads, head_dim = q.shape[1:]
    if num_heads % kv.shape[2]:
        raise ValueError(f"{num_heads} query heads cannot share {kv.shape[2]} key-value heads")
    if head_dim > 256 or head_dim % 8:
        raise ValueError(f"head_dim is {head_dim}; it must be a multiple of 8, up to 256")
    if not 0 <= layer < kv.shape[1]:
        raise ValueError(f"layer {layer} is not one of the pool's {kv.shape[1]}")
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be above 0")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1")


def _check_rows(tables: torch.Tensor, lengths: torch.Tensor, offsets: torch.Tensor) -> None:
    num_rows = lengths.shape[0]
    if tables.dim() != 2 or tables.shape[0] != num_rows or offsets.shape != (num_rows + 1,):
        raise ValueError(
            f"tables {list(tables.shape)}, lengths {list(lengths.shape)} and offsets "
            f"{list(offsets.shape)} must be [R, columns], [R] and [R + 1]"
        )
    if not tables.dtype == lengths.dtype == offsets.dtype == torch.int32:
        raise ValueError(
            f"tables, lengths and offsets must be int32, got {tables.dtype}, {lengths.dtype} and "
            f"{offsets.dtype}"
        )
    if tables.stride(1) != 1 or not (lengths.is_contiguous() and offsets.is_contiguous()):
        raise ValueError(
            f"entries must lie beside each other; the strides are {tables.stride()} of tables, "
            f"{lengths.stride()} of lengths and {offsets.stride()} of offsets"
        )


def _check_tiles(
    tiles: PrefillTiles, entries: torch.Tensor, num_heads: int, num_kv_heads: int
) -> None:
    if entries.dim() != 2 or entries.shape[1] != 2 or entries.dtype != torch.int32:
        raise ValueError(
            f"the table of tiles must be int32 [N, 2], got {entries.dtype} {list(entries.shape)}"
        )
    if not entries.is_contiguous():
        raise ValueError(
            f"the table of tiles has strides {entries.stride()}; it must be contiguous"
        )
    group = num_heads // num_kv_heads
    if group % tiles.heads_per_tile or tiles.block_m < tiles.heads_per_tile:
        raise ValueError(
            f"tiles of {tiles.block_m} rows and {tiles.heads_per_tile} heads cannot cover groups "
            f"of {group} query heads"
        )
    if (num_heads // tiles.heads_per_tile) % tiles.heads_at_once:
        raise ValueError(
            f"{num_heads // tiles.heads_per_tile} head tiles cannot be launched "
            f"{tiles.heads_at_once} at a time"
        )


@triton.jit
def _load_rows(places, rows_inside, MASK_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load rows [n, BLOCK_D]; 0 past HEAD_DIM and, with MASK_ROWS, where `rows_inside` is false.

    The pool's unused places may hold anything, NaN too, which a weight of 0 would not hide.
    """
    BLOCK_D: tl.constexpr = places.shape[1]
    columns_inside = (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    if MASK_ROWS:
        if BLOCK_D == HEAD_DIM:
            loaded = tl.load(places, mask=rows_inside[:, None], other=0.0)
        else:
            loaded = tl.load(places, mask=rows_inside[:, None] & columns_inside, other=0.0)
    elif BLOCK_D == HEAD_DIM:
        loaded = tl.load(places)
    else:
        loaded = tl.load(places, mask=columns_inside, other=0.0)
    return loaded


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    sums,
    total,
    top,
    q,
    keys,
    values,
    table,
    positions,
    first,
    last,
    low,
    end,
    score_scale,
    block_stride,
    token_stride,
    AFTER: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Add keys first to last, in steps of BLOCK_N, to the running softmax of a tile.

    AFTER: some keys lie after some queries. WINDOW: the window, where it hides some of them. With
    either, only keys from low to end are read.
    """
    MASK: tl.constexpr = AFTER or WINDOW is not None
    BLOCK_D: tl.constexpr = q.shape[1]
    columns = tl.arange(0, BLOCK_D)
    for base in range(first, last, BLOCK_N):
        base = tl.multiple_of(base, BLOCK_N)
        tokens = base + tl.arange(0, BLOCK_N)
        inside = (tokens >= low) & (tokens < end)
        if MASK:
            blocks = tl.load(table + tokens // BLOCK_TOKENS, mask=inside, other=0)
        else:
            blocks = tl.load(table + tokens // BLOCK_TOKENS)
        places = blocks.to(tl.int64) * block_stride + (tokens % BLOCK_TOKENS) * token_stride
        places = places[:, None] + columns[None, :]
        k = _load_rows(keys + places, inside, MASK, HEAD_DIM)
        if WIDEN:
            k = k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASK:
            seen = inside[None, :]
            if AFTER:
                seen = seen & (tokens[None, :] <= positions[:, None])
            if WINDOW is not None:
                seen = seen & (tokens[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * score_scale)
        weights = tl.exp2(scores * score_scale - new_top[:, None])
        kept = tl.exp2(top - new_top)
        total = total * kept + tl.sum(weights, 1)
        top = new_top
        v = _load_rows(values + places, inside, MASK, HEAD_DIM)
        weights = weights.to(v.dtype)
        if WIDEN:
            weights = weights.to(tl.float32)
            v = v.to(tl.float32)
        sums = tl.dot(weights, v, sums * kept[:, None], input_precision="ieee")
    return sums, total, top


# Small arrays may lie anywhere in one buffer: where they begin must not choose another kernel.
@triton.jit(do_not_specialize_on_alignment=["tables", "lengths", "offsets", "entries"])
def _prefill_attention_kernel(  # type: ignore[no-untyped-def]
    q,
    keys,
    values,
    out,
    tables,
    lengths,
    offsets,
    entries,
    score_scale,
    q_token_stride,
    q_head_stride,
    block_stride,
    kv_head_stride,
    token_stride,
    out_token_stride,
    out_head_stride,
    table_stride,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A program: one tile of queries, of HEADS query heads. score_scale: scale * log2(e)."""
    QUERIES: tl.constexpr = BLOCK_M // HEADS
    entry = entries + tl.program_id(1) * 2
    row = tl.load(entry)
    if row < 0:
        return
    first_query = tl.load(entry + 1)
    offset = tl.load(offsets + row)
    num_new = tl.load(offsets + row + 1) - offset
    length = tl.load(lengths + row)
    if (length == 0) | (first_query >= num_new):
        return
    first_head = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * HEADS

    # Places of the tile that no query fills repeat the last one, and are not stored.
    start = length - num_new
    last_query = tl.minimum(first_query + QUERIES, num_new) - 1
    places = tl.arange(0, BLOCK_M)
    queries = tl.minimum(first_query + places // HEADS, last_query)
    stored = first_query + places // HEADS <= last_query
    heads = first_head + places % HEADS
    positions = start + queries
    columns = tl.arange(0, BLOCK_D)
    tokens = (offset + queries).to(tl.int64)
    q_places = tokens * q_token_stride + heads * q_head_stride
    q_tile = _load_rows(q + q_places[:, None] + columns[None, :], stored, False, HEAD_DIM)
    if WIDEN:
        q_tile = q_tile.to(tl.float32)

    kv_head = (first_head // GROUP).to(tl.int64) * kv_head_stride
    keys += kv_head
    values += kv_head
    table = tables + row.to(tl.int64) * table_stride

    # Keys: [low, left) that the window hides from some queries, [left, right) that all see,
    # [right, end) on the diagonal. Steps begin at multiples of BLOCK_N.
    low = 0
    left = 0
    end = start + last_query + 1
    right = (start + first_query + 1) // BLOCK_N * BLOCK_N
    if WINDOW is not None:
        low = tl.maximum(start + first_query + 1 - WINDOW, 0)
        left = tl.cdiv(tl.maximum(end - WINDOW, 0), BLOCK_N) * BLOCK_N
        left = tl.minimum(left, right)

    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # Finite, so that a query to which the first step shows nothing does not subtract infinities.
    top = tl.full((BLOCK_M,), -3.0e38, tl.float32)
    for part in tl.static_range(3):
        first, last = right, end
        if part == 0:
            first, last = low // BLOCK_N * BLOCK_N, left
        elif part == 1:
            first, last = left, right
        if part > 0 or WINDOW is not None:
            sums, total, top = _attend(
                sums,
                total,
                top,
                q_tile,
                keys,
                values,
                table,
                positions,
                first,
                last,
                low,
                end,
                score_scale,
                block_stride,
                token_stride,
                part == 2,
                None if part == 1 else WINDOW,
                HEAD_DIM,
                BLOCK_TOKENS,
                BLOCK_N,
                WIDEN,
            )

    sums = sums / total[:, None]
    out_places = tokens * out_token_stride + heads * out_head_stride
    tl.store(
        out + out_places[:, None] + columns[None, :],
        sums.to(out.dtype.element_ty),
        mask=stored[:, None] & (columns < HEAD_DIM)[None, :],
    )
