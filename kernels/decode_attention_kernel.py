"""Attention of each row's newest tokens over its paged context, on a GPU (decode, verification).

    y[r, t, h] = softmax(q[r, t, h] K_r[:e]^T scale) V_r[:e]        e = lengths[r] - T + 1 + t
    q, y [R, T, num_heads, head_dim], T the same for all rows: 1, or 1 + drafts to be verified
    pool kv [blocks, layers, kv_heads, 2, block_tokens, head_dim], at any strides
    tables int32 [R, columns] of block ids, lengths int32 [R], the new tokens included

float32 (IEEE products), bfloat16 or float16; sums in float32. With a window, token e - 1 sees
itself and the window - 1 before it. A row of length 0 pads the batch: nothing of it is read or
written. A query before the start of its sequence (length < T) gives 0. Reference:
kernels.decode_attention.

One program would read a long context alone while the other multiprocessors wait, so contexts are
split (flash-decoding: Dao, Haziza, Massa and Sizov, 2023), each part with a running softmax
(Milakov and Gimelshein, 2018):

    programs (kv head, row, split)        queries of the kv head: a tile [T * group, head_dim]
      row 0  |split 0|split 1|split 2|    keys: tiles of `block_n` tokens, each token's block id
      row 1  |sp 0|sp 1|sp 2|             looked up in the table, so a tile spans any blocks
      row 2  |0|                          short rows leave their later programs without work
    the last of a tile's splits to end:   y = sum(2^(s_i - m) y_i) / sum(2^(s_i - m)), m = max(s_i)

where y_i is the softmax over split i alone and s_i the log2 of its sum. Splits are added in their
order, whichever ends last, so that a call always gives the same bits. How a row is cut follows from
its length on the device: a captured launch stays right while contexts grow.

With T = 1 the same launch can also do what kernels.rope_kv_write_triton does ahead of it, to the
same bits but for the sums of squares of its norm: each program rotates the queries that it takes,
and the one whose split ends the row rotates the new key and writes key and value to the pool before
it reads its split.
"""

import triton
import triton.language as tl

from paceline.kernels.prefetch_triton import prefetch_l2


@triton.jit
def _cut(  # type: ignore[no-untyped-def]
    length,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """Return the first token that any query of the row sees, and the tokens of a split."""
    low = length * 0
    if WINDOW is not None:
        low = tl.maximum(length - TOKENS + 1 - WINDOW, 0)
    num_tiles = tl.cdiv(length - low, BLOCK_N)
    return low, tl.maximum(tl.cdiv(num_tiles, SPLITS), MIN_TILES) * BLOCK_N


@triton.jit
def _prefetch_tokens(  # type: ignore[no-untyped-def]
    head_ptr,
    table_ptr,
    begin,
    end,
    kv_block,
    kv_plane,
    kv_token,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Have the first tokens' keys and values fetched, if there are any from begin to end."""
    if begin < end:
        position = tl.minimum(begin + tl.arange(0, BLOCK_N), end - 1)
        # Tables, too, are older than any kernel that may still run.
        block = tl.load(table_ptr + position // BLOCK_TOKENS, cache_modifier=".cg")
        token_ptrs = head_ptr + block.to(tl.int64) * kv_block
        token_ptrs += (position % BLOCK_TOKENS) * kv_token
        line: tl.constexpr = 1024 // head_ptr.dtype.element_ty.primitive_bitwidth
        for number in tl.static_range((HEAD_DIM + line - 1) // line):
            prefetch_l2(token_ptrs + number * line)
            prefetch_l2(token_ptrs + kv_plane + number * line)


@triton.jit
def _rotate(x, swapped, dim, norm_ptr, eps, cos, sin, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Norm heads [M, D], if there is a weight, and rotate them; `swapped` has their halves swapped.

    cos, sin: [1, D], sin with its first half negated.
    """
    y, swapped_y = x.to(tl.float32), swapped.to(tl.float32)
    if norm_ptr is not None:
        inverse = tl.rsqrt(tl.sum(y * y, axis=1) / HEAD_DIM + eps)[:, None]
        exists = dim < HEAD_DIM
        weight = tl.load(norm_ptr + dim, mask=exists, other=0.0)
        swapped_weight = tl.load(norm_ptr + _swap(dim, HEAD_DIM), mask=exists, other=0.0)
        y = y * inverse * weight.to(tl.float32)[None, :]
        swapped_y = swapped_y * inverse * swapped_weight.to(tl.float32)[None, :]
    return tl.fma(swapped_y, sin, y * cos).to(x.dtype)


@triton.jit
def _swap(dim, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return for each element of a head the one that it is rotated with."""
    return tl.where(dim < HEAD_DIM // 2, dim + HEAD_DIM // 2, dim - HEAD_DIM // 2)


@triton.jit
def _put_split(  # type: ignore[no-untyped-def]
    values,
    log_sum,
    query,
    split,
    num_used,
    partials_ptr,
    log_sums_ptr,
    counter_ptr,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write a split's results; return whether every other split's can be read."""
    dim = tl.arange(0, BLOCK_D)
    place = split * QUERIES + query
    wanted = (query < QUERIES)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(partials_ptr + place[:, None] * HEAD_DIM + dim[None, :], values, mask=wanted)
    tl.store(log_sums_ptr + place, log_sum, mask=query < QUERIES)
    # All threads have stored before one of them tells the other splits.
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_used - 1
    if is_last:
        tl.debug_barrier()
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    partials_ptr,
    log_sums_ptr,
    query,
    num_used,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
):
    """Return the output of the queries, from what their splits wrote, STEP splits at a time."""
    dim = tl.arange(0, BLOCK_D)
    top = tl.full(query.shape, float("-inf"), tl.float32)
    total = tl.zeros(query.shape, tl.float32)
    values = tl.zeros([query.shape[0], BLOCK_D], tl.float32)
    for start in range(0, num_used, STEP):
        # Splits in the middle: Triton 3.6 gives warps the first dimension, so that each adds alone.
        split = start + tl.arange(0, STEP)
        used = (query < QUERIES)[:, None] & (split < num_used)[None, :]
        place = query[:, None] + split[None, :] * QUERIES
        # .cg: other multiprocessors wrote these, and the L1 cache would not know.
        log_sums = tl.load(
            log_sums_ptr + place, mask=used, other=float("-inf"), cache_modifier=".cg"
        )
        parts = tl.load(
            partials_ptr + place[:, :, None] * HEAD_DIM + dim[None, None, :],
            mask=used[:, :, None] & (dim < HEAD_DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(log_sums, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(log_sums - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        values = values * shrink[:, None] + tl.sum(weights[:, :, None] * parts, 1)
        top = new_top
    return values / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit(do_not_specialize=["num_positions"])
def attend_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    kv_ptr,
    tables_ptr,
    lengths_ptr,
    out_ptr,
    partials_ptr,
    log_sums_ptr,
    counters_ptr,
    cos_sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    num_positions,
    cos_sin_row,
    scale_log2,
    num_kv_heads,
    q_row,
    q_token,
    q_head,
    out_row,
    out_token,
    out_head,
    kv_block,
    kv_head_stride,
    kv_plane,
    kv_token,
    table_row,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGE_M: tl.constexpr,
    MERGE_STEP: tl.constexpr,
    WIDEN: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """A program: up to BLOCK_M queries of one kv head of a row, one split of its context.

    With cos_sin_ptr, q holds queries, keys and values that are to be rotated and written first.
    """
    QUERIES: tl.constexpr = TOKENS * GROUP
    M_TILES: tl.constexpr = (QUERIES + BLOCK_M - 1) // BLOCK_M
    kv_head = tl.program_id(0) // M_TILES
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    if LAUNCH_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    # .cg: read ahead of the wait, so that the L1 cache might still hold an earlier step's length.
    length = tl.load(lengths_ptr + row, cache_modifier=".cg")
    low, split_tokens = _cut(length, TOKENS, WINDOW, BLOCK_N, SPLITS, MIN_TILES)
    num_used = tl.cdiv(length - low, split_tokens)
    begin = low + split * split_tokens
    end = tl.minimum(begin + split_tokens, length)
    has_work = begin < length  # of a row of length 0, no split has
    dim = tl.arange(0, BLOCK_D)
    if cos_sin_ptr is not None:
        has_work = has_work & (length <= num_positions)
        angle_ptrs = cos_sin_ptr + (length - 1).to(tl.int64) * cos_sin_row + dim % (HEAD_DIM // 2)
        rotates = dim < tl.where(has_work, HEAD_DIM, 0)
        cos = tl.load(angle_ptrs, mask=rotates, other=0.0)[None, :]
        sin = tl.load(angle_ptrs + HEAD_DIM // 2, mask=rotates, other=0.0)
        sin = tl.where(dim < HEAD_DIM // 2, -sin, sin)[None, :]
    table_ptr = tables_ptr + row * table_row
    head_ptr = kv_ptr + kv_head.to(tl.int64) * kv_head_stride
    if PREFETCH:
        _prefetch_tokens(
            head_ptr,
            table_ptr,
            begin,
            tl.where(has_work, end, begin),
            kv_block,
            kv_plane,
            kv_token,
            HEAD_DIM,
            BLOCK_TOKENS,
            BLOCK_N,
        )
    if LAUNCH_EARLY:
        # Ahead of every return: the kernels behind take this one's end for that of those before it.
        tl.extra.cuda.gdc_wait()
    if not has_work:
        return

    # Tile row m is token m // GROUP, query head m % GROUP of this kv head.
    first_query = (tl.program_id(0) % M_TILES) * BLOCK_M
    query = first_query + tl.arange(0, BLOCK_M)
    token = query // GROUP
    head = kv_head * GROUP + query % GROUP
    wanted = (query < QUERIES)[:, None] & (dim < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + (row * q_row + token * q_token + head * q_head)[:, None]
    q = tl.load(q_ptrs + dim[None, :], mask=wanted, other=0.0)
    if cos_sin_ptr is not None:
        swapped_dim = _swap(dim, HEAD_DIM)[None, :]
        swapped_q = tl.load(q_ptrs + swapped_dim, mask=wanted, other=0.0)
        # Several tiles of queries each write this, the same bytes, before they read them.
        writes = (dim < tl.where(end == length, HEAD_DIM, 0))[None, :]
        k_ptr = q_ptr + row * q_row + (num_kv_heads * GROUP + kv_head) * q_head
        new_k = tl.load(k_ptr + dim[None, :], mask=writes, other=0.0)
        swapped_k = tl.load(k_ptr + swapped_dim, mask=writes, other=0.0)
        new_v = tl.load(k_ptr + num_kv_heads * q_head + dim[None, :], mask=writes, other=0.0)
        new_block = tl.load(table_ptr + (length - 1) // BLOCK_TOKENS).to(tl.int64)
        new_k = _rotate(new_k, swapped_k, dim, k_norm_ptr, eps, cos, sin, HEAD_DIM)
        slot_ptr = head_ptr + new_block * kv_block + ((length - 1) % BLOCK_TOKENS) * kv_token
        tl.store(slot_ptr + dim[None, :], new_k, mask=writes)
        tl.store(slot_ptr + kv_plane + dim[None, :], new_v, mask=writes)
        q = _rotate(q, swapped_q, dim, q_norm_ptr, eps, cos, sin, HEAD_DIM)
        # The threads that read the new key and value below are not those that wrote them.
        tl.debug_barrier()
    if WIDEN:
        q = q.to(tl.float32)
    limit = tl.where(query < QUERIES, length - TOKENS + 1 + token, 0)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    values = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        inside = position < end
        block = tl.load(table_ptr + position // BLOCK_TOKENS, mask=inside, other=0)
        token_offsets = block.to(tl.int64) * kv_block + (position % BLOCK_TOKENS) * kv_token
        k_ptrs = head_ptr + token_offsets[:, None] + dim[None, :]
        # Slots past the length hold anything, NaN too: a weight of 0 would not silence them.
        held = inside[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_ptrs, mask=held, other=0.0)
        v = tl.load(k_ptrs + kv_plane, mask=held, other=0.0)
        if WIDEN:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        visible = position[None, :] < limit[:, None]
        if WINDOW is not None:
            visible &= position[None, :] >= limit[:, None] - WINDOW
        scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Until a query sees its first token, its maximum is -inf: subtract 0, never -inf.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        weights = weights.to(kv_ptr.dtype.element_ty)
        if WIDEN:
            weights = weights.to(tl.float32)
        values = tl.dot(weights, v, values * shrink[:, None], input_precision="ieee")
        top = new_top

    divisor = tl.where(total == 0.0, 1.0, total)
    values = values / divisor[:, None]
    out_offsets = row * out_row + token * out_token + head * out_head
    out_ptrs = out_ptr + out_offsets[:, None] + dim[None, :]
    if SPLITS == 1 or num_used == 1:
        tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=wanted)
    else:
        first = (row * num_kv_heads + kv_head) * SPLITS * QUERIES
        log_sum = tl.where(total == 0.0, float("-inf"), top + tl.log2(divisor))
        is_last = _put_split(
            values,
            log_sum,
            query,
            split,
            num_used,
            partials_ptr + first * HEAD_DIM,
            log_sums_ptr + first,
            counters_ptr + row * tl.num_programs(0) + tl.program_id(0),
            HEAD_DIM,
            QUERIES,
            BLOCK_D,
        )
        if is_last:
            merge_query = first_query + tl.arange(0, MERGE_M)
            merged = _merge(
                partials_ptr + first * HEAD_DIM,
                log_sums_ptr + first,
                merge_query,
                num_used,
                HEAD_DIM,
                QUERIES,
                BLOCK_D,
                MERGE_STEP,
            )
            merge_offsets = row * out_row + (merge_query // GROUP) * out_token
            merge_offsets += (kv_head * GROUP + merge_query % GROUP) * out_head
            tl.store(
                out_ptr + merge_offsets[:, None] + dim[None, :],
                merged.to(out_ptr.dtype.element_ty),
                mask=(merge_query < QUERIES)[:, None] & (dim < HEAD_DIM)[None, :],
            )
