"""The draw at random, by tiles: the best d + noise of a tile's head, and of its tail.

Noise in float64 is dear. A rough one of every token tells which can be the best of the tile, as a
rule a single one, and only those get the noise that counts. The tail's tokens race among themselves
as well, so that the one is known that is drawn if the tail wins.
"""

import triton
import triton.language as tl

from paceline.kernels.gumbel_triton import (
    ROUGH_ERROR,
    consecutive_words,
    gumbels,
    rough_gumbels,
)
from paceline.kernels.sampling_distances_triton import (
    HEAD,
    NO_TOKEN,
    best_of_tiles,
    changes_logits,
    distances_of,
    keys_of,
    weights_of,
)
from paceline.kernels.sampling_floor_triton import KEPT_END, STATE_WIDTH
from paceline.kernels.sampling_slots_triton import (
    CHOICE,
    SEED,
    TEMPERATURE,
    slot_float,
    slot_int,
    slot_wide,
)

_WIDTH: tl.constexpr = tl.constexpr(STATE_WIDTH)
_HOPELESS: tl.constexpr = tl.constexpr(64.0)
"""Noise lies between -3.2 and 22.9, and what has any weight over -24: nothing under -64 wins."""


@triton.jit
def _best_of(rough, racing, tokens, distances, seed, choice, index):  # type: ignore[no-untyped-def]
    """Return the best d + noise of the tokens that race, and the lowest token that has it."""
    rough = tl.where(racing, rough, float("-inf"))
    top = tl.max(rough, axis=0)
    # Twice the error of the noise, and as much for its sum with d.
    able = tl.where(racing & (rough >= top - 4 * ROUGH_ERROR), tokens, NO_TOKEN)
    num_able = tl.sum((able < NO_TOKEN).to(tl.int32), axis=0)
    best = tl.full((), float("-inf"), tl.float64)
    winner = tl.full((), NO_TOKEN, tl.int32)
    token = tl.full((), -1, tl.int32)
    for _ in range(num_able):
        token = tl.min(tl.where(able > token, able, NO_TOKEN), axis=0)
        distance = tl.max(tl.where(tokens == token, distances, float("-inf")), axis=0)
        draw = tl.zeros((16,), tl.uint32) + token.to(tl.uint32)
        noise = tl.max(gumbels(draw, seed, choice, index), axis=0)
        noisy = distance.to(tl.float64) + noise
        if noisy > best:
            best = noisy
            winner = token
    return best, winner


@triton.jit(do_not_specialize_on_alignment=["row_slots", "indices"])
def race_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    row_slots,
    indices,
    slots,
    workspace,
    vocab_size,
    HAS_MASK: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program: some tiles of a row. Greedy rows do nothing."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots + row).to(tl.int64)
    if slot < 0:
        return
    temperature = slot_float(slots, slot, TEMPERATURE)
    if temperature == 0.0:
        return
    changed = changes_logits(slots, slot, HAS_MASK)
    row_best, _ = best_of_tiles(
        workspace.tile_best, workspace.tile_best_token, row, NUM_TILES, TILES_BLOCK
    )
    kept_end = tl.load(workspace.states + row * _WIDTH + KEPT_END).to(tl.int32)
    seed, choice = slot_wide(slots, slot, SEED), slot_int(slots, slot, CHOICE)
    index = tl.load(indices + row)
    for tile in range(tl.program_id(1), NUM_TILES, tl.num_programs(1)):
        tokens = tile * TILE + tl.arange(0, TILE)
        distances = distances_of(
            tokens,
            logits + row * logits_stride,
            workspace.scores + row * vocab_size,
            vocab_size,
            changed,
            row_best,
            temperature,
        )
        kept = (keys_of(distances) < kept_end) & (distances >= -_HOPELESS)
        head = kept & (distances >= -HEAD)
        num_kept = tl.sum(kept.to(tl.int32), axis=0)
        num_head = tl.sum(head.to(tl.int32), axis=0)
        best = tl.full((), float("-inf"), tl.float64)
        token = tl.full((), NO_TOKEN, tl.int32)
        tail_best = tl.full((), float("-inf"), tl.float64)
        tail_token = tl.full((), NO_TOKEN, tl.int32)
        tail_weight = tl.full((), 0, tl.int64)
        if num_kept > 0:
            words = consecutive_words(tile * TILE, seed, choice, index, TILE)
            rough = distances + rough_gumbels(words)
            best, token = _best_of(rough, head, tokens, distances, seed, choice, index)
            if num_head < num_kept:
                tail = kept & (distances < -HEAD)
                tail_weight = tl.sum(weights_of(distances, tail), axis=0)
                tail_best, tail_token = _best_of(
                    rough, tail, tokens, distances, seed, choice, index
                )
        place = row * NUM_TILES + tile
        tl.store(workspace.tile_race + place, best)
        tl.store(workspace.tile_race_token + place, token)
        tl.store(workspace.tile_tail_race + place, tail_best)
        tl.store(workspace.tile_tail_race_token + place, tail_token)
        tl.store(workspace.tile_tail_weight + place, tail_weight)
