"""What the kernels of sampling share: a row's distances from its best score, and their weights.

d      = (s - max s) / temperature             float32, at most 0; s: logits, or scores
key    = the bits of -d                        int32, grows as d falls; equal where d is equal
weight = floor(exp(d) * 2**34)                 int64, so sums are exact in any order
"""

import triton
import triton.language as tl

from paceline.kernels.sampling import HEAD_NATS, WEIGHT_BITS
from paceline.kernels.sampling_slots_triton import HAS_PENALTIES, NUM_EDITS, slot_int

HEAD: tl.constexpr = tl.constexpr(HEAD_NATS)
"""Tokens under -HEAD are the tail."""
NO_TOKEN: tl.constexpr = tl.constexpr(2**31 - 1)
NO_KEY: tl.constexpr = tl.constexpr(0x7F800000)
"""The key of a banned token; those of all others are lower."""
_ONE: tl.constexpr = tl.constexpr(2.0**WEIGHT_BITS)


@triton.jit
def changes_logits(slots, slot, HAS_MASK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether a slot's scores are other than its logits."""
    changed = slot_int(slots, slot, NUM_EDITS) > 0
    return changed | (slot_int(slots, slot, HAS_PENALTIES) != 0) | HAS_MASK


@triton.jit
def first_of(values, tokens):  # type: ignore[no-untyped-def]
    """Return the largest value and the lowest token that has it."""
    best = tl.max(values, axis=0)
    return best, tl.min(tl.where(values == best, tokens, NO_TOKEN), axis=0)


@triton.jit
def best_of_tiles(values, tokens, row, NUM_TILES: tl.constexpr, TILES_BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the largest value [R, T] of a row and the lowest token that has it."""
    tiles = tl.arange(0, TILES_BLOCK)
    places = row * NUM_TILES + tiles
    value = tl.load(values + places, mask=tiles < NUM_TILES, other=float("-inf"))
    token = tl.load(tokens + places, mask=tiles < NUM_TILES, other=NO_TOKEN)
    return first_of(value, token)


@triton.jit
def distances_from(values, best, temperature):  # type: ignore[no-untyped-def]
    """Return d of scores."""
    values = values - best
    return tl.div_rn(values, tl.zeros_like(values) + temperature)


@triton.jit
def distances_of(tokens, logits, scores, vocab_size, changed, best, temperature):  # type: ignore[no-untyped-def]
    """Return d of some tokens, -inf outside the vocabulary.

    `logits` and `scores` point to the row's; its scores are read only if it changes its logits.
    """
    inside = tokens < vocab_size
    if changed:
        values = tl.load(scores + tokens, mask=inside, other=float("-inf"))
    else:
        values = tl.load(logits + tokens, mask=inside, other=float("-inf")).to(tl.float32)
    return distances_from(values, best, temperature)


@triton.jit
def keys_of(distances):  # type: ignore[no-untyped-def]
    """Return the keys of d; one that is not a number has none of those in use."""
    return tl.abs(distances).to(tl.int32, bitcast=True)


@triton.jit
def weights_of(distances, kept):  # type: ignore[no-untyped-def]
    """Return the weights; 0 where not kept."""
    return tl.where(kept, tl.floor(tl.exp(distances) * _ONE).to(tl.int64), 0)


@triton.jit
def chunks_before(chunk_best, tile, end, best, temperature, PER_TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tell which chunks of a row's tile have a key under `end`, bool [PER_TILE]."""
    values = tl.load(chunk_best + tile * PER_TILE + tl.arange(0, PER_TILE))
    return keys_of(distances_from(values, best, temperature)) < end


@triton.jit
def tokens_of(chunks, NUM: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the tokens of some chunks, int32 [NUM * CHUNK]."""
    tokens = chunks[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    return tl.reshape(tokens, (NUM * CHUNK,))


@triton.jit
def first_chunks(wanted, tile, none, NUM: tl.constexpr, PER_TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the first wanted chunks of a tile, int32 [NUM], filled up with `none`."""
    ranks = tl.cumsum(wanted.to(tl.int32), axis=0)
    is_next = wanted[None, :] & (ranks[None, :] == 1 + tl.arange(0, NUM)[:, None])
    chunks = tile * PER_TILE + tl.arange(0, PER_TILE)
    return tl.min(tl.where(is_next, chunks[None, :], none), axis=1)
