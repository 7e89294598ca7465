"""Where top_k and top_p end, row by row: what is known of it between the kernels that narrow it.

    kept   = d >= log min_p, that is key < kept_end
    top_k:   kept_end = 1 + the lowest key such that as many tokens as top_k are up to it
    top_p:   kept_end = 1 + the lowest key up to which the weight is top_p of that of all kept

Both ask for the key at which a sum over tokens, of ones or of weights, reaches what is *needed*. A
row's state is a range of keys, start <= key < end, that has the key sought, and the sums over all
keys before it. A pass over the row's tokens sums over the parts of the range, and the part in which
the sum reaches what is needed is the next range; a range of one key is the end. Once few tokens are
left the pass lists them, and they are searched at once. top_p comes after top_k, within its end.
"""

import triton
import triton.language as tl

from paceline.kernels.sampling_distances_triton import NO_KEY, weights_of

DONE: tl.constexpr = tl.constexpr(0)
"""The mode of a row whose kept_end is known"""
COUNT: tl.constexpr = tl.constexpr(1)
"""The next pass sums over the parts of the range."""
LIST: tl.constexpr = tl.constexpr(2)
"""The next pass lists the keys of the range."""

DRAWN: tl.constexpr = tl.constexpr(-1)
"""Its token has been drawn, too."""

# A row's state, int64 each.
MODE: tl.constexpr = tl.constexpr(0)
KEPT_END: tl.constexpr = tl.constexpr(1)
BY_WEIGHT: tl.constexpr = tl.constexpr(2)
START: tl.constexpr = tl.constexpr(3)
END: tl.constexpr = tl.constexpr(4)
NUM_BEFORE: tl.constexpr = tl.constexpr(5)
WEIGHT_BEFORE: tl.constexpr = tl.constexpr(6)
NEEDED: tl.constexpr = tl.constexpr(7)
"""float64 bits"""
STATE_WIDTH = 8


@triton.jit
def needed_weight(share, total):  # type: ignore[no-untyped-def]
    """Return the weight to reach, float64; at least the best token is kept."""
    return tl.maximum(share * total.to(tl.float64), 1.0)


@triton.jit
def search(  # type: ignore[no-untyped-def]
    state, mode, by_weight, start, end, num_before, weight_before, needed
):
    """Let the next pass sum over a range, or list it."""
    tl.store(state + BY_WEIGHT, by_weight.to(tl.int64))
    tl.store(state + START, start.to(tl.int64))
    tl.store(state + END, end.to(tl.int64))
    tl.store(state + NUM_BEFORE, num_before.to(tl.int64))
    tl.store(state + WEIGHT_BEFORE, weight_before.to(tl.int64))
    tl.store(state + NEEDED, needed.to(tl.int64, bitcast=True))
    tl.store(state + MODE, mode)


@triton.jit
def end_at(state, end, by_weight, share, weight):  # type: ignore[no-untyped-def]
    """Set a row's end, up to which it has a weight; go on with top_p if that was top_k's."""
    tl.store(state + KEPT_END, end.to(tl.int64))
    if by_weight | (share >= 1.0):
        tl.store(state + MODE, DONE)
    else:
        zero = end * 0
        search(state, COUNT, zero + 1, zero, end, zero, zero, needed_weight(share, weight))


@triton.jit
def part_of(sums, parts, needed):  # type: ignore[no-untyped-def]
    """Return the part in which sums, those up to each part's end, reach what is needed."""
    reached = tl.sum((sums.to(tl.float64) < needed).to(tl.int32), axis=0)
    return tl.minimum(reached, tl.max(parts, axis=0))


@triton.jit
def up_to(sums, parts, part, before):  # type: ignore[no-untyped-def]
    """Return the sum up to the end of a part; of part -1 it is what was before."""
    return tl.max(tl.where(parts <= part, sums, before), axis=0)


@triton.jit
def next_range(  # type: ignore[no-untyped-def]
    state,
    by_weight,
    start,
    end,
    num_before,
    num_up_to,
    weight_before,
    weight_up_to,
    needed,
    share,
    CAN_LIST: tl.constexpr,
    MAX_LISTED: tl.constexpr,
):
    """Go on with a part of the range; its sums are those before and up to its end."""
    if end - start == 1:
        end_at(state, end, by_weight, share, weight_up_to)
    else:
        mode = tl.full((), COUNT, tl.int32)
        # With all before it in the list, too, top_p can follow top_k there.
        if CAN_LIST:
            if num_up_to <= MAX_LISTED:
                mode = tl.full((), LIST, tl.int32)
                start = start * 0
                num_before = num_before * 0
                weight_before = weight_before * 0
            elif num_up_to - num_before <= MAX_LISTED:
                mode = tl.full((), LIST, tl.int32)
        search(state, mode, by_weight, start, end, num_before, weight_before, needed)


@triton.jit
def key_at(keys, ones, before, needed):  # type: ignore[no-untyped-def]
    """Return the lowest key up to which the sum of `ones` and what was before reach `needed`."""
    key = tl.full((), 0, tl.int32)
    for step in range(31):
        higher = key | (1 << (30 - step))
        reached = before + tl.sum(tl.where(keys < higher, ones, 0), axis=0)
        if reached.to(tl.float64) < needed:
            key = higher
    return key


@triton.jit
def search_list(state, list_keys, length, share, MAX_LISTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Find the end in the list of all keys of the range."""
    by_weight = tl.load(state + BY_WEIGHT) != 0
    start = tl.load(state + START)
    num_before = tl.load(state + NUM_BEFORE)
    weight_before = tl.load(state + WEIGHT_BEFORE)
    needed = tl.load(state + NEEDED).to(tl.float64, bitcast=True)
    places = tl.arange(0, MAX_LISTED)
    listed = places < length
    keys = tl.load(list_keys + places, mask=listed, other=NO_KEY, cache_modifier=".cg")
    weights = weights_of(-(keys.to(tl.float32, bitcast=True)), listed)
    end = tl.full((), 0, tl.int32)
    weight = weight_before
    if by_weight == 0:
        end = key_at(keys, listed.to(tl.int32), num_before.to(tl.int32), needed) + 1
        weight += tl.sum(tl.where(keys < end, weights, 0), axis=0)
        needed = needed_weight(share, weight)
    has_all = start == 0
    if by_weight | (has_all & (share < 1.0)):
        end = key_at(keys, weights, weight_before, needed) + 1
    end_at(state, end, by_weight | has_all, share, weight)
