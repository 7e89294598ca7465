"""The first kernel of sampling: what a slot changes of its logits, and the best of each part.

s = logits, -inf where not allowed, + logit_bias, -inf while min_tokens bans, - penalties

It also clears what the kernels behind it add up.
"""

import torch
import triton
import triton.language as tl

from paceline.kernels.sampling_distances_triton import changes_logits, first_of
from paceline.kernels.sampling_floor_triton import DONE, KEPT_END, MODE, STATE_WIDTH
from paceline.kernels.sampling_narrow_triton import (
    NUM_BINS,
    NUM_PIECES,
    has_filters,
    lowest_end,
)
from paceline.kernels.sampling_slots_triton import (
    FREQUENCY,
    HAS_PENALTIES,
    MIN_TOKENS,
    NUM_BIASES,
    NUM_EDITS,
    PRESENCE,
    REPETITION,
    TEMPERATURE,
    slot_float,
    slot_int,
)


@triton.jit
def largest_or_nan(values):  # type: ignore[no-untyped-def]
    """Return the largest value, or NaN if one is not a number."""
    has_nan = tl.max((values != values).to(tl.int32), axis=0) != 0
    return tl.where(has_nan, float("nan"), tl.max(values, axis=0))


@triton.jit
def _edited(values, tokens, slots, slot, edit_stride, index):  # type: ignore[no-untyped-def]
    num_edits = slot_int(slots, slot, NUM_BIASES)
    if index < slot_int(slots, slot, MIN_TOKENS):
        num_edits = slot_int(slots, slot, NUM_EDITS)
    edits = slots.edits + slot * edit_stride
    for edit in range(num_edits):
        value = tl.load(edits + 2 * edit + 1).to(tl.float32, bitcast=True)
        values = tl.where(tokens == tl.load(edits + 2 * edit), values + value, values)
    return values


_LARGEST: tl.constexpr = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _penalised(values, tokens, slots, slot, vocab_size):  # type: ignore[no-untyped-def]
    """Return what `sampling.apply_penalties_` makes of the values."""
    repetition = slot_float(slots, slot, REPETITION)
    presence = slot_float(slots, slot, PRESENCE)
    frequency = slot_float(slots, slot, FREQUENCY)
    inside = tokens < vocab_size
    places = slot * vocab_size + tokens
    was_seen = tl.load(slots.seen + places, mask=inside, other=0) != 0
    count = tl.load(slots.counts + places, mask=was_seen, other=0)
    divided = tl.div_rn(values, tl.zeros_like(values) + repetition)
    penalised = tl.where(values > 0, divided, values * repetition)
    penalised -= frequency * count + presence * (count > 0).to(tl.float32)
    # A tiny repetition penalty overflows, and nothing can be compared with an infinite score.
    finite = tl.minimum(tl.maximum(penalised, -_LARGEST), _LARGEST)
    return tl.where(was_seen & (values > float("-inf")), finite, values)


_WIDTH: tl.constexpr = tl.constexpr(STATE_WIDTH)
_PIECES: tl.constexpr = tl.constexpr(NUM_PIECES)
_BINS: tl.constexpr = tl.constexpr(NUM_BINS)


@triton.jit
def _clear(workspace, row, tile, BINS_BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Clear a row's sums: of the bins, a tile's share."""
    if tile == 0:
        pieces = row * _PIECES + tl.arange(0, _PIECES)
        tl.store(workspace.piece_nums + pieces, tl.zeros((_PIECES,), tl.int32))
        tl.store(workspace.piece_weights + pieces, tl.zeros((_PIECES,), tl.int64))
        tl.store(workspace.list_lengths + row, 0)
        tl.store(workspace.arrivals + row, 0)
    bins = tile * BINS_BLOCK + tl.arange(0, BINS_BLOCK)
    tl.store(
        workspace.bin_nums + row * _BINS + bins,
        tl.zeros((BINS_BLOCK,), tl.int32),
        mask=bins < _BINS,
    )
    tl.store(
        workspace.bin_weights + row * _BINS + bins,
        tl.zeros((BINS_BLOCK,), tl.int64),
        mask=bins < _BINS,
    )


@triton.jit(do_not_specialize_on_alignment=["row_slots", "indices"])
def prepare_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    row_slots,
    indices,
    slots,
    edit_stride,
    allowed_mask,
    mask_stride,
    workspace,
    vocab_size,
    NUM_TILES: tl.constexpr,
    BINS_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program: a tile of a row. Writes scores, if the slot changes any, and the best of parts."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    slot = tl.load(row_slots + row).to(tl.int64)
    if tile == 0:
        tl.store(workspace.states + row * _WIDTH + MODE, DONE)
    if slot < 0:
        return
    if tile == 0:
        tl.store(workspace.states + row * _WIDTH + KEPT_END, lowest_end(slots, slot).to(tl.int64))
    if has_filters(slots, slot, vocab_size):
        _clear(workspace, row, tile, BINS_BLOCK)
    tokens = tile * TILE + tl.arange(0, TILE)
    inside = tokens < vocab_size
    values = tl.load(logits + row * logits_stride + tokens, mask=inside, other=float("-inf"))
    values = values.to(tl.float32)
    place = row * NUM_TILES + tile
    tl.store(workspace.tile_largest + place, largest_or_nan(values))
    if changes_logits(slots, slot, allowed_mask is not None):
        if allowed_mask is not None:
            words = tl.load(allowed_mask + row * mask_stride + tokens // 32, mask=inside, other=0)
            values = tl.where(((words >> (tokens % 32)) & 1) != 0, values, float("-inf"))
        values = _edited(values, tokens, slots, slot, edit_stride, tl.load(indices + row))
        if slot_int(slots, slot, HAS_PENALTIES) != 0:
            values = _penalised(values, tokens, slots, slot, vocab_size)
        tl.store(workspace.scores + row * vocab_size + tokens, values, mask=inside)
    if slot_float(slots, slot, TEMPERATURE) > 0.0:
        chunks = place * (TILE // CHUNK) + tl.arange(0, TILE // CHUNK)
        chunk_best = tl.max(tl.reshape(values, (TILE // CHUNK, CHUNK)), axis=1)
        tl.store(workspace.chunk_best + chunks, chunk_best)
    best, token = first_of(values, tokens)
    tl.store(workspace.tile_best + place, best)
    tl.store(workspace.tile_best_token + place, token)
