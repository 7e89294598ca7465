"""The draw at random, by tiles: the best d + noise of a tile's head, and of its tail.

Noise in float64 is dear. A rough one of every token tells which can be the best of the tile, as a
rule a single one, and only those get the noise that counts. The tail's tokens race among themselves
as well, so that the one is known that is drawn if the tail wins. Of a tile in which few chunks have
tokens over the floor, only those chunks are read.
"""

import triton
import triton.language as tl

from paceline.kernels.gumbel_triton import (
    ROUGH_ERROR,
    consecutive_words,
    gumbels,
    rough_gumbels,
    words_by_fours,
)
from paceline.kernels.sampling_distances_triton import (
    HEAD,
    NO_TOKEN,
    best_of_tiles,
    changes_logits,
    chunks_before,
    distances_of,
    first_chunks,
    keys_of,
    tokens_of,
    weights_of,
)
from paceline.kernels.sampling_floor_triton import DRAWN, KEPT_END, MODE, STATE_WIDTH
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
def _best_of(rough, tokens, distances, seed, choice, index):  # type: ignore[no-untyped-def]
    """Return the best d + noise of the tokens that race, and the lowest token that has it.

    `rough` is about that, and -inf of tokens that do not race.
    """
    # Twice the error of the noise, and as much for its sum with d.
    least = tl.max(rough, axis=0) - 4 * ROUGH_ERROR
    able = tl.where(rough >= tl.maximum(least, -2 * _HOPELESS), tokens, NO_TOKEN)
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


@triton.jit
def race(distances, kept, words, tokens, seed, choice, index):  # type: ignore[no-untyped-def]
    """Return the best d + noise and its token, of the head and of the tail, and the tail's weight.

    `words` are the tokens' own.
    """
    kept = kept & (distances >= -_HOPELESS)
    head = kept & (distances >= -HEAD)
    rough = distances + rough_gumbels(words)
    in_head = tl.where(head, rough, float("-inf"))
    best, token = _best_of(in_head, tokens, distances, seed, choice, index)
    tail_best = tl.full((), float("-inf"), tl.float64)
    tail_token = tl.full((), NO_TOKEN, tl.int32)
    tail_weight = tl.full((), 0, tl.int64)
    tail = kept & (distances < -HEAD)
    if tl.sum(tail.to(tl.int32), axis=0) > 0:
        tail_weight = tl.sum(weights_of(distances, tail), axis=0)
        in_tail = tl.where(tail, rough, float("-inf"))
        tail_best, tail_token = _best_of(in_tail, tokens, distances, seed, choice, index)
    return best, token, tail_best, tail_token, tail_weight


@triton.jit
def store_race(workspace, places, mask, best, token, tail_best, tail_token, tail_weight):  # type: ignore[no-untyped-def]
    """Store what `race` returned."""
    tl.store(workspace.tile_race + places, best, mask=mask)
    tl.store(workspace.tile_race_token + places, token, mask=mask)
    tl.store(workspace.tile_tail_race + places, tail_best, mask=mask)
    tl.store(workspace.tile_tail_race_token + places, tail_token, mask=mask)
    tl.store(workspace.tile_tail_weight + places, tail_weight, mask=mask)


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
    CHUNK: tl.constexpr,
):
    """A program: some tiles of a row. Greedy rows do nothing, nor those that have a token."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots + row).to(tl.int64)
    if slot < 0:
        return
    temperature = slot_float(slots, slot, TEMPERATURE)
    state = workspace.states + row * _WIDTH
    if (temperature == 0.0) | (tl.load(state + MODE) == DRAWN):
        return
    changed = changes_logits(slots, slot, HAS_MASK)
    row_best, _ = best_of_tiles(
        workspace.tile_best, workspace.tile_best_token, row, NUM_TILES, TILES_BLOCK
    )
    kept_end = tl.load(state + KEPT_END).to(tl.int32)
    seed, choice = slot_wide(slots, slot, SEED), slot_int(slots, slot, CHOICE)
    index = tl.load(indices + row)
    row_logits = logits + row * logits_stride
    row_scores = workspace.scores + row * vocab_size
    PER_TILE: tl.constexpr = TILE // CHUNK
    FEW: tl.constexpr = (PER_TILE + 3) // 4
    chunk_best = workspace.chunk_best + row * (NUM_TILES * PER_TILE)
    for tile in range(tl.program_id(1), NUM_TILES, tl.num_programs(1)):
        wanted = chunks_before(chunk_best, tile, kept_end, row_best, temperature, PER_TILE)
        num_wanted = tl.sum(wanted.to(tl.int32), axis=0)
        best = tl.full((), float("-inf"), tl.float64)
        token = tl.full((), NO_TOKEN, tl.int32)
        tail_best = tl.full((), float("-inf"), tl.float64)
        tail_token = tl.full((), NO_TOKEN, tl.int32)
        tail_weight = tl.full((), 0, tl.int64)
        if num_wanted > FEW:
            tokens = tile * TILE + tl.arange(0, TILE)
            distances = distances_of(
                tokens, row_logits, row_scores, vocab_size, changed, row_best, temperature
            )
            kept = keys_of(distances) < kept_end
            words = consecutive_words(tile * TILE, seed, choice, index, TILE)
            best, token, tail_best, tail_token, tail_weight = race(
                distances, kept, words, tokens, seed, choice, index
            )
        elif num_wanted > 0:
            chunks = first_chunks(wanted, tile, NUM_TILES * PER_TILE, FEW, PER_TILE)
            tokens = tokens_of(chunks, FEW, CHUNK)
            distances = distances_of(
                tokens, row_logits, row_scores, vocab_size, changed, row_best, temperature
            )
            kept = keys_of(distances) < kept_end
            fours = tokens_of(chunks, FEW, CHUNK // 4)
            words = words_by_fours(fours, seed, choice, index, FEW * CHUNK)
            best, token, tail_best, tail_token, tail_weight = race(
                distances, kept, words, tokens, seed, choice, index
            )
        place = row * NUM_TILES + tile
        store_race(workspace, place, True, best, token, tail_best, tail_token, tail_weight)
