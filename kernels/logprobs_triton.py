"""Log-probabilities of the token chosen and of the best ones, on a GPU, without a sort.

    logprob(t) = x_t - max x - log(sum over u of exp(x_u - max x))        float32

of the logits as the model gave them; logits [R, V] float32, float16 or bfloat16. The best n of a
row are the best n of the best n of its tiles; equals go to the lowest id. Each row's slot says on
the device whether it wants any, and its n.

    tile    (row, tile of the vocabulary)   the tile's best n, one after the other, and its sum
    merge   (row)                           the row's best n among those, and the sums together
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from paceline.kernels.launch import launch
from paceline.kernels.sampling_slots_triton import (
    NUM_LOGPROBS,
    SamplingSlots,
    check_rows,
    slot_int,
)

_TAKEN: tl.constexpr = tl.constexpr(2**31 - 1)

TILE = 1024
"""Tokens of a program. Not timed."""


class TokenLogprobs(NamedTuple):
    """Of R rows; of those that want none, only the counts are written."""

    counts: torch.Tensor
    """int32 [R], how many of the best n the row wants; -1: no log-probabilities at all"""
    own: torch.Tensor
    """float32 [R], of the token chosen"""
    best: torch.Tensor
    """float32 [R, N], largest first; the first n are written"""
    token_ids: torch.Tensor
    """int32 [R, N]"""


class LogprobsWorkspace(NamedTuple):
    """Memory between the two kernels, for R rows in T tiles; needs no filling."""

    tile_largest: torch.Tensor
    """float32 [R, T]"""
    tile_sum: torch.Tensor
    """float32 [R, T], of exp(x - largest)"""
    tile_best: torch.Tensor
    """float32 [R, T, N], of the logits"""
    tile_token_ids: torch.Tensor
    """int32 [R, T, N]"""

    @classmethod
    def allocate(
        cls,
        num_rows: int,
        vocab_size: int,
        max_best: int,
        device: torch.device | str,
        tile: int = TILE,
    ) -> "LogprobsWorkspace":
        """Allocate for up to R rows and N tokens each."""
        shape = (num_rows, triton.cdiv(vocab_size, tile))
        return cls(
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty((*shape, max_best), dtype=torch.float32, device=device),
            torch.empty((*shape, max_best), dtype=torch.int32, device=device),
        )


def logprobs_triton(
    logits: torch.Tensor,
    chosen: torch.Tensor,
    row_slots: torch.Tensor,
    slots: SamplingSlots,
    out: TokenLogprobs,
    workspace: LogprobsWorkspace,
    tile: int = TILE,
) -> None:
    """Write the log-probabilities of the rows whose slots want any.

    `logits` has rows of any stride; `chosen` and `row_slots` (-1: none) are int32 [R]. No slot
    wants more than N or V. `workspace` was allocated with `tile`.
    """
    _check(logits, chosen, row_slots, out, workspace, tile)
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return
    num_tiles, max_best = workspace.tile_best.shape[1:]
    row_arguments = (logits, logits.stride(0), row_slots, slots, workspace)
    launch(_tile_kernel, (num_rows, num_tiles))(
        *row_arguments, vocab_size, NUM_TILES=num_tiles, MAX_BEST=max_best, TILE=tile
    )
    launch(_merge_kernel, (num_rows,))(
        *row_arguments,
        chosen,
        out,
        NUM_TILES=num_tiles,
        MAX_BEST=max_best,
        TILES_BLOCK=triton.next_power_of_2(num_tiles),
        BEST_BLOCK=triton.next_power_of_2(num_tiles * max_best),
    )


def _check(
    logits: torch.Tensor,
    chosen: torch.Tensor,
    row_slots: torch.Tensor,
    out: TokenLogprobs,
    workspace: LogprobsWorkspace,
    tile: int,
) -> None:
    check_rows(logits, chosen=chosen, row_slots=row_slots)
    num_rows, vocab_size = logits.shape
    room, num_tiles, max_best = workspace.tile_best.shape
    if room < num_rows or num_tiles != triton.cdiv(vocab_size, tile):
        raise ValueError(
            f"the workspace is for {room} rows in {num_tiles} tiles, not {num_rows} rows of "
            f"{vocab_size} tokens in tiles of {tile}"
        )
    if len(out.own) < num_rows or max_best < 1 or out.best.shape[1] != max_best:
        raise ValueError(
            f"out is for {len(out.own)} rows and {out.best.shape[1]} tokens each; there are "
            f"{num_rows} rows, and the workspace is for {max_best} tokens each"
        )
    if any(not tensor.is_contiguous() for tensor in (*out, *workspace)):
        raise ValueError("out and workspace must be contiguous")


@triton.jit
def _num_wanted(row_slots, row, slots):  # type: ignore[no-untyped-def]
    slot = tl.load(row_slots + row).to(tl.int64)
    wanted = tl.full((), -1, tl.int32)
    if slot >= 0:
        wanted = slot_int(slots, slot, NUM_LOGPROBS)
    return wanted


@triton.jit
def _take_best(values, tokens):  # type: ignore[no-untyped-def]
    """Return the largest value, the lowest token that has it, and the tokens without it.

    -inf is a value like any other.
    """
    free = tokens < _TAKEN
    best = tl.max(tl.where(free, values, float("-inf")), axis=0)
    token = tl.min(tl.where(free & (values == best), tokens, _TAKEN), axis=0)
    return best, token, tl.where(tokens == token, _TAKEN, tokens)


@triton.jit(do_not_specialize_on_alignment=["row_slots"])
def _tile_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    row_slots,
    slots,
    workspace,
    vocab_size,
    NUM_TILES: tl.constexpr,
    MAX_BEST: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    num_wanted = _num_wanted(row_slots, row, slots)
    if num_wanted < 0:
        return
    tokens = tile * TILE + tl.arange(0, TILE)
    inside = tokens < vocab_size
    values = tl.load(logits + row * logits_stride + tokens, mask=inside, other=float("-inf"))
    values = values.to(tl.float32)
    largest = tl.max(values, axis=0)
    # A tile of nothing but -inf adds nothing, rather than exp(-inf + inf).
    base = tl.where(largest == float("-inf"), 0.0, largest)
    place = row * NUM_TILES + tile
    tl.store(workspace.tile_largest + place, largest)
    tl.store(workspace.tile_sum + place, tl.sum(tl.exp(values - base), axis=0))
    tokens = tl.where(inside, tokens, _TAKEN)
    for rank in range(num_wanted):
        best, token, tokens = _take_best(values, tokens)
        tl.store(workspace.tile_best + place * MAX_BEST + rank, best)
        tl.store(workspace.tile_token_ids + place * MAX_BEST + rank, token)


@triton.jit(do_not_specialize_on_alignment=["row_slots"])
def _merge_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    row_slots,
    slots,
    workspace,
    chosen,
    out,
    NUM_TILES: tl.constexpr,
    MAX_BEST: tl.constexpr,
    TILES_BLOCK: tl.constexpr,
    BEST_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    num_wanted = _num_wanted(row_slots, row, slots)
    tl.store(out.counts + row, num_wanted)
    if num_wanted < 0:
        return
    tiles = tl.arange(0, TILES_BLOCK)
    exists = tiles < NUM_TILES
    places = row * NUM_TILES + tiles
    tile_best = tl.load(workspace.tile_largest + places, mask=exists, other=float("-inf"))
    tile_sum = tl.load(workspace.tile_sum + places, mask=exists, other=0.0)
    largest = tl.max(tile_best, axis=0)
    scale = largest + tl.log(tl.sum(tile_sum * tl.exp(tile_best - largest), axis=0))
    token = tl.load(chosen + row)
    if token >= 0:
        value = tl.load(logits + row * logits_stride + token).to(tl.float32)
        tl.store(out.own + row, value - scale)
    candidates = tl.arange(0, BEST_BLOCK)
    exists = (candidates < NUM_TILES * MAX_BEST) & (candidates % MAX_BEST < num_wanted)
    places = row * NUM_TILES * MAX_BEST + candidates
    values = tl.load(workspace.tile_best + places, mask=exists, other=float("-inf"))
    tokens = tl.load(workspace.tile_token_ids + places, mask=exists, other=_TAKEN)
    for rank in range(num_wanted):
        best, token, tokens = _take_best(values, tokens)
        tl.store(out.best + row * MAX_BEST + rank, best - scale)
        tl.store(out.token_ids + row * MAX_BEST + rank, token)
