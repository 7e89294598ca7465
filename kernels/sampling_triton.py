"""Choose tokens from logits on a GPU, as `sampling` and the engine's sampler do, without a sort.

    s      = logits, -inf where not allowed, + logit_bias, -inf while min_tokens bans, - penalties
    d      = (s - max s) / temperature                                   float32, at most 0
    floor  = max(log min_p, the k-th largest d); then the d of the last token needed to reach
             top_p of the weight of d >= floor
    token  = argmax s, or where temperature > 0: argmax of d + noise over d >= floor,

where the tokens under -HEAD_NATS, the tail, race as one first (see `sampling`). A token is that
of the reference: words of noise are the same bits, weights are whole numbers in units of 2**-34
and so exact in any order, and equal numbers go to the lowest id. exp and log are the GPU's own, so
tokens can differ where two candidates, or a share and top_p, lie within their rounding.

    prepare    (row, tile of the vocabulary)  s, and the best of each tile and of its chunks
    shortlist  (row)                          where the chunks' best tell that few are kept: their
                                              race; else four ranges of d, one likely to have the
                                              floor
    divide     (row, some tiles)              numbers and weights of the tokens in these ranges
    narrow     (row, some tiles), six times   the same in 2,048 parts of the range with the floor,
                                              down to one value; or a list, once few are left
    race       (row, some tiles)              the tile's best d + noise over the floor
    finish     (row)                          the token

But for the shortlist a floor is found in passes over all tiles at once, never by one program that
reads the row: flat rows and those with a hundred thousand equal logits cost about what others do.
Where few chunks of a tile have tokens over the end of a range, or over the floor, only those are
read. Between passes, a row's state says what is sought (see `sampling_floor_triton`); its last
program to add to the sums chooses what the next pass does. Greedy rows leave all between prepare
and finish at once, as rows without top_k and top_p leave shortlist, divide and narrow, and without
any such row they are not launched. Rows with a token leave all from the shortlist to finish.

A row that changes none of its logits is never copied. Nothing waits for the CPU: what is wrong with
a row is in its `status`, to be read with the token.
"""

from typing import NamedTuple

import torch
import triton

from paceline.kernels.launch import launch
from paceline.kernels.sampling import MAX_VOCAB_SIZE
from paceline.kernels.sampling_finish_triton import finish_kernel
from paceline.kernels.sampling_floor_triton import STATE_WIDTH
from paceline.kernels.sampling_narrow_triton import (
    MAX_TILE,
    NUM_BINS,
    NUM_PASSES,
    NUM_PIECES,
    divide_kernel,
    narrow_kernel,
)
from paceline.kernels.sampling_prepare_triton import prepare_kernel
from paceline.kernels.sampling_race_triton import race_kernel
from paceline.kernels.sampling_shortlist_triton import shortlist_kernel
from paceline.kernels.sampling_slots_triton import SamplingSlots, check_rows

TILE = 4096
"""Tokens of a program. Times with it: bench/results/kernels_h200.json."""
MAX_LISTED = 4096
"""Longest list of a row's keys"""
CHUNK = 128
"""Tokens beside each other of which the best is known, so that they need not be read"""
MAX_SHORT = 1024
"""Most tokens of which a row's token is drawn at once"""
MAX_SHORT_CHUNKS = 256
"""Most chunks that are read for it"""

# Few registers spill, and two programs or more fit on a multiprocessor.
_PREPARE = {"num_warps": 8, "maxnreg": 80}
_DIVIDE = {"num_warps": 8, "maxnreg": 64}
_SHORTLIST = {"num_warps": 8, "maxnreg": 128}
_NARROW = {"num_warps": 8, "maxnreg": 128}
_RACE = {"num_warps": 8, "maxnreg": 128}
_FINISH = {"num_warps": 1}
_NUM_PROGRAMS = 512
"""Of divide, narrow and race, about: two for each place on 132 multiprocessors. More would make
launches dear that leave at once."""


class SampledRows(NamedTuple):
    """What a launch writes, each [R]. Rows without a slot are left as they are."""

    token_ids: torch.Tensor
    """int32; -1 where status is not STATUS_OK"""
    status: torch.Tensor
    """int32; see `sampling_finish_triton`"""
    largest: torch.Tensor
    """float32, the largest logit, or NaN if one is"""


class SamplingWorkspace(NamedTuple):
    """Memory between the kernels of one stream, for R rows in T tiles; needs no filling."""

    scores: torch.Tensor
    """float32 [R, V]: s of the rows that change it"""
    tile_largest: torch.Tensor
    """float32 [R, T], of the logits, or NaN"""
    tile_best: torch.Tensor
    """float32 [R, T], of s"""
    tile_best_token: torch.Tensor
    """int32 [R, T]"""
    chunk_best: torch.Tensor
    """float32 [R, chunks], of s; all tiles have as many"""
    tile_race: torch.Tensor
    """float64 [R, T]: the best d + noise of the head"""
    tile_race_token: torch.Tensor
    """int32 [R, T]"""
    tile_tail_race: torch.Tensor
    """float64 [R, T], of the tail"""
    tile_tail_race_token: torch.Tensor
    """int32 [R, T]"""
    tile_tail_weight: torch.Tensor
    """int64 [R, T]"""
    states: torch.Tensor
    """int64 [R, 8], see `sampling_floor_triton`"""
    arrivals: torch.Tensor
    """int32 [R]: programs of a pass that have added to the sums"""
    piece_ends: torch.Tensor
    """int32 [R, 4]: keys"""
    piece_nums: torch.Tensor
    """int32 [R, 4]"""
    piece_weights: torch.Tensor
    """int64 [R, 4]"""
    bin_nums: torch.Tensor
    """int32 [R, 2048]"""
    bin_weights: torch.Tensor
    """int64 [R, 2048]"""
    list_lengths: torch.Tensor
    """int32 [R]"""
    list_keys: torch.Tensor
    """int32 [R, C]"""
    short_chunks: torch.Tensor
    """int32 [R, 256]"""
    short_keys: torch.Tensor
    """int32 [R, 1024]"""
    short_tokens: torch.Tensor
    """int32 [R, 1024]"""

    @classmethod
    def allocate(
        cls,
        num_rows: int,
        vocab_size: int,
        device: torch.device | str,
        tile: int = TILE,
        max_listed: int = MAX_LISTED,
        chunk: int = CHUNK,
        max_short: int = MAX_SHORT,
    ) -> "SamplingWorkspace":
        """Allocate for up to R rows; 4 V + 4 C + 33 Ki bytes each, and little else."""
        num_tiles = triton.cdiv(vocab_size, tile)

        def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty((num_rows, *shape), dtype=dtype, device=device)

        return cls(
            scores=empty(torch.float32, vocab_size),
            tile_largest=empty(torch.float32, num_tiles),
            tile_best=empty(torch.float32, num_tiles),
            tile_best_token=empty(torch.int32, num_tiles),
            chunk_best=empty(torch.float32, num_tiles * triton.cdiv(tile, chunk)),
            tile_race=empty(torch.float64, num_tiles),
            tile_race_token=empty(torch.int32, num_tiles),
            tile_tail_race=empty(torch.float64, num_tiles),
            tile_tail_race_token=empty(torch.int32, num_tiles),
            tile_tail_weight=empty(torch.int64, num_tiles),
            states=empty(torch.int64, STATE_WIDTH),
            arrivals=empty(torch.int32),
            piece_ends=empty(torch.int32, NUM_PIECES),
            piece_nums=empty(torch.int32, NUM_PIECES),
            piece_weights=empty(torch.int64, NUM_PIECES),
            bin_nums=empty(torch.int32, NUM_BINS),
            bin_weights=empty(torch.int64, NUM_BINS),
            list_lengths=empty(torch.int32),
            list_keys=empty(torch.int32, max_listed),
            short_chunks=empty(torch.int32, MAX_SHORT_CHUNKS),
            short_keys=empty(torch.int32, max_short),
            short_tokens=empty(torch.int32, max_short),
        )


def sample_triton(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    indices: torch.Tensor,
    slots: SamplingSlots,
    out: SampledRows,
    workspace: SamplingWorkspace,
    *,
    allowed_mask: torch.Tensor | None = None,
    any_random: bool = True,
    any_filtered: bool = True,
    tile: int = TILE,
) -> None:
    """Sample one token a row into `out`, and count it into `slots` if its slot has penalties.

    `logits` is [R, V], rows of any stride, and not changed; `row_slots` and `indices` (output
    index) are int32 [R]; a row of slot -1 does nothing. `allowed_mask` is int32 [R, ceil(V / 32)]
    as for the sampler. `any_random=False` promises that every slot is greedy, and
    `any_filtered=False` that none has top_k or top_p; a row whose slot breaks a promise gets
    STATUS_NONE_DRAWN. A slot with penalties has one row. Sizes and the options are of the launch,
    all else is read on the device, so that a launch can be captured. `workspace` was allocated with
    `tile`.
    """
    num_rows, vocab_size = _check(logits, row_slots, indices, slots, out, allowed_mask)
    _check_room(workspace, slots, num_rows, vocab_size, tile)
    if num_rows == 0:
        return
    num_tiles = triton.cdiv(vocab_size, tile)
    num_chunks = workspace.chunk_best.shape[1]
    chunk = num_tiles * tile // num_chunks
    launch(prepare_kernel, (num_rows, num_tiles))(
        logits,
        logits.stride(0),
        row_slots,
        indices,
        slots,
        slots.edits.stride(0),
        allowed_mask,
        0 if allowed_mask is None else allowed_mask.stride(0),
        workspace,
        vocab_size,
        NUM_TILES=num_tiles,
        BINS_BLOCK=triton.next_power_of_2(triton.cdiv(NUM_BINS, num_tiles)),
        TILE=tile,
        CHUNK=chunk,
        # As PyTorch, which rounds each product.
        enable_fp_fusion=False,
        **_PREPARE,
    )
    tiles = {"NUM_TILES": num_tiles, "TILES_BLOCK": triton.next_power_of_2(num_tiles)}
    scored = tiles | {"HAS_MASK": allowed_mask is not None, "TILE": tile}
    # With few rows a program has one tile, with many it has several.
    shared = (num_rows, min(num_tiles, triton.cdiv(_NUM_PROGRAMS, num_rows)))
    drawn = (logits, logits.stride(0), row_slots, indices, slots, workspace, vocab_size)
    if any_random and any_filtered:
        search = scored | {"MAX_LISTED": workspace.list_keys.shape[1]}
        searched = (logits, logits.stride(0), row_slots, slots, workspace, vocab_size)
        launch(shortlist_kernel, (num_rows,))(
            *drawn,
            **tiles,
            HAS_MASK=allowed_mask is not None,
            NUM_CHUNKS=num_chunks,
            CHUNKS_BLOCK=triton.next_power_of_2(num_chunks),
            CHUNK=chunk,
            MAX_CHUNKS=workspace.short_chunks.shape[1],
            MAX_TOKENS=workspace.short_keys.shape[1],
            STEP=max(tile // chunk, 4),
            SAMPLE=tile,
            **_SHORTLIST,
        )
        launch(divide_kernel, shared)(*searched, **search, **_DIVIDE)
        for _ in range(NUM_PASSES):
            launch(narrow_kernel, shared)(*searched, **search, CHUNK=chunk, **_NARROW)
    if any_random:
        launch(race_kernel, shared)(*drawn, **scored, CHUNK=chunk, **_RACE)
    finished = (row_slots, indices, slots, workspace, out, vocab_size)
    done = {"ANY_RANDOM": any_random, "ANY_FILTERED": any_filtered}
    launch(finish_kernel, (num_rows,))(*finished, **tiles, **done, **_FINISH)


def _check(
    logits: torch.Tensor,
    row_slots: torch.Tensor,
    indices: torch.Tensor,
    slots: SamplingSlots,
    out: SampledRows,
    allowed_mask: torch.Tensor | None,
) -> tuple[int, int]:
    check_rows(logits, row_slots=row_slots, indices=indices)
    num_rows, vocab_size = logits.shape
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"the vocabulary has {vocab_size} tokens, not 1 to {MAX_VOCAB_SIZE}")
    if any(len(tensor) < num_rows or not tensor.is_contiguous() for tensor in out):
        raise ValueError(f"out has room for {len(out.token_ids)} rows, and {num_rows} are sampled")
    if any(not tensor.is_contiguous() for tensor in slots):
        raise ValueError("the slots' tensors must be contiguous")
    num_words = triton.cdiv(vocab_size, 32)
    if allowed_mask is not None and (
        allowed_mask.dtype != torch.int32
        or allowed_mask.shape != (num_rows, num_words)
        or allowed_mask.stride(1) != 1
    ):
        raise ValueError(
            f"allowed_mask must be int32 [{num_rows}, {num_words}], got {allowed_mask.dtype} "
            f"{list(allowed_mask.shape)}"
        )
    return num_rows, vocab_size


def _check_room(
    workspace: SamplingWorkspace, slots: SamplingSlots, num_rows: int, vocab_size: int, tile: int
) -> None:
    room, width = workspace.scores.shape
    num_tiles = workspace.tile_best.shape[1]
    if tile > MAX_TILE or tile % 4 or tile & (tile - 1):
        raise ValueError(f"a tile must be a power of two from 4 to {MAX_TILE}, got {tile}")
    chunk = num_tiles * tile // workspace.chunk_best.shape[1]
    if chunk < 4 or chunk & (chunk - 1):
        raise ValueError(f"a chunk must be a power of two from 4 to the tile, got {chunk}")
    if room < num_rows or width != vocab_size or num_tiles != triton.cdiv(vocab_size, tile):
        raise ValueError(
            f"the workspace is for {room} rows of {width} tokens in {num_tiles} tiles, and "
            f"{num_rows} rows of {vocab_size} in tiles of {tile} are sampled"
        )
    if slots.seen.shape[1] != vocab_size:
        raise ValueError(
            f"the slots are for {slots.seen.shape[1]} tokens, and rows of {vocab_size} are sampled"
        )
