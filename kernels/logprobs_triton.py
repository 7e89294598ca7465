"""Log-probabilities of the token chosen and of the best ones, on a GPU, without a sort.

    logprob(t) = x_t - max x - log(sum over u of exp(x_u - max x))        float32

of the logits as the model gave them; logits [R, V] float32, float16 or bfloat16. The best n of a
row are the best n of the best n of its tiles; equals go to the lowest id.

    tile    (row, tile of the vocabulary)   the tile's best n, one after the other, and its sum
    merge   (row)                           the row's best n among those, and the sums together
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

TILE = 1024
"""Tokens of a program. Unmeasured so far."""


class TokenLogprobs(NamedTuple):
    """Of R rows; rows not wanted are left as they are."""

    own: torch.Tensor
    """float32 [R], of the token chosen"""
    values: torch.Tensor
    """float32 [R, n], largest first"""
    token_ids: torch.Tensor
    """int32 [R, n]"""

    @classmethod
    def allocate(cls, num_rows: int, num_best: int, device: torch.device | str) -> "TokenLogprobs":
        """Allocate for up to R rows and n tokens each."""
        shape = (num_rows, num_best)
        return cls(
            torch.empty(num_rows, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.int32, device=device),
        )


class LogprobsWorkspace(NamedTuple):
    """Memory between the two kernels; needs no filling."""

    sums: torch.Tensor
    """float32 [2, R, T]: the largest logit and the sum of exp(x - largest) of each tile"""
    values: torch.Tensor
    """float32 [R, T, n]"""
    token_ids: torch.Tensor
    """int32 [R, T, n]"""

    @classmethod
    def allocate(
        cls,
        num_rows: int,
        vocab_size: int,
        num_best: int,
        device: torch.device | str,
        tile: int = TILE,
    ) -> "LogprobsWorkspace":
        """Allocate for up to R rows and exactly n tokens each."""
        num_tiles = triton.cdiv(vocab_size, tile)
        shape = (num_rows, num_tiles, num_best)
        return cls(
            torch.empty((2, num_rows, num_tiles), dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.int32, device=device),
        )


def logprobs_triton(
    logits: torch.Tensor,
    chosen: torch.Tensor,
    wanted: torch.Tensor,
    out: TokenLogprobs,
    workspace: LogprobsWorkspace,
    tile: int = TILE,
) -> None:
    """Write the log-probabilities of the rows whose `wanted`, bool [R], is set.

    `logits` has rows of any stride; `chosen` is int32 [R]. n is that of `out`, at most V; a row
    that wants fewer takes the first of them. `workspace` was allocated with `tile`.
    """
    if logits.dim() != 2 or logits.dtype not in _DTYPES or logits.stride(1) != 1:
        raise ValueError(
            f"logits must be [R, V] of one of {_DTYPES} with a row's elements beside each other, "
            f"got {logits.dtype} {list(logits.shape)} of strides {logits.stride()}"
        )
    num_rows, vocab_size = logits.shape
    for name, tensor, dtype in (
        ("chosen", chosen, torch.int32),
        ("wanted", wanted, torch.bool),
    ):
        if tensor.dtype != dtype or tensor.shape != (num_rows,) or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {dtype} [{num_rows}], got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
    num_best = out.values.shape[1]
    if len(out.own) < num_rows or num_best > vocab_size:
        raise ValueError(
            f"out is for {len(out.own)} rows and {num_best} tokens each; there are {num_rows} "
            f"rows of {vocab_size} tokens"
        )
    room, num_tiles, width = workspace.values.shape
    if room < num_rows or num_tiles != triton.cdiv(vocab_size, tile) or width != num_best:
        raise ValueError(
            f"the workspace is for {room} rows in {num_tiles} tiles and {width} tokens each, not "
            f"{num_rows} rows of {vocab_size} tokens in tiles of {tile} and {num_best} tokens each"
        )
    if any(not tensor.is_contiguous() for tensor in (*out, *workspace)):
        raise ValueError("out and workspace must be contiguous")
    if num_rows == 0:
        return
    _tile_kernel[(num_rows, num_tiles)](
        logits, logits.stride(0), wanted, *workspace, room, vocab_size, num_best, TILE=tile
    )
    _merge_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        chosen,
        wanted,
        *workspace,
        room,
        *out,
        num_tiles,
        num_best,
        TILES_BLOCK=triton.next_power_of_2(num_tiles),
        BEST_BLOCK=triton.next_power_of_2(max(num_tiles * num_best, 1)),
    )


@triton.jit
def _take_best(values, tokens):  # type: ignore[no-untyped-def]
    """Return the largest value, the lowest token that has it, and the tokens without it.

    Tokens taken have the id 2**31 - 1, and -inf is a value like any other.
    """
    free = tokens < 2147483647
    best = tl.max(tl.where(free, values, float("-inf")), axis=0)
    token = tl.min(tl.where(free & (values == best), tokens, 2147483647), axis=0)
    return best, token, tl.where(tokens == token, 2147483647, tokens)


@triton.jit
def _tile_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    wanted,
    sums,
    best_values,
    best_tokens,
    max_rows,
    vocab_size,
    num_best,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    num_tiles = tl.num_programs(1)
    if tl.load(wanted + row) == 0:
        return
    tokens = tile * TILE + tl.arange(0, TILE)
    inside = tokens < vocab_size
    values = tl.load(logits + row * logits_stride + tokens, mask=inside, other=float("-inf"))
    values = values.to(tl.float32)
    largest = tl.max(values, axis=0)
    # A tile of nothing but -inf adds nothing, rather than exp(-inf + inf).
    base = tl.where(largest == float("-inf"), 0.0, largest)
    place = row * num_tiles + tile
    tl.store(sums + place, largest)
    tl.store(sums + max_rows * num_tiles + place, tl.sum(tl.exp(values - base), axis=0))
    tokens = tl.where(inside, tokens, 2147483647)
    for rank in range(num_best):
        best, token, tokens = _take_best(values, tokens)
        tl.store(best_values + place * num_best + rank, best)
        tl.store(best_tokens + place * num_best + rank, token)


@triton.jit
def _merge_kernel(  # type: ignore[no-untyped-def]
    logits,
    logits_stride,
    chosen,
    wanted,
    sums,
    tile_values,
    tile_tokens,
    max_rows,
    own,
    out_values,
    out_tokens,
    num_tiles,
    num_best,
    TILES_BLOCK: tl.constexpr,
    BEST_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(wanted + row) == 0:
        return
    tiles = tl.arange(0, TILES_BLOCK)
    exists = tiles < num_tiles
    places = row * num_tiles + tiles
    tile_best = tl.load(sums + places, mask=exists, other=float("-inf"))
    tile_sum = tl.load(sums + max_rows * num_tiles + places, mask=exists, other=0.0)
    largest = tl.max(tile_best, axis=0)
    scale = largest + tl.log(tl.sum(tile_sum * tl.exp(tile_best - largest), axis=0))
    token = tl.load(chosen + row)
    if token >= 0:
        value = tl.load(logits + row * logits_stride + token).to(tl.float32)
        tl.store(own + row, value - scale)
    candidates = tl.arange(0, BEST_BLOCK)
    exists = candidates < num_tiles * num_best
    places = row * num_tiles * num_best + candidates
    values = tl.load(tile_values + places, mask=exists, other=float("-inf"))
    tokens = tl.load(tile_tokens + places, mask=exists, other=2147483647)
    for rank in range(num_best):
        best, token, tokens = _take_best(values, tokens)
        tl.store(out_values + row * num_best + rank, best - scale)
        tl.store(out_tokens + row * num_best + rank, token)
