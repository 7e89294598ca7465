"""The kernels of sampling that find where top_k and top_p end; rows without them leave at once.

divide sums over four ranges of d; each narrow sums over 2,048 parts of the range that is left, or
lists it (see `sampling_floor_triton`). Sums are whole numbers, so any order of additions gives the
same. The last program of a row to come to its end looks at the row's sums, then clears them.

A range has at most 2**31 keys. So three passes find any key; top_k and then top_p need six, and
nearly always one or two each: the others leave at once.
"""

import triton
import triton.language as tl

from paceline.kernels.sampling_distances_triton import (
    NO_KEY,
    best_of_tiles,
    changes_logits,
    chunks_before,
    distances_of,
    first_chunks,
    keys_of,
    tokens_of,
    weights_of,
)
from paceline.kernels.sampling_floor_triton import (
    BY_WEIGHT,
    DONE,
    DRAWN,
    END,
    LIST,
    MODE,
    NEEDED,
    NUM_BEFORE,
    START,
    STATE_WIDTH,
    WEIGHT_BEFORE,
    needed_weight,
    next_range,
    part_of,
    search_list,
    up_to,
)
from paceline.kernels.sampling_slots_triton import (
    LOWEST,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    slot_float,
    slot_int,
    slot_wide,
)

NUM_PIECES = 4
NUM_BINS = 2048
NUM_PASSES = 6
"""Of `narrow`, so that any range comes to its end"""
MAX_TILE = 4096
"""Of `divide`: a tile's weight is below 2**47, and its number of tokens above that."""

_WIDTH: tl.constexpr = tl.constexpr(STATE_WIDTH)
_PIECES: tl.constexpr = tl.constexpr(NUM_PIECES)
_BINS: tl.constexpr = tl.constexpr(NUM_BINS)
_BIN_BITS: tl.constexpr = tl.constexpr(NUM_BINS.bit_length() - 1)
_SPAN_BITS: tl.constexpr = tl.constexpr(31 - (NUM_BINS.bit_length() - 1))
_NUM_SHIFT: tl.constexpr = tl.constexpr(47)
_ONE_TOKEN: tl.constexpr = tl.constexpr(1 << 47)


@triton.jit
def lowest_end(slots, slot):  # type: ignore[no-untyped-def]
    """Return where min_p ends, int32."""
    return tl.minimum(keys_of(slot_float(slots, slot, LOWEST)) + 1, NO_KEY)


@triton.jit
def has_filters(slots, slot, vocab_size):  # type: ignore[no-untyped-def]
    """Whether a slot draws at random within top_k or top_p."""
    top_k = slot_int(slots, slot, TOP_K)
    share = slot_wide(slots, slot, TOP_P).to(tl.float64, bitcast=True)
    limited = ((top_k > 0) & (top_k < vocab_size)) | (share < 1.0)
    return limited & (slot_float(slots, slot, TEMPERATURE) > 0.0)


@triton.jit
def _is_last(arrivals):  # type: ignore[no-untyped-def]
    """Whether all other programs of the row have added what they add."""
    # What all threads have added comes before what one of them says of it.
    tl.debug_barrier()
    return tl.atomic_add(arrivals, 1, sem="acq_rel") == tl.num_programs(1) - 1


@triton.jit(do_not_specialize_on_alignment=["row_slots"])
def divide_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    row_slots,
    slots,
    workspace,
    vocab_size,
    HAS_MASK: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    MAX_LISTED: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program: some tiles of a row. Begins the search."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots + row).to(tl.int64)
    if slot < 0:
        return
    if has_filters(slots, slot, vocab_size) == 0:
        return
    if tl.load(workspace.states + row * _WIDTH + MODE) == DRAWN:
        return
    changed = changes_logits(slots, slot, HAS_MASK)
    temperature = slot_float(slots, slot, TEMPERATURE)
    best, _ = best_of_tiles(
        workspace.tile_best, workspace.tile_best_token, row, NUM_TILES, TILES_BLOCK
    )
    pieces = tl.arange(0, _PIECES)
    ends = workspace.piece_ends + row * _PIECES
    end = tl.load(ends + _PIECES - 1)
    num_sums = tl.zeros((_PIECES,), tl.int32)
    weight_sums = tl.zeros((_PIECES,), tl.int64)
    for tile in range(tl.program_id(1), NUM_TILES, tl.num_programs(1)):
        tokens = tile * TILE + tl.arange(0, TILE)
        distances = distances_of(
            tokens,
            logits + row * logits_stride,
            workspace.scores + row * vocab_size,
            vocab_size,
            changed,
            best,
            temperature,
        )
        keys = keys_of(distances)
        kept = keys < end
        # Number and weight in one sum.
        ones = weights_of(distances, kept) + tl.where(kept, _ONE_TOKEN, 0)
        sums = tl.zeros((_PIECES,), tl.int64) + tl.sum(ones, axis=0)
        for number in tl.static_range(_PIECES - 1):
            up_to_end = tl.where(keys < tl.load(ends + number), ones, 0)
            sums = tl.where(pieces == number, tl.sum(up_to_end, axis=0), sums)
        num_sums += (sums >> _NUM_SHIFT).to(tl.int32)
        weight_sums += sums & (_ONE_TOKEN - 1)
    nums = workspace.piece_nums + row * _PIECES + pieces
    weights = workspace.piece_weights + row * _PIECES + pieces
    tl.atomic_add(nums, num_sums, sem="relaxed")
    tl.atomic_add(weights, weight_sums, sem="relaxed")
    if _is_last(workspace.arrivals + row):
        tl.store(workspace.arrivals + row, 0)
        _choose_piece(workspace.states + row * _WIDTH, nums, weights, ends, slots, slot, MAX_LISTED)


@triton.jit
def _choose_piece(state, nums, weights, ends, slots, slot, MAX_LISTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Begin with top_k if it leaves out any token, else with top_p, in one of the pieces."""
    pieces = tl.arange(0, _PIECES)
    num_sums = tl.load(nums, cache_modifier=".cg").to(tl.int64)
    weight_sums = tl.load(weights, cache_modifier=".cg")
    top_k = slot_int(slots, slot, TOP_K)
    share = slot_wide(slots, slot, TOP_P).to(tl.float64, bitcast=True)
    by_weight = (top_k <= 0) | (top_k >= tl.max(num_sums, axis=0))
    needed = top_k.to(tl.float64)
    measured = num_sums
    if by_weight:
        needed = needed_weight(share, tl.max(weight_sums, axis=0))
        measured = weight_sums
    piece = part_of(measured, pieces, needed)
    zero = slot * 0
    piece_start = tl.full((), 0, tl.int32)
    if piece > 0:
        piece_start = tl.load(ends + piece - 1)
    if (by_weight == 0) | (share < 1.0):
        next_range(
            state,
            by_weight,
            piece_start,
            tl.load(ends + piece),
            up_to(num_sums, pieces, piece - 1, zero),
            up_to(num_sums, pieces, piece, zero),
            up_to(weight_sums, pieces, piece - 1, zero),
            up_to(weight_sums, pieces, piece, zero),
            needed,
            share,
            True,
            MAX_LISTED,
        )


@triton.jit
def _shift(start, end):  # type: ignore[no-untyped-def]
    """Return the power of two that is the length of the range's parts."""
    shift = start * 0
    for bit in tl.static_range(_SPAN_BITS):
        shift += ((end - start - 1) >> (_BIN_BITS + bit) > 0).to(tl.int32)
    return shift


@triton.jit
def _add_to_bins(nums, weights, keys, inside, start, end, by_weight):  # type: ignore[no-untyped-def]
    """Add a tile's tokens to their parts of the range; by weight, numbers do not matter."""
    shift = _shift(start, end)
    bins = (keys - start) >> shift
    # Tokens by the thousand can have one key, and additions to one address take their turns.
    common = tl.max(tl.where(inside, keys, 0), axis=0)
    is_common = inside & (keys == common)
    num_common = tl.sum(is_common.to(tl.int32), axis=0)
    weight = weights_of(-(common.to(tl.float32, bitcast=True)), num_common > 0)
    tl.atomic_add(weights + ((common - start) >> shift), weight * num_common, sem="relaxed")
    rest = inside & (keys != common)
    own = weights_of(-(keys.to(tl.float32, bitcast=True)), rest)
    tl.atomic_add(weights + bins, own, mask=own > 0, sem="relaxed")
    if by_weight == 0:
        tl.atomic_add(nums + ((common - start) >> shift), num_common, sem="relaxed")
        tl.atomic_add(nums + bins, 1, mask=rest, sem="relaxed")


@triton.jit
def _pass_over(  # type: ignore[no-untyped-def]
    distances, workspace, row, mode, start, end, by_weight, MAX_LISTED: tl.constexpr
):
    """List those of some tokens that are in the range, or add them to its parts."""
    keys = keys_of(distances)
    inside = (keys >= start) & (keys < end)
    num_inside = tl.sum(inside.to(tl.int32), axis=0)
    if num_inside > 0:
        if mode == LIST:
            # Tiles come in any order; what is made of the list depends on none.
            first = tl.atomic_add(workspace.list_lengths + row, num_inside, sem="relaxed")
            places = first + tl.cumsum(inside.to(tl.int32), axis=0) - 1
            mask = inside & (places < MAX_LISTED)
            tl.store(workspace.list_keys + row * MAX_LISTED + places, keys, mask=mask)
        else:
            nums = workspace.bin_nums + row * _BINS
            weights = workspace.bin_weights + row * _BINS
            _add_to_bins(nums, weights, keys, inside, start, end, by_weight)


@triton.jit
def _choose_bin(state, nums, weights, start, end, by_weight, share, MAX_LISTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Go on with one part of the range, and clear the sums."""
    bins = tl.arange(0, _BINS)
    num_before = tl.load(state + NUM_BEFORE)
    weight_before = tl.load(state + WEIGHT_BEFORE)
    needed = tl.load(state + NEEDED).to(tl.float64, bitcast=True)
    weight_sums = tl.load(weights + bins, cache_modifier=".cg")
    weight_sums = weight_before + tl.cumsum(weight_sums, axis=0)
    tl.store(weights + bins, tl.zeros((_BINS,), tl.int64))
    shift = _shift(start, end)
    if by_weight:
        part = part_of(weight_sums, bins, needed)
        part_start = start + (part << shift)
        next_range(
            state,
            by_weight,
            part_start,
            tl.minimum(part_start + (1 << shift), end),
            num_before,
            num_before,
            up_to(weight_sums, bins, part - 1, weight_before),
            up_to(weight_sums, bins, part, weight_before),
            needed,
            share,
            False,
            MAX_LISTED,
        )
    else:
        num_sums = tl.load(nums + bins, cache_modifier=".cg")
        num_sums = num_before + tl.cumsum(num_sums, axis=0)
        tl.store(nums + bins, tl.zeros((_BINS,), tl.int32))
        part = part_of(num_sums, bins, needed)
        part_start = start + (part << shift)
        next_range(
            state,
            by_weight,
            part_start,
            tl.minimum(part_start + (1 << shift), end),
            up_to(num_sums, bins, part - 1, num_before),
            up_to(num_sums, bins, part, num_before),
            up_to(weight_sums, bins, part - 1, weight_before),
            up_to(weight_sums, bins, part, weight_before),
            needed,
            share,
            True,
            MAX_LISTED,
        )


@triton.jit(do_not_specialize_on_alignment=["row_slots"])
def narrow_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    row_slots,
    slots,
    workspace,
    vocab_size,
    HAS_MASK: tl.constexpr,
    NUM_TILES: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    MAX_LISTED: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program: some tiles of a row. Goes on with the search."""
    row = tl.program_id(0).to(tl.int64)
    state = workspace.states + row * _WIDTH
    mode = tl.load(state + MODE)
    if (mode == DONE) | (mode == DRAWN):
        return
    slot = tl.load(row_slots + row).to(tl.int64)
    changed = changes_logits(slots, slot, HAS_MASK)
    temperature = slot_float(slots, slot, TEMPERATURE)
    best, _ = best_of_tiles(
        workspace.tile_best, workspace.tile_best_token, row, NUM_TILES, TILES_BLOCK
    )
    start = tl.load(state + START).to(tl.int32)
    end = tl.load(state + END).to(tl.int32)
    by_weight = tl.load(state + BY_WEIGHT) != 0
    list_keys = workspace.list_keys + row * MAX_LISTED
    row_logits = logits + row * logits_stride
    row_scores = workspace.scores + row * vocab_size
    PER_TILE: tl.constexpr = TILE // CHUNK
    FEW: tl.constexpr = (PER_TILE + 3) // 4
    chunk_best = workspace.chunk_best + row * (NUM_TILES * PER_TILE)
    for tile in range(tl.program_id(1), NUM_TILES, tl.num_programs(1)):
        wanted = chunks_before(chunk_best, tile, end, best, temperature, PER_TILE)
        num_wanted = tl.sum(wanted.to(tl.int32), axis=0)
        if num_wanted > FEW:
            tokens = tile * TILE + tl.arange(0, TILE)
            distances = distances_of(
                tokens, row_logits, row_scores, vocab_size, changed, best, temperature
            )
            _pass_over(distances, workspace, row, mode, start, end, by_weight, MAX_LISTED)
        elif num_wanted > 0:
            chunks = first_chunks(wanted, tile, NUM_TILES * PER_TILE, FEW, PER_TILE)
            tokens = tokens_of(chunks, FEW, CHUNK)
            distances = distances_of(
                tokens, row_logits, row_scores, vocab_size, changed, best, temperature
            )
            _pass_over(distances, workspace, row, mode, start, end, by_weight, MAX_LISTED)
    if _is_last(workspace.arrivals + row):
        tl.store(workspace.arrivals + row, 0)
        share = slot_wide(slots, slot, TOP_P).to(tl.float64, bitcast=True)
        if mode == LIST:
            length = tl.load(workspace.list_lengths + row, cache_modifier=".cg")
            search_list(state, list_keys, length, share, MAX_LISTED)
        else:
            nums = workspace.bin_nums + row * _BINS
            weights = workspace.bin_weights + row * _BINS
            _choose_bin(state, nums, weights, start, end, by_weight, share, MAX_LISTED)
