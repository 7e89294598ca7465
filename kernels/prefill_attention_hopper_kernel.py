"""The kernel of `prefill_attention_hopper`: what its programs copy, and what they multiply.

    2 warps                    K0 and V0      K1 and V1      K2 and V2       copies, block by block
    4 warps    rows 0-63       q K0      q K1, P0 V0      q K2, P1 V1        products; softmax of
    4 warps    rows 64-127     q K0      q K1, P0 V0      q K2, P1 V1        q K1 runs beside P0 V0

Programs stay and take one tile after another, so that the next tile's keys arrive while this one
ends: there and back over the table, for even shares of its long and short tiles.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from paceline.kernels.prefill_attention_hopper_step import add_steps, soften

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
            weights, _kept, total, top = soften(
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
                    sums, weights, total, top, step = add_steps(
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
def prefill_attention_hopper_kernel(  # type: ignore[no-untyped-def]
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
