"""The second kernel of sampling, at random only: each tile's weights, and its part of the draw."""

import triton
import triton.language as tl

from paceline.kernels.gumbel_triton import gumbels
from paceline.kernels.sampling_distances_triton import (
    HEAD,
    best_of_tiles,
    changes_logits,
    distances_of,
    first_of,
    weights_of,
)
from paceline.kernels.sampling_slots_triton import (
    CHOICE,
    LOWEST,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    slot_float,
    slot_int,
    slot_wide,
)


@triton.jit(do_not_specialize_on_alignment=["row_slots", "indices"])
def scan_kernel(  # type: ignore[no-untyped-def]
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
    MAX_CANDIDATES: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program: a tile of a row. Adds its head to the row's list, or races it."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    slot = tl.load(row_slots + row).to(tl.int64)
    if slot < 0:
        return
    temperature = slot_float(slots, slot, TEMPERATURE)
    if temperature == 0.0:
        return
    best, _ = best_of_tiles(
        workspace.tile_best, workspace.tile_best_token, row, NUM_TILES, TILES_BLOCK
    )
    tokens = tile * TILE + tl.arange(0, TILE)
    distances = distances_of(
        tokens,
        logits + row * logits_stride,
        workspace.scores + row * vocab_size,
        vocab_size,
        changes_logits(slots, slot, HAS_MASK),
        best,
        temperature,
    )
    kept = (tokens < vocab_size) & (distances >= slot_float(slots, slot, LOWEST))
    head = kept & (distances >= -HEAD)
    weights = weights_of(distances, kept)
    place = row * NUM_TILES + tile
    tl.store(workspace.tile_weight + place, tl.sum(weights, axis=0))
    tl.store(workspace.tile_tail_weight + place, tl.sum(tl.where(head, 0, weights), axis=0))
    num_heads = tl.sum(head.to(tl.int32), axis=0)
    top_k = slot_int(slots, slot, TOP_K)
    share = slot_wide(slots, slot, TOP_P).to(tl.float64, bitcast=True)
    if ((top_k > 0) & (top_k < vocab_size)) | (share < 1.0):
        if num_heads > 0:
            # Tiles come in any order; what is made of the list depends on none.
            start = tl.atomic_add(workspace.list_lengths + row, num_heads)
            places = start + tl.cumsum(head.to(tl.int32), axis=0) - 1
            fits = head & (places < MAX_CANDIDATES)
            places = row * MAX_CANDIDATES + places
            tl.store(workspace.list_values + places, distances, mask=fits)
            tl.store(workspace.list_tokens + places, tokens, mask=fits)
    else:
        noisy = tl.full((TILE,), float("-inf"), tl.float64)
        if num_heads > 0:
            seed, choice = slot_wide(slots, slot, SEED), slot_int(slots, slot, CHOICE)
            noise = gumbels(tokens.to(tl.uint32), seed, choice, tl.load(indices + row))
            noisy = tl.where(head, distances.to(tl.float64) + noise, noisy)
        raced, token = first_of(noisy, tokens)
        tl.store(workspace.tile_race + place, raced)
        tl.store(workspace.tile_race_token + place, token)
