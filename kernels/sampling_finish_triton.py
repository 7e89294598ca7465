"""The last kernel of sampling: each row's token, counted where its slot has penalties.

    floor = max(log min_p, the k-th largest d); then the d of the last token needed to reach
            top_p of the weight of d >= floor
    token = argmax s, or at random: argmax of d + noise over d >= floor

top_k and top_p look at a list of values of d: the row's head, which `scan` listed, or the whole
row, spread over its scores, where the head has too little or no room.
"""

import math

import triton
import triton.language as tl

from paceline.kernels.gumbel_triton import TAIL_DRAW, gumbels
from paceline.kernels.sampling import WEIGHT_BITS
from paceline.kernels.sampling_distances_triton import (
    HEAD,
    NO_TOKEN,
    best_of_tiles,
    changes_logits,
    distances_of,
    first_of,
    weights_of,
)
from paceline.kernels.sampling_prepare_triton import largest_or_nan
from paceline.kernels.sampling_slots_triton import (
    CHOICE,
    HAS_PENALTIES,
    LOWEST,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    slot_float,
    slot_int,
    slot_wide,
)

STATUS_OK = 0
STATUS_NOT_FINITE = 1
"""The largest logit is infinite or not a number."""
STATUS_NONE_ALLOWED = 2

STATUS_NONE_DRAWN = 3
"""The draw gave none of the vocabulary's tokens, which is a defect of these kernels."""

_OK: tl.constexpr = tl.constexpr(STATUS_OK)
_NOT_FINITE: tl.constexpr = tl.constexpr(STATUS_NOT_FINITE)
_NONE_ALLOWED: tl.constexpr = tl.constexpr(STATUS_NONE_ALLOWED)
_NONE_DRAWN: tl.constexpr = tl.constexpr(STATUS_NONE_DRAWN)
_TAIL_DRAW: tl.constexpr = tl.constexpr(TAIL_DRAW)
_LOG_ONE: tl.constexpr = tl.constexpr(WEIGHT_BITS * math.log(2.0))
"""The logarithm of a weight of 1"""


@triton.jit
def _spread(  # type: ignore[no-untyped-def]
    logits, scores, vocab_size, changed, best, temperature, BLOCK: tl.constexpr
):
    """Write d of the whole row over its scores."""
    for start in range(0, vocab_size, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        distances = distances_of(tokens, logits, scores, vocab_size, changed, best, temperature)
        tl.store(scores + tokens, distances, mask=tokens < vocab_size)
    tl.debug_barrier()


@triton.jit
def _values_between(values, length, start, lowest, end, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a block of the values, and which of them are lowest <= d < end."""
    places = start + tl.arange(0, BLOCK)
    distances = tl.load(values + places, mask=places < length, other=float("-inf"))
    return distances, (places < length) & (distances >= lowest) & (distances < end)


@triton.jit
def _weight_between(values, length, lowest, end, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the weight of lowest <= d < end, int64."""
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, length, BLOCK):
        distances, kept = _values_between(values, length, start, lowest, end, BLOCK)
        total += weights_of(distances, kept)
    return tl.sum(total, axis=0)


@triton.jit
def _bisect(  # type: ignore[no-untyped-def]
    values, length, lowest, needed, BY_WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the largest of `values` so that those from it on, over `lowest`, reach `needed`.

    What is needed is a weight or a number of values. The bits of -d are those of a number that
    grows with it: each step decides one, from the highest on.
    """
    bits = tl.full((), 0, tl.int32)
    for step in range(31):
        bit = 1 << (30 - step)
        reached = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, length, BLOCK):
            distances, kept = _values_between(values, length, start, lowest, float("inf"), BLOCK)
            counted = kept & (tl.abs(distances).to(tl.int32, bitcast=True) < (bits | bit))
            if BY_WEIGHT:
                reached += weights_of(distances, counted)
            else:
                reached += counted.to(tl.int64)
        if tl.sum(reached, axis=0).to(tl.float64) < needed:
            bits = bits | bit
    return -(bits.to(tl.float32, bitcast=True))


@triton.jit
def _race(  # type: ignore[no-untyped-def]
    values, listed, is_listed, length, lowest, end, seed, choice, index, BLOCK: tl.constexpr
):
    """Return the best d + noise of lowest <= d < end, and the lowest token that has it.

    `listed` holds the values' tokens if `is_listed`; else they are those of a whole row.
    """
    best = tl.full((), float("-inf"), tl.float64)
    winner = tl.full((), NO_TOKEN, tl.int32)
    for start in range(0, length, BLOCK):
        distances, racing = _values_between(values, length, start, lowest, end, BLOCK)
        if tl.sum(racing.to(tl.int32), axis=0) > 0:
            tokens = start + tl.arange(0, BLOCK)
            if is_listed:
                tokens = tl.load(listed + tokens, mask=racing, other=NO_TOKEN)
            noise = gumbels(tokens.to(tl.uint32), seed, choice, index)
            noisy = tl.where(racing, distances.to(tl.float64) + noise, float("-inf"))
            raced, token = first_of(noisy, tokens)
            if (raced > best) | ((raced == best) & (token < winner)):
                best = raced
                winner = token
    return best, winner


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    logits,
    index,
    slots,
    slot,
    workspace,
    row,
    vocab_size,
    best,
    HAS_MASK: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
):
    """Return a token drawn at random; `logits` points to the row's."""
    temperature = slot_float(slots, slot, TEMPERATURE)
    floor = slot_float(slots, slot, LOWEST)
    top_k = slot_int(slots, slot, TOP_K)
    share = slot_wide(slots, slot, TOP_P).to(tl.float64, bitcast=True)
    seed, choice = slot_wide(slots, slot, SEED), slot_int(slots, slot, CHOICE)
    changed = changes_logits(slots, slot, HAS_MASK)
    tiles = tl.arange(0, TILES_BLOCK)
    places = row * NUM_TILES + tiles
    weights = tl.load(workspace.tile_weight + places, mask=tiles < NUM_TILES, other=0)
    total = tl.sum(weights, axis=0)
    weights = tl.load(workspace.tile_tail_weight + places, mask=tiles < NUM_TILES, other=0)
    tail_weight = tl.sum(weights, axis=0)
    scores = workspace.scores + row * vocab_size
    listed = workspace.list_tokens + row * MAX_CANDIDATES
    # Over the whole row: d of all its tokens lies in its scores.
    is_spread = False
    is_limited = (top_k > 0) & (top_k < vocab_size)
    if is_limited | (share < 1.0):
        length = tl.load(workspace.list_lengths + row)
        # The list has all that min_p keeps, or all of the head.
        if is_limited:
            lacks = (length < top_k) & (floor < -HEAD)
        else:
            lacks = (total - tail_weight).to(tl.float64) < share * total.to(tl.float64)
        is_spread = (length > MAX_CANDIDATES) | lacks
        values = workspace.list_values + row * MAX_CANDIDATES
        if is_spread:
            _spread(logits, scores, vocab_size, changed, best, temperature, BLOCK=MAX_CANDIDATES)
            values = scores
            length = vocab_size
        if is_limited:
            if length >= top_k:
                last = _bisect(values, length, floor, top_k.to(tl.float64), False, MAX_CANDIDATES)
                floor = tl.maximum(floor, last)
            total = _weight_between(values, length, floor, float("inf"), MAX_CANDIDATES)
        if share < 1.0:
            needed = share * total.to(tl.float64)
            floor = _bisect(values, length, floor, needed, True, MAX_CANDIDATES)
        raced, token = _race(
            values,
            listed,
            is_spread == 0,
            length,
            tl.maximum(floor, -HEAD),
            float("inf"),
            seed,
            choice,
            index,
            MAX_CANDIDATES,
        )
        if is_spread:
            tail_weight = _weight_between(values, length, floor, -HEAD, MAX_CANDIDATES)
    else:
        raced, token = best_of_tiles(
            workspace.tile_race, workspace.tile_race_token, row, NUM_TILES, TILES_BLOCK
        )
    # With a list too short for the tail, floor is in the head.
    if (floor < -HEAD) & (tail_weight > 0):
        draw = tl.full((16,), _TAIL_DRAW, tl.uint32)
        noise = tl.max(gumbels(draw, seed, choice, index), axis=0)
        if tl.log(tail_weight.to(tl.float64)) - _LOG_ONE + noise > raced:
            if is_spread == 0:
                _spread(
                    logits, scores, vocab_size, changed, best, temperature, BLOCK=MAX_CANDIDATES
                )
            raced, token = _race(
                scores,
                listed,
                False,
                vocab_size,
                floor,
                -HEAD,
                seed,
                choice,
                index,
                MAX_CANDIDATES,
            )
    return token


@triton.jit(do_not_specialize_on_alignment=["row_slots", "indices"])
def finish_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    row_slots,
    indices,
    slots,
    workspace,
    out,
    vocab_size,
    HAS_MASK: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
    ANY_RANDOM: tl.constexpr,
):
    """A program: a row."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots + row).to(tl.int64)
    if slot < 0:
        return
    tiles = tl.arange(0, TILES_BLOCK)
    places = workspace.tile_largest + row * NUM_TILES + tiles
    largest = largest_or_nan(tl.load(places, mask=tiles < NUM_TILES, other=float("-inf")))
    best, token = best_of_tiles(
        workspace.tile_best, workspace.tile_best_token, row, NUM_TILES, TILES_BLOCK
    )
    is_finite = tl.abs(largest) < float("inf")
    status = tl.where(is_finite, tl.where(best > float("-inf"), _OK, _NONE_ALLOWED), _NOT_FINITE)
    tl.store(out.largest + row, largest)
    tl.store(out.status + row, status)
    if status != _OK:
        tl.store(out.token_ids + row, -1)
        return
    if ANY_RANDOM:
        temperature = slot_float(slots, slot, TEMPERATURE)
        if temperature > 0.0:
            token = _draw(
                logits + row * logits_stride,
                tl.load(indices + row),
                slots,
                slot,
                workspace,
                row,
                vocab_size,
                best,
                HAS_MASK,
                NUM_TILES,
                TILES_BLOCK,
                MAX_CANDIDATES,
            )
    # Whatever went wrong before: no token outside the vocabulary leaves, or becomes an address.
    if (token < 0) | (token >= vocab_size):
        tl.store(out.status + row, _NONE_DRAWN)
        tl.store(out.token_ids + row, -1)
        return
    tl.store(out.token_ids + row, token)
    if slot_int(slots, slot, HAS_PENALTIES) != 0:
        counter = slots.counts + slot * vocab_size + token
        tl.store(counter, tl.load(counter) + 1)
        tl.store(slots.seen + slot * vocab_size + token, True)
