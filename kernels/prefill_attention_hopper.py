"""The tiles of `prefill_attention_triton` on Hopper GPUs: keys and values come by bulk copies.

Same formula and same arguments. Triton's own compiler neither copies blocks of a paged pool in bulk
nor lets one step's softmax run beside the next step's product, so this is written in Gluon, where
both are explicit (the scheme is FlashAttention-3's, Shah 2024):

    2 warps                    K0 and V0      K1 and V1      K2 and V2       copies, block by block
    4 warps    rows 0-63       q K0      q K1, P0 V0      q K2, P1 V1        products; softmax of
    4 warps    rows 64-127     q K0      q K1, P0 V0      q K2, P1 V1        q K1 runs beside P0 V0

Programs stay and take one tile after another, so that the next tile's keys arrive while this one
ends: there and back over the table, for even shares of its long and short tiles.

`why_not_specialized` lists what it is not for. Gluon has no interpreter: the tests run the parts as
threads, on a stand-in.
"""

import functools
import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from paceline.kernels.launch import launch
from paceline.kernels.prefill_tiles import TileTable, num_pool_rows, why_not_specialized

ROWS = 64
"""Of half a tile: the least that 4 warps multiply, and all that their registers hold sums of"""
# The copy was renamed between the Triton releases that we run on.
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _tile(  # type: ignore[no-untyped-def]
    index,
    rows,
    NUM_HEAD_TILES: gl.constexpr,
    QUERIES: gl.constexpr,
    BLOCK_N: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """Return where tile `index` lies, in tokens of its row, and its steps [first, last).

    `left` and `right` are as in `prefill_attention_triton`, in steps. No steps: no tile.
    """
    lengths, offsets, entries, num_tiles, _num_turns = rows
    inside = index < num_tiles * NUM_HEAD_TILES
    entry = entries + gl.where(inside, index // NUM_HEAD_TILES, 0) * 2
    row = gl.load(entry)
    first_query = gl.load(entry + 1)
    inside = inside & (row >= 0)
    row = gl.maximum(row, 0)
    offset = gl.load(offsets + row)
    num_new = gl.load(offsets + row + 1) - offset
    length = gl.load(lengths + row)
    inside = inside & (length > 0) & (first_query < num_new)
    start = length - num_new
    last_query = gl.minimum(first_query + QUERIES, num_new) - 1
    low = 0
    left = 0
    end = start + last_query + 1
    right = (start + first_query + 1) // BLOCK_N
    if WINDOW > 0:
        low = gl.maximum(start + first_query + 1 - WINDOW, 0)
        left = gl.minimum(gl.cdiv(gl.maximum(end - WINDOW, 0), BLOCK_N), right)
    first = low // BLOCK_N
    last = gl.where(inside, gl.cdiv(end, BLOCK_N), first)
    return row, offset, start, length, first_query, last_query, low, first, left, right, last


@gluon.jit
def _nth_tile(turn):  # type: ignore[no-untyped-def]
    """Return the tile of this program's turn: there and back over all programs."""
    program = gl.program_id(0)
    num_programs = gl.num_programs(0)
    place = gl.where(turn % 2 == 0, program, num_programs - 1 - program)
    return turn * num_programs + place


@gluon.jit
def _produce(  # type: ignore[no-untyped-def]
    arguments,
    NUM_HEAD_TILES: gl.constexpr,
    SHARERS: gl.constexpr,
    BLOCK_TOKENS: gl.constexpr,
    WINDOW: gl.constexpr,
    QUERIES: gl.constexpr,
):
    """Copy the keys, or the values, of every step of this program's tiles into the ring."""
    copied, first_row, ring = arguments
    pool, tables, table_stride, rows, block_rows, kv_head_rows = copied
    num_turns = rows[4]
    buffers, ready, free = ring
    STAGES: gl.constexpr = buffers.shape[0]
    BLOCK_N: gl.constexpr = buffers.shape[1]
    NUM_BYTES: gl.constexpr = BLOCK_N * buffers.shape[2] * 2
    PIECE: gl.constexpr = pool.block_shape[0]
    step = 0
    for turn in range(num_turns):
        index = _nth_tile(turn)
        row, _, _, length, _, _, low, first, _, _, last = _tile(
            index, rows, NUM_HEAD_TILES, QUERIES, BLOCK_N, WINDOW
        )
        kv_head = index % NUM_HEAD_TILES // SHARERS
        head_row = first_row + kv_head * kv_head_rows
        table = tables + row.to(gl.int64) * table_stride
        for number in range(first, last):
            stage = step % STAGES
            buffer = buffers.index(stage)
            mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(stage), NUM_BYTES)
            for piece in gl.static_range(BLOCK_N // PIECE):
                token = number * BLOCK_N + piece * PIECE
                held = (token < length) & (token + PIECE > low)
                block = gl.load(table + token // BLOCK_TOKENS, mask=held, other=0)
                place = head_row + block * block_rows + token % BLOCK_TOKENS
                # Rows outside the pool arrive as zeros.
                place = gl.where(held, place, -PIECE)
                _copy(pool, [place, 0], ready.index(stage), buffer.slice(piece * PIECE, PIECE))
            step += 1


@gluon.jit
def _soften(  # type: ignore[no-untyped-def]
    scores,
    total,
    top,
    positions,
    base,
    score_scale,
    AFTER: gl.constexpr,
    WINDOW: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Return a step's weights, how much of the sums stays, and the running sum and maximum."""
    if AFTER or WINDOW > 0:
        tokens = base + gl.arange(0, scores.shape[1], gl.SliceLayout(0, LAYOUT))
        ahead = positions[:, None] - tokens[None, :]
        if AFTER:
            scores = gl.where(ahead >= 0, scores, -float("inf"))
        if WINDOW > 0:
            scores = gl.where(ahead < WINDOW, scores, -float("inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * score_scale)
    weights = gl.exp2(scores * score_scale - new_top[:, None])
    kept = gl.exp2(top - new_top)
    return weights, kept, total * kept + gl.sum(weights, 1), new_top


@gluon.jit
def _steps(  # type: ignore[no-untyped-def]
    running,
    begin,
    stop,
    inputs,
    PART: gl.constexpr,
    WINDOW: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr,
):
    """Add steps begin to stop: those at the window's edge, whole ones, or those of the diagonal.

    A turn multiplies queries and keys of its step, and weights and values of the step before.
    """
    sums, weights, total, top, step = running
    q_buffer, positions, score_scale, key_ring, value_ring = inputs
    keys, k_ready, k_free = key_ring
    values, v_ready, v_free = value_ring
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    ROWS: gl.constexpr = q_buffer.shape[0]
    HIDING: gl.constexpr = 0 if PART == 1 else WINDOW
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    for number in range(begin, stop):
        step += 1
        stage = step % STAGES
        mbarrier.wait(k_ready.index(stage), (step // STAGES) & 1)
        k = keys.index(stage).permute((1, 0))
        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
        scores = warpgroup_mma(q_buffer, k, zeros, use_acc=False, is_async=True)
        old_stage = (step - 1) % STAGES
        old_phase = ((step - 1) // STAGES) & 1
        mbarrier.wait(v_ready.index(old_stage), old_phase)
        sums = warpgroup_mma(weights, values.index(old_stage), sums, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_free.index(stage))
        base = number * BLOCK_N
        new_weights, kept, total, top = _soften(
            scores, total, top, positions, base, score_scale, PART == 2, HIDING, S_LAYOUT
        )
        new_weights = gl.convert_layout(new_weights.to(values.dtype), P_LAYOUT)
        # Returns at once. The assembler moves the wait for a product ahead of the softmax, but not
        # over a branch, such as is in this.
        mbarrier.wait(v_ready.index(old_stage), old_phase)
        sums, weights = warpgroup_mma_wait(0, deps=[sums, new_weights])
        mbarrier.arrive(v_free.index(old_stage))
        sums = sums * gl.convert_layout(kept, gl.SliceLayout(1, O_LAYOUT))[:, None]
    return sums, weights, total, top, step


@gluon.jit
def _consume(  # type: ignore[no-untyped-def]
    HALF: gl.constexpr,
    arguments,
    HEADS: gl.constexpr,
    NUM_HEAD_TILES: gl.constexpr,
    WINDOW: gl.constexpr,
):
    """Attend with one half of the rows of each of this program's tiles."""
    pool, q, out, strides, rows, score_scale, queries, key_ring, value_ring = arguments
    q_token_stride, q_head_stride, out_token_stride, out_head_stride = strides
    num_turns = rows[4]
    keys, k_ready, k_free = key_ring
    values, v_ready, v_free = value_ring
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    HEAD_DIM: gl.constexpr = keys.shape[2]
    PIECE: gl.constexpr = pool.block_shape[0]
    ROWS: gl.constexpr = queries.shape[1]
    QUERIES: gl.constexpr = 2 * ROWS // HEADS
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    q_buffer = queries.index(HALF)
    step = 0
    for turn in range(num_turns):
        index = _nth_tile(turn)
        _, offset, start, length, first_query, last_query, _, first, left, right, last = _tile(
            index, rows, NUM_HEAD_TILES, QUERIES, BLOCK_N, WINDOW
        )
        if first < last:
            # Places of the tile that no query fills repeat the last one, and are not stored.
            places = HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))
            columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, WIDE))
            heads = (index % NUM_HEAD_TILES) * HEADS + places % HEADS
            stored = first_query + places // HEADS <= last_query
            tokens = offset.to(gl.int64) + gl.minimum(first_query + places // HEADS, last_query)
            q_places = tokens * q_token_stride + heads * q_head_stride
            q_buffer.store(gl.load(q + q_places[:, None] + columns[None, :]))
            fence_async_shared()

            places = HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
            positions = start + gl.minimum(first_query + places // HEADS, last_query)
            stage = step % STAGES
            mbarrier.wait(k_ready.index(stage), (step // STAGES) & 1)
            k = keys.index(stage).permute((1, 0))
            zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
            scores = warpgroup_mma(q_buffer, k, zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_free.index(stage))
            # Finite, so that a query that this step shows nothing does not subtract infinities.
            top = gl.full([ROWS], -3.0e38, gl.float32, gl.SliceLayout(1, S_LAYOUT))
            total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S_LAYOUT))
            weights, _kept, total, top = _soften(
                scores, total, top, positions, first * BLOCK_N, score_scale, True, WINDOW, S_LAYOUT
            )
            weights = gl.convert_layout(weights.to(values.dtype), P_LAYOUT)
            sums = gl.zeros([ROWS, HEAD_DIM], gl.float32, O_LAYOUT)
            inputs = (q_buffer, positions, score_scale, key_ring, value_ring)
            for part in gl.static_range(3):
                begin, stop = gl.maximum(first + 1, right), last
                if part == 0:
                    begin, stop = first + 1, left
                elif part == 1:
                    begin, stop = gl.maximum(first + 1, left), right
                if part > 0 or WINDOW > 0:
                    running = (sums, weights, total, top, step)
                    sums, weights, total, top, step = _steps(
                        running, begin, stop, inputs, part, WINDOW, S_LAYOUT, O_LAYOUT
                    )

            stage = step % STAGES
            mbarrier.wait(v_ready.index(stage), (step // STAGES) & 1)
            step += 1
            v_buffer = values.index(stage)
            # The block that the row ends in may hold anything behind it, NaN too, which a weight of
            # 0 would not hide. Both halves write the same zeros.
            for piece in gl.static_range(BLOCK_N // PIECE):
                token = (last - 1) * BLOCK_N + piece * PIECE
                if (token < length) & (length < token + PIECE):
                    v_piece = v_buffer.slice(piece * PIECE, PIECE)
                    held = token + gl.arange(0, PIECE, gl.SliceLayout(1, WIDE)) < length
                    loaded = v_piece.load(WIDE)
                    v_piece.store(gl.where(held[:, None], loaded, gl.zeros_like(loaded)))
                    fence_async_shared()
            sums = warpgroup_mma(weights, v_buffer, sums, is_async=True)
            sums = warpgroup_mma_wait(0, deps=[sums])
            mbarrier.arrive(v_free.index(stage))

            sums = sums / gl.convert_layout(total, gl.SliceLayout(1, O_LAYOUT))[:, None]
            result = gl.convert_layout(sums.to(out.dtype.element_ty), WIDE)
            out_places = tokens * out_token_stride + heads * out_head_stride
            gl.store(out + out_places[:, None] + columns[None, :], result, mask=stored[:, None])


@gluon.jit
def _ring(  # type: ignore[no-untyped-def]
    dtype: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr
):
    """Return buffers, and barriers that say which are full, and which both halves have read."""
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], SHARED)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    return buffers, ready, free


@gluon.jit(
    do_not_specialize=["num_tiles", "num_turns", "first_row"],
    do_not_specialize_on_alignment=["tables", "lengths", "offsets", "entries"],
)
def _prefill_attention_hopper_kernel(  # type: ignore[no-untyped-def]
    q,
    pool,
    out,
    tables,
    lengths,
    offsets,
    entries,
    num_tiles,
    num_turns,
    score_scale,
    q_token_stride,
    q_head_stride,
    first_row,
    value_row,
    block_rows,
    kv_head_rows,
    out_token_stride,
    out_head_stride,
    table_stride,
    HEADS: gl.constexpr,
    NUM_HEAD_TILES: gl.constexpr,
    SHARERS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_TOKENS: gl.constexpr,
    WINDOW: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    dtype: gl.constexpr = q.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    queries = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], SHARED)
    key_ring = _ring(dtype, STAGES, BLOCK_N, HEAD_DIM)
    value_ring = _ring(dtype, STAGES, BLOCK_N, HEAD_DIM)
    fence_async_shared()
    rows = (lengths, offsets, entries, num_tiles, num_turns)
    strides = (q_token_stride, q_head_stride, out_token_stride, out_head_stride)
    consumer = (pool, q, out, strides, rows, score_scale, queries, key_ring, value_ring)
    copied = (pool, tables, table_stride, rows, block_rows, kv_head_rows)
    k_work = (copied, first_row, key_ring)
    v_work = (copied, first_row + value_row, value_ring)
    QUERIES: gl.constexpr = 2 * ROWS // HEADS
    gl.warp_specialize(
        [
            (_consume, (0, consumer, HEADS, NUM_HEAD_TILES, WINDOW)),
            (_consume, (1, consumer, HEADS, NUM_HEAD_TILES, WINDOW)),
            (_produce, (k_work, NUM_HEAD_TILES, SHARERS, BLOCK_TOKENS, WINDOW, QUERIES)),
            (_produce, (v_work, NUM_HEAD_TILES, SHARERS, BLOCK_TOKENS, WINDOW, QUERIES)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )


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
    reason = why_not_specialized(kv)
    if reason is not None or tiles.block_m != 2 * ROWS:
        raise ValueError(
            f"{reason or f'tiles have {tiles.block_m} rows, not {2 * ROWS}'}: choose other tiles"
        )
    num_heads, head_dim = q.shape[1:]
    block_tokens, token_stride = kv.shape[4], kv.stride(4)
    block_rows, layer_rows, kv_head_rows, value_row = (
        kv.stride(dim) // token_stride for dim in range(4)
    )
    piece = min(block_tokens, tiles.block_n)
    pool = TensorDescriptor(
        kv,
        [num_pool_rows(kv), head_dim],
        [token_stride, 1],
        [piece, head_dim],
        gl.NVMMASharedLayout(128, 16, 2),
    )
    num_head_tiles = num_heads // tiles.heads_per_tile
    total = entries.shape[0] * num_head_tiles
    num_programs = min(_num_sms(q.device), total)
    launch(_prefill_attention_hopper_kernel, (num_programs,))(
        q,
        pool,
        out,
        tables,
        lengths,
        offsets,
        entries,
        entries.shape[0],
        triton.cdiv(total, num_programs),
        scale * math.log2(math.e),
        *q.stride()[:2],
        layer * layer_rows,
        value_row,
        block_rows,
        kv_head_rows,
        *out.stride()[:2],
        tables.stride(0),
        HEADS=tiles.heads_per_tile,
        NUM_HEAD_TILES=num_head_tiles,
        SHARERS=num_head_tiles // kv.shape[2],
        HEAD_DIM=head_dim,
        BLOCK_TOKENS=block_tokens,
        WINDOW=window or 0,
        ROWS=ROWS,
        BLOCK_N=tiles.block_n,
        STAGES=tiles.num_stages,
        num_warps=4,
    )


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
