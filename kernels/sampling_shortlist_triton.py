"""The kernel of sampling that draws at once where few tokens can be kept, as with a small top_k.

The k-th best of the chunks' best is a lower bound of the k-th best token. So what is kept lies in
the chunks whose best is over that bound and over min_p's floor. If these are few, one program a row
lists their tokens over both, finds in the list where they end, and draws. Rows with more, as when
many tokens tie, are left to the kernels behind it, with a guess at where their search ends.
"""

import triton
import triton.language as tl

from paceline.kernels.gumbel_triton import random_words
from paceline.kernels.sampling_distances_triton import (
    NO_KEY,
    NO_TOKEN,
    best_of_tiles,
    changes_logits,
    distances_from,
    distances_of,
    keys_of,
    tokens_of,
    weights_of,
)
from paceline.kernels.sampling_floor_triton import (
    DRAWN,
    KEPT_END,
    MODE,
    STATE_WIDTH,
    key_at,
    needed_weight,
)
from paceline.kernels.sampling_narrow_triton import NUM_PIECES, has_filters, lowest_end
from paceline.kernels.sampling_race_triton import race, store_race
from paceline.kernels.sampling_slots_triton import (
    CHOICE,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    slot_float,
    slot_int,
    slot_wide,
)

_WIDTH: tl.constexpr = tl.constexpr(STATE_WIDTH)
_PIECES: tl.constexpr = tl.constexpr(NUM_PIECES)
_BOUND_BITS: tl.constexpr = tl.constexpr(14)
"""Of a key, from the highest; a bound rounded up to them admits few tokens more."""
_ROUNDING: tl.constexpr = tl.constexpr((1 << (31 - 14)) - 1)
_FEW_LIKELY: tl.constexpr = tl.constexpr(64.0)


@triton.jit
def _bound(keys, amounts, needed):  # type: ignore[no-untyped-def]
    """Return an end under which the keys' amounts sum to what is needed, or with all in use."""
    key = tl.full((), 0, tl.int32)
    for bit in range(_BOUND_BITS):
        higher = key | (1 << (30 - bit))
        if tl.sum(tl.where(keys < higher, amounts, 0), axis=0) < needed:
            key = higher
    return tl.minimum(key | _ROUNDING, NO_KEY - 1) + 1


@triton.jit
def _store_pieces(  # type: ignore[no-untyped-def]
    piece_ends, end, chunk_keys, distances, stride, top_k, share, BY_NUM: tl.constexpr
):
    """Guess where the search ends, from the distances of one in `stride` tokens.

    The second piece is where it is likely to end, the first and the third are beside it. Whatever
    the pieces are, the search finds the same; it takes longer in wide ones.
    """
    keys = keys_of(distances)
    if BY_NUM:
        amounts = (keys < end).to(tl.float32)
        needed = top_k.to(tl.float32) / stride
    else:
        amounts = tl.where(keys < end, tl.exp(distances), 0.0)
        needed = share.to(tl.float32) * tl.sum(amounts, axis=0)
    total = tl.sum(amounts, axis=0)
    needed = tl.minimum(needed, total)
    squares = tl.sum(amounts * amounts, axis=0)
    # That of a sum over random tokens; where few have most of the weight it says nothing.
    error = tl.sqrt(needed * (total - needed) * squares) / tl.maximum(total, 1e-30)
    if total * total < _FEW_LIKELY * squares:
        ones = tl.full(chunk_keys.shape, 1, tl.int32)
        first = _bound(chunk_keys, ones, 64)
        second = _bound(chunk_keys, ones, 256)
        third = _bound(chunk_keys, ones, 768)
    else:
        first = _bound(keys, amounts, needed - 3.0 * error)
        second = _bound(keys, amounts, needed + 3.0 * error)
        third = _bound(keys, amounts, needed + 12.0 * error)
    tl.store(piece_ends, tl.minimum(first, end))
    tl.store(piece_ends + 1, tl.minimum(second, end))
    tl.store(piece_ends + 2, tl.minimum(third, end))
    tl.store(piece_ends + 3, end)


@triton.jit
def _kept_end(keys, listed, length, end, slots, slot, vocab_size):  # type: ignore[no-untyped-def]
    """Return the end of what is kept, given all keys under `end`."""
    top_k = slot_int(slots, slot, TOP_K)
    share = slot_wide(slots, slot, TOP_P).to(tl.float64, bitcast=True)
    if (top_k > 0) & (top_k < length):
        end = key_at(keys, listed.to(tl.int32), 0, top_k.to(tl.float64)) + 1
    if share < 1.0:
        weights = weights_of(-(keys.to(tl.float32, bitcast=True)), listed & (keys < end))
        needed = needed_weight(share, tl.sum(weights, axis=0))
        end = key_at(keys, weights, 0, needed) + 1
    return end


@triton.jit(do_not_specialize_on_alignment=["row_slots", "indices"])
def shortlist_kernel(  # type: ignore[no-untyped-def]
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
    NUM_CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    """A program: a row. Draws its token, or divides the keys into pieces."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots + row).to(tl.int64)
    if slot < 0:
        return
    if has_filters(slots, slot, vocab_size) == 0:
        return
    changed = changes_logits(slots, slot, HAS_MASK)
    temperature = slot_float(slots, slot, TEMPERATURE)
    best, _ = best_of_tiles(
        workspace.tile_best, workspace.tile_best_token, row, NUM_TILES, TILES_BLOCK
    )
    lowest = lowest_end(slots, slot)
    chunks = tl.arange(0, CHUNKS_BLOCK)
    chunk_best = tl.load(
        workspace.chunk_best + row * NUM_CHUNKS + chunks,
        mask=chunks < NUM_CHUNKS,
        other=float("-inf"),
    )
    chunk_keys = keys_of(distances_from(chunk_best, best, temperature))
    row_logits = logits + row * logits_stride
    row_scores = workspace.scores + row * vocab_size
    top_k = slot_int(slots, slot, TOP_K)
    is_limited = (top_k > 0) & (top_k < vocab_size)
    end = lowest
    if is_limited:
        end = tl.minimum(end, _bound(chunk_keys, tl.full((CHUNKS_BLOCK,), 1, tl.int32), top_k))
    wanted = chunk_keys < end
    num_wanted = tl.sum(wanted.to(tl.int32), axis=0)
    length = tl.full((), MAX_TOKENS + 1, tl.int32)
    list_keys = workspace.short_keys + row * MAX_TOKENS
    list_tokens = workspace.short_tokens + row * MAX_TOKENS
    if num_wanted <= MAX_CHUNKS:
        short_chunks = workspace.short_chunks + row * MAX_CHUNKS
        tl.store(short_chunks + tl.cumsum(wanted.to(tl.int32), axis=0) - 1, chunks, mask=wanted)
        # Another thread stores than loads.
        tl.debug_barrier()
        length = tl.full((), 0, tl.int32)
        for first in range(0, num_wanted, STEP):
            numbers = first + tl.arange(0, STEP)
            some = tl.load(short_chunks + numbers, mask=numbers < num_wanted, other=NUM_CHUNKS)
            tokens = tokens_of(some, STEP, CHUNK)
            distances = distances_of(
                tokens,
                row_logits,
                row_scores,
                vocab_size,
                changed,
                best,
                temperature,
            )
            keys = keys_of(distances)
            inside = keys < end
            places = length + tl.cumsum(inside.to(tl.int32), axis=0) - 1
            fits = inside & (places < MAX_TOKENS)
            tl.store(list_keys + places, keys, mask=fits)
            tl.store(list_tokens + places, tokens, mask=fits)
            length += tl.sum(inside.to(tl.int32), axis=0)
    if length > MAX_TOKENS:
        stride = tl.maximum(vocab_size // SAMPLE, 1)
        some_tokens = tl.arange(0, SAMPLE) * stride
        sampled = distances_of(
            some_tokens, row_logits, row_scores, vocab_size, changed, best, temperature
        )
        piece_ends = workspace.piece_ends + row * _PIECES
        share = slot_wide(slots, slot, TOP_P).to(tl.float64, bitcast=True)
        if is_limited:
            _store_pieces(piece_ends, lowest, chunk_keys, sampled, stride, top_k, share, True)
        else:
            _store_pieces(piece_ends, lowest, chunk_keys, sampled, stride, top_k, share, False)
        return
    tl.debug_barrier()
    places = tl.arange(0, MAX_TOKENS)
    listed = places < length
    keys = tl.load(list_keys + places, mask=listed, other=NO_KEY)
    tokens = tl.load(list_tokens + places, mask=listed, other=0)
    end = _kept_end(keys, listed, length, end, slots, slot, vocab_size)
    seed, choice = slot_wide(slots, slot, SEED), slot_int(slots, slot, CHOICE)
    index = tl.load(indices + row)
    drawn, token, tail_best, tail_token, tail_weight = race(
        -(keys.to(tl.float32, bitcast=True)),
        keys < end,
        random_words(tokens.to(tl.uint32), seed, choice, index),
        tokens,
        seed,
        choice,
        index,
    )
    # As if all of it were in the first tile.
    tiles = tl.arange(0, TILES_BLOCK)
    is_first = tiles == 0
    store_race(
        workspace,
        row * NUM_TILES + tiles,
        tiles < NUM_TILES,
        tl.where(is_first, drawn, float("-inf")),
        tl.where(is_first, token, NO_TOKEN),
        tl.where(is_first, tail_best, float("-inf")),
        tl.where(is_first, tail_token, NO_TOKEN),
        tl.where(is_first, tail_weight, 0),
    )
    state = workspace.states + row * _WIDTH
    tl.store(state + KEPT_END, end.to(tl.int64))
    tl.store(state + MODE, DRAWN)
