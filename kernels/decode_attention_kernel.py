"""Attention of each row's newest tokens over its paged context, on a GPU (decode, verification).

    y[r, t, h] = softmax(q[r, t, h] K_r[:e]^T scale) V_r[:e]        e = lengths[r] - T + 1 + t
    q, y [R, T, num_heads, head_dim], T the same for all rows: 1, or 1 + drafts to be verified
    pool kv [blocks, layers, kv_heads, 2, block_tokens, head_dim], at any strides
    tables int32 [R, columns] of block ids, lengths int32 [R], the new tokens included

float32 (IEEE products), bfloat16 or float16; sums in float32. With a window, token e - 1 sees
itself and the window - 1 before it. A row of length 0 pads the batch: nothing of it is read or
written. A query before the start of its sequence (length < T) gives 0. Reference:
kernels.decode_attention.

The keys of all rows, in tiles of `block_n` tokens, are one sequence, and each program takes a share
of it that `decode_shares_triton` has cut: programs that took a row each would wait for the longest.
Each part of a row has a running softmax (Milakov and Gimelshein, 2018), and parts are merged
(flash-decoding: Dao, Haziza, Massa and Sizov, 2023):

    programs (kv head, share)             queries of the kv head: a tile [T * group, head_dim]
      rows     |0              |1|2   |   keys: tiles of `block_n` tokens, each token's block id
      shares   |0   |1   |2   |3   |4 |   looked up in the table, so a tile spans any blocks
    the last of a row's shares to end:    y = sum(2^(s_i - m) y_i) / sum(2^(s_i - m)), m = max(s_i)

where y_i is the softmax over part i alone and s_i the log2 of its sum. Parts are added in their
order, whichever ends last, so that a call always gives the same bits. How rows are cut follows from
their lengths on the device: a captured launch stays right while contexts grow.

With T = 1 the same launch can also do what kernels.rope_kv_write_triton does ahead of it, to the
same bits but for the sums of squares of its norm: each program rotates the queries that it takes,
and the one whose share ends the row rotates the new key and writes key and value to the pool before
it reads its part.
"""

import triton
import triton.language as tl

from paceline.kernels.decode_parts_kernel import merge_parts, put_part
from paceline.kernels.decode_shares_triton import RECORD
from paceline.kernels.prefetch_triton import prefetch_l2


@triton.jit
def _part_of_row(  # type: ignore[no-untyped-def]
    lengths_ptr,
    tile_ends_ptr,
    row,
    share_begin,
    share_end,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return the share's part of a row, from which of the row's tiles to which token; the row's
    length; and its first tile among those of all rows.

    No tokens in it: no work, as in a row that pads.
    """
    # .cg: see `attend_kernel`.
    first = tl.load(tile_ends_ptr + row - 1, mask=row > 0, other=0, cache_modifier=".cg")
    last = tl.load(tile_ends_ptr + row, cache_modifier=".cg")
    length = tl.load(lengths_ptr + row, cache_modifier=".cg")
    tile = tl.maximum(share_begin, first) - first
    stop = tl.minimum(share_end, last) - first
    end = tl.minimum(_token_of_tile(length, stop, TOKENS, WINDOW, BLOCK_N), length)
    return tile, tl.where(stop > 0, end, 0), length, first


@triton.jit
def _token_of_tile(  # type: ignore[no-untyped-def]
    length, tile, TOKENS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Return the first token of a row's tile: without a window, a multiple of BLOCK_N."""
    token = tile * BLOCK_N
    if WINDOW is not None:
        token += tl.maximum(length - TOKENS + 1 - WINDOW, 0)
    return token


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
def _attend_part(  # type: ignore[no-untyped-def]
    row,
    begin,
    end,
    length,
    own_place,
    place_of_first,
    num_parts,
    q_ptr,
    head_ptr,
    tables_ptr,
    out_ptr,
    partials_ptr,
    log_sums_ptr,
    counters_ptr,
    cos_sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    scale_log2,
    query_strides,
    context_strides,
    num_kv_heads,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEPT: tl.constexpr,
    MERGE_STEP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attend to a part of a row, tokens [begin, end); merge all parts if the others have ended."""
    q_row, q_token, q_head, out_row, out_token, out_head = query_strides
    kv_block, kv_plane, kv_token, table_row, cos_sin_row = context_strides
    QUERIES: tl.constexpr = TOKENS * GROUP
    M_TILES: tl.constexpr = (QUERIES + BLOCK_M - 1) // BLOCK_M
    kv_head = tl.program_id(0) // M_TILES
    dim = tl.arange(0, BLOCK_D)
    # Tile row m is token m // GROUP, query head m % GROUP of this kv head.
    kept_query = tl.arange(0, BLOCK_M)
    first_query = (tl.program_id(0) % M_TILES) * BLOCK_M
    query = first_query + kept_query
    token = query // GROUP
    head = kv_head * GROUP + query % GROUP
    wanted = (query < QUERIES)[:, None] & (dim < HEAD_DIM)[None, :]
    wide_row = row.to(tl.int64)
    table_ptr = tables_ptr + wide_row * table_row
    q_ptrs = q_ptr + (wide_row * q_row + token * q_token + head * q_head)[:, None]
    q = tl.load(q_ptrs + dim[None, :], mask=wanted, other=0.0)
    if cos_sin_ptr is not None:
        angle_ptrs = cos_sin_ptr + (length - 1).to(tl.int64) * cos_sin_row
        angle_ptrs += dim % (HEAD_DIM // 2)
        cos = tl.load(angle_ptrs, mask=dim < HEAD_DIM, other=0.0)[None, :]
        sin = tl.load(angle_ptrs + HEAD_DIM // 2, mask=dim < HEAD_DIM, other=0.0)
        sin = tl.where(dim < HEAD_DIM // 2, -sin, sin)[None, :]
        swapped_dim = _swap(dim, HEAD_DIM)[None, :]
        swapped_q = tl.load(q_ptrs + swapped_dim, mask=wanted, other=0.0)
        # Several tiles of queries each write this, the same bytes, before they read them.
        writes = (dim < tl.where(end == length, HEAD_DIM, 0))[None, :]
        k_ptr = q_ptr + wide_row * q_row + (num_kv_heads * GROUP + kv_head) * q_head
        new_k = tl.load(k_ptr + dim[None, :], mask=writes, other=0.0)
        swapped_k = tl.load(k_ptr + swapped_dim, mask=writes, other=0.0)
        v_ptr = k_ptr + num_kv_heads * q_head
        new_v = tl.load(v_ptr + dim[None, :], mask=writes, other=0.0)
        new_block = tl.load(table_ptr + (length - 1) // BLOCK_TOKENS).to(tl.int64)
        new_k = _rotate(new_k, swapped_k, dim, k_norm_ptr, eps, cos, sin, HEAD_DIM)
        slot_ptr = head_ptr + new_block * kv_block
        slot_ptr += ((length - 1) % BLOCK_TOKENS) * kv_token
        tl.store(slot_ptr + dim[None, :], new_k, mask=writes)
        tl.store(slot_ptr + kv_plane + dim[None, :], new_v, mask=writes)
        q = _rotate(q, swapped_q, dim, q_norm_ptr, eps, cos, sin, HEAD_DIM)
        # The threads that read the new key and value are not those that wrote them.
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
        token_offsets = block.to(tl.int64) * kv_block
        token_offsets += (position % BLOCK_TOKENS) * kv_token
        k_ptrs = head_ptr + token_offsets[:, None] + dim[None, :]
        # Slots past the length hold anything, NaN too: a weight of 0 would not silence it.
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
        weights = weights.to(head_ptr.dtype.element_ty)
        if WIDEN:
            weights = weights.to(tl.float32)
        values = tl.dot(weights, v, values * shrink[:, None], input_precision="ieee")
        top = new_top

    sums = tl.where(total == 0.0, 1.0, total)
    values = values / sums[:, None]
    out_offsets = wide_row * out_row + token * out_token + head * out_head
    if num_parts == 1:
        out_ptrs = out_ptr + out_offsets[:, None] + dim[None, :]
        tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=wanted)
    else:
        head_place = tl.program_id(0).to(tl.int64) * (2 * tl.num_programs(1))
        place = head_place + own_place
        log_sum = tl.where(total == 0.0, float("-inf"), top + tl.log2(sums))
        is_last = put_part(
            values,
            log_sum,
            kept_query,
            place,
            num_parts,
            partials_ptr,
            log_sums_ptr,
            counters_ptr + wide_row * tl.num_programs(0) + tl.program_id(0),
            HEAD_DIM,
            KEPT,
            BLOCK_D,
        )
        if is_last:
            merged = merge_parts(
                partials_ptr,
                log_sums_ptr,
                head_place + place_of_first,
                head_place + (place_of_first // 2 + 1) * 2,
                num_parts,
                HEAD_DIM,
                KEPT,
                BLOCK_D,
                MERGE_STEP,
            )
            query_kept = first_query + tl.arange(0, KEPT)
            merge_offsets = wide_row * out_row + (query_kept // GROUP) * out_token
            merge_offsets += (kv_head * GROUP + query_kept % GROUP) * out_head
            tl.store(
                out_ptr + merge_offsets[:, None] + dim[None, :],
                merged.to(out_ptr.dtype.element_ty),
                mask=(query_kept < QUERIES)[:, None] & (dim < HEAD_DIM)[None, :],
            )


@triton.jit
def attend_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    kv_ptr,
    tables_ptr,
    lengths_ptr,
    records_ptr,
    tile_ends_ptr,
    row_parts_ptr,
    out_ptr,
    partials_ptr,
    log_sums_ptr,
    counters_ptr,
    cos_sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEPT: tl.constexpr,
    MERGE_STEP: tl.constexpr,
    WIDEN: tl.constexpr,
    LAUNCH_EARLY: tl.constexpr,
    PREFETCH: tl.constexpr,
    ONE_ROW: tl.constexpr,
):
    """A program: up to BLOCK_M queries of one kv head, one share of all rows' contexts.

    With cos_sin_ptr, q holds queries, keys and values that are to be rotated and written first.
    """
    QUERIES: tl.constexpr = TOKENS * GROUP
    M_TILES: tl.constexpr = (QUERIES + BLOCK_M - 1) // BLOCK_M
    kv_head = tl.program_id(0) // M_TILES
    share = tl.program_id(1)
    if LAUNCH_EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    # .cg: read ahead of the wait, so that the L1 cache might still hold an earlier step's words.
    record_ptr = records_ptr + share * RECORD
    row = tl.load(record_ptr, cache_modifier=".cg")
    last_row = tl.load(record_ptr + 1, cache_modifier=".cg")
    share_begin = tl.load(record_ptr + 2, cache_modifier=".cg")
    share_end = tl.load(record_ptr + 3, cache_modifier=".cg")
    tile = tl.load(record_ptr + 4, cache_modifier=".cg")
    end = tl.load(record_ptr + 5, cache_modifier=".cg")
    length = tl.load(record_ptr + 6, cache_modifier=".cg")
    row_first = tl.load(record_ptr + 7, cache_modifier=".cg")
    head_ptr = kv_ptr + kv_head.to(tl.int64) * kv_head_stride
    if PREFETCH:
        _prefetch_tokens(
            head_ptr,
            tables_ptr + row.to(tl.int64) * table_row,
            _token_of_tile(length, tile, TOKENS, WINDOW, BLOCK_N),
            end,
            kv_block,
            kv_plane,
            kv_token,
            HEAD_DIM,
            BLOCK_TOKENS,
            BLOCK_N,
        )
    if LAUNCH_EARLY:
        # Also where there is no work: the kernels behind take this one's end for that of those
        # before it.
        tl.extra.cuda.gdc_wait()

    query_strides = (q_row, q_token, q_head, out_row, out_token, out_head)
    context_strides = (kv_block, kv_plane, kv_token, table_row, cos_sin_row)
    # Each share has two places for results: one for the row that it begins with, one for its last.
    if last_row <= row:  # not a loop of one turn, which is slower
        place_of_first = tl.load(row_parts_ptr + 2 * row, cache_modifier=".cg")
        num_parts = tl.load(row_parts_ptr + 2 * row + 1, cache_modifier=".cg")
        begin = _token_of_tile(length, tile, TOKENS, WINDOW, BLOCK_N)
        own_place = 2 * share + (share_begin < row_first).to(tl.int32)
        if begin < end:
            _attend_part(
                row,
                begin,
                end,
                length,
                own_place,
                place_of_first,
                num_parts,
                q_ptr,
                head_ptr,
                tables_ptr,
                out_ptr,
                partials_ptr,
                log_sums_ptr,
                counters_ptr,
                cos_sin_ptr,
                q_norm_ptr,
                k_norm_ptr,
                eps,
                scale_log2,
                query_strides,
                context_strides,
                num_kv_heads,
                TOKENS,
                GROUP,
                HEAD_DIM,
                BLOCK_TOKENS,
                WINDOW,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                KEPT,
                MERGE_STEP,
                WIDEN,
            )
    elif not ONE_ROW:
        for _ in range(last_row - row + 1):
            # Asked for ahead of use: what is needed of the next row, and at the end of this one.
            next_row = tl.minimum(row + 1, last_row)
            next_tile, next_end, next_length, next_first = _part_of_row(
                lengths_ptr,
                tile_ends_ptr,
                next_row,
                share_begin,
                share_end,
                TOKENS,
                WINDOW,
                BLOCK_N,
            )
            place_of_first = tl.load(row_parts_ptr + 2 * row, cache_modifier=".cg")
            num_parts = tl.load(row_parts_ptr + 2 * row + 1, cache_modifier=".cg")
            begin = _token_of_tile(length, tile, TOKENS, WINDOW, BLOCK_N)
            own_place = 2 * share + (share_begin < row_first).to(tl.int32)
            if begin < end:
                _attend_part(
                    row,
                    begin,
                    end,
                    length,
                    own_place,
                    place_of_first,
                    num_parts,
                    q_ptr,
                    head_ptr,
                    tables_ptr,
                    out_ptr,
                    partials_ptr,
                    log_sums_ptr,
                    counters_ptr,
                    cos_sin_ptr,
                    q_norm_ptr,
                    k_norm_ptr,
                    eps,
                    scale_log2,
                    query_strides,
                    context_strides,
                    num_kv_heads,
                    TOKENS,
                    GROUP,
                    HEAD_DIM,
                    BLOCK_TOKENS,
                    WINDOW,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                    KEPT,
                    MERGE_STEP,
                    WIDEN,
                )
            row = next_row
            tile, end = next_tile, next_end
            length, row_first = next_length, next_first
