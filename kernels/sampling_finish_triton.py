"""The last kernel of sampling: each row's token, counted where its slot has penalties.

token = argmax s, or at random that of the best tile; of the tail's best if the tail as one wins
"""

import math

import triton
import triton.language as tl

from paceline.kernels.gumbel_triton import TAIL_DRAW, gumbels
from paceline.kernels.sampling import WEIGHT_BITS
from paceline.kernels.sampling_distances_triton import best_of_tiles
from paceline.kernels.sampling_prepare_triton import largest_or_nan
from paceline.kernels.sampling_slots_triton import (
    CHOICE,
    HAS_PENALTIES,
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
"""No token of the vocabulary was drawn, or not as its slot wants: a defect of what samples."""

_OK: tl.constexpr = tl.constexpr(STATUS_OK)
_NOT_FINITE: tl.constexpr = tl.constexpr(STATUS_NOT_FINITE)
_NONE_ALLOWED: tl.constexpr = tl.constexpr(STATUS_NONE_ALLOWED)
_NONE_DRAWN: tl.constexpr = tl.constexpr(STATUS_NONE_DRAWN)
_TAIL_DRAW: tl.constexpr = tl.constexpr(TAIL_DRAW)
_LOG_ONE: tl.constexpr = tl.constexpr(WEIGHT_BITS * math.log(2.0))
"""The logarithm of a weight of 1"""


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    indices, slots, slot, workspace, row, NUM_TILES: tl.constexpr, TILES_BLOCK: tl.constexpr
):
    """Return a token drawn at random."""
    raced, token = best_of_tiles(
        workspace.tile_race, workspace.tile_race_token, row, NUM_TILES, TILES_BLOCK
    )
    tiles = tl.arange(0, TILES_BLOCK)
    weights = workspace.tile_tail_weight + row * NUM_TILES + tiles
    weight = tl.sum(tl.load(weights, mask=tiles < NUM_TILES, other=0), axis=0)
    if weight > 0:
        seed, choice = slot_wide(slots, slot, SEED), slot_int(slots, slot, CHOICE)
        draw = tl.full((16,), _TAIL_DRAW, tl.uint32)
        noise = tl.max(gumbels(draw, seed, choice, tl.load(indices + row)), axis=0)
        if tl.log(weight.to(tl.float64)) - _LOG_ONE + noise > raced:
            _, token = best_of_tiles(
                workspace.tile_tail_race,
                workspace.tile_tail_race_token,
                row,
                NUM_TILES,
                TILES_BLOCK,
            )
    return token


@triton.jit(do_not_specialize_on_alignment=["row_slots", "indices"])
def finish_kernel(  # type: ignore[no-untyped-def]
    row_slots,
    indices,
    slots,
    workspace,
    out,
    vocab_size,
    NUM_TILES: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    ANY_RANDOM: tl.constexpr,
    ANY_FILTERED: tl.constexpr,
):
    """A program: a row. What its slot needs of sampling and was not done is found out here."""
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
    if slot_float(slots, slot, TEMPERATURE) > 0.0:
        if ANY_RANDOM:
            token = _draw(indices, slots, slot, workspace, row, NUM_TILES, TILES_BLOCK)
        if not (ANY_RANDOM and ANY_FILTERED):
            top_k = slot_int(slots, slot, TOP_K)
            share = slot_wide(slots, slot, TOP_P).to(tl.float64, bitcast=True)
            is_filtered = ((top_k > 0) & (top_k < vocab_size)) | (share < 1.0)
            if is_filtered | (not ANY_RANDOM):
                token = -1
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
