"""Merge the parts of a row that several programs of `decode_attention_kernel` have attended to.

    y = sum(2^(s_i - m) y_i) / sum(2^(s_i - m))        m = max(s_i)

y_i [KEPT, head_dim] is the softmax over part i alone, s_i [KEPT] the log2 of its sum. A share has
two places for such results: one for the row that it begins with, one for the row that it ends in.
"""

import triton
import triton.language as tl


@triton.jit
def put_part(  # type: ignore[no-untyped-def]
    values,
    log_sum,
    query,
    place,
    num_parts,
    partials_ptr,
    log_sums_ptr,
    counter_ptr,
    HEAD_DIM: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the results of a part of a row; return whether every other part's can be read."""
    dim = tl.arange(0, BLOCK_D)
    kept = place * KEPT + query
    wanted = (query < KEPT)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(partials_ptr + kept[:, None] * HEAD_DIM + dim[None, :], values, mask=wanted)
    tl.store(log_sums_ptr + kept, log_sum, mask=query < KEPT)
    # All threads have stored before one of them tells the other shares.
    tl.debug_barrier()
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_parts - 1
    if is_last:
        tl.debug_barrier()
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def merge_parts(  # type: ignore[no-untyped-def]
    partials_ptr,
    log_sums_ptr,
    first_place,
    second_place,
    num_parts,
    HEAD_DIM: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
):
    """Return the output of the kept queries, from what the row's parts wrote, STEP at a time.

    All parts but the first are what their share begins with: two places apart.
    """
    dim = tl.arange(0, BLOCK_D)
    query = tl.arange(0, KEPT)
    top = tl.full([KEPT], float("-inf"), tl.float32)
    total = tl.zeros([KEPT], tl.float32)
    values = tl.zeros([KEPT, BLOCK_D], tl.float32)
    for start in range(0, num_parts, STEP):
        # Parts in the middle: Triton 3.6 gives warps the first dimension, so that each adds alone.
        part = start + tl.arange(0, STEP)
        place = tl.where(part == 0, first_place, second_place + 2 * (part - 1))
        used = (part < num_parts)[None, :] & (query >= 0)[:, None]
        kept = query[:, None] + place[None, :] * KEPT
        # .cg: other multiprocessors wrote these, and the L1 cache would not know.
        log_sums = tl.load(
            log_sums_ptr + kept, mask=used, other=float("-inf"), cache_modifier=".cg"
        )
        parts = tl.load(
            partials_ptr + kept[:, :, None] * HEAD_DIM + dim[None, None, :],
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
