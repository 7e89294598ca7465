"""Cut the contexts of a decode step into shares, one for each program, on the device.

    tiles[r]         = ceil((lengths[r] - low[r]) / block_n)         low: first token that is seen
    tile_ends[r]     = tiles[0] + ... + tiles[r]
    share p          = tiles [begin, end) of all rows', one after another

Programs of `decode_attention_kernel` take a share each. Shares are *even*, over the borders of
rows, so that all programs end together however long the rows are:

    rows     |0                     |1  |2     |3 |
    shares   |0       |1       |2       |3        |

or, where rows are of about one length, *aligned*: the same number of parts of every row. Then no
share begins a second row, and where there is one part, none is merged. Which ends sooner is
estimated from the sum, the number and the maximum of the rows' tiles.

A row of no length, or longer than `max_length`, has no tiles. One program does all of it, once for
the attention of all layers that see as far back.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from paceline.kernels.decode_tiles import DecodeTiles
from paceline.kernels.launch import launch

RECORD_WORDS = 8
RECORD: tl.constexpr = tl.constexpr(RECORD_WORDS)
_WIDTH = 256
"""Rows taken at a time"""
_MOST_PARTS = 16
"""Of a row in aligned shares: they are merged one after another"""


class DecodeShares(NamedTuple):
    """Who attends to what; int32. Owned by the caller, who keeps it as long as a graph uses it."""

    records: torch.Tensor
    """[8 P] of each share: its first and last row (0 and -1: no tiles); its tiles [begin, end); and
    of its part of the first row the first of the row's tiles and the end in tokens, of the row the
    length and the first tile.

    All that a program needs to begin, since it would wait for each word that tells it of another.
    """
    tile_ends: torch.Tensor
    """[R]"""
    row_parts: torch.Tensor
    """[2 R] of each row the place of its first part, which is twice its share, and 1 more if that
    begins with another row; and the number of its parts"""

    @classmethod
    def allocate(
        cls, num_rows: int, num_programs: int, device: torch.device | str
    ) -> "DecodeShares":
        """Allocate for up to R rows and P programs."""
        sizes = (RECORD_WORDS * num_programs, num_rows, 2 * num_rows)
        return cls(*(torch.empty(size, dtype=torch.int32, device=device) for size in sizes))


@triton.jit
def _read_rows(  # type: ignore[no-untyped-def]
    lengths_ptr,
    row,
    num_rows,
    max_length,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    length = tl.load(lengths_ptr + row, mask=row < num_rows, other=0)
    length = tl.where(length <= max_length, tl.maximum(length, 0), 0)
    low = tl.zeros_like(length)
    if WINDOW is not None:
        low = tl.maximum(length - TOKENS + 1 - WINDOW, 0)
    return length, low, tl.cdiv(length - low, BLOCK_N)


@triton.jit
def _parts_of_aligned_rows(  # type: ignore[no-untyped-def]
    total,
    longest,
    num_filled,
    SHARES: tl.constexpr,
    START_TILES: tl.constexpr,
    MOST: tl.constexpr,
    ONE_ROW: tl.constexpr,
):
    """Return the parts of each row, if aligned shares end no later than even ones, else 0.

    Programs beyond SHARES run behind the others. Few programs finish their tiles sooner than many,
    but not in less than 0.8 of the time. All in tenths of what a tile takes beside SHARES programs.
    """
    num_filled = tl.maximum(num_filled, 1)
    parts = tl.minimum(tl.maximum(SHARES // num_filled, 1), MOST)
    num_programs = num_filled * parts
    num_before = (num_programs - 1) // SHARES
    num_last = num_programs - num_before * SHARES
    turns = 10 * num_before + tl.maximum(10 * num_last // SHARES, 8)
    aligned = longest.to(tl.int64) * turns
    even = parts.to(tl.int64) * 10 * (total // SHARES + START_TILES)
    if not ONE_ROW:
        parts = tl.where(aligned <= even, parts, 0)
    return parts


@triton.jit(do_not_specialize=["num_rows", "num_programs", "max_length"])
def _share_kernel(  # type: ignore[no-untyped-def]
    lengths_ptr,
    records_ptr,
    tile_ends_ptr,
    row_parts_ptr,
    num_rows,
    num_programs,
    max_length,
    TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHARES: tl.constexpr,
    START_TILES: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    ONE_ROW: tl.constexpr,
    PLACES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    total = tl.zeros([], tl.int32)
    longest = tl.zeros([], tl.int32)
    num_filled = tl.zeros([], tl.int32)
    for start in range(0, num_rows, WIDTH):
        row = start + tl.arange(0, WIDTH)
        _length, _low, num_tiles = _read_rows(
            lengths_ptr, row, num_rows, max_length, TOKENS, WINDOW, BLOCK_N
        )
        total += tl.sum(num_tiles, 0)
        longest = tl.maximum(longest, tl.max(num_tiles, 0))
        num_filled += tl.sum((num_tiles > 0).to(tl.int32), 0)
    parts = _parts_of_aligned_rows(
        total, longest, num_filled, SHARES, START_TILES, MOST_PARTS, ONE_ROW
    )
    num_even = tl.minimum(total, SHARES)
    divisor = tl.maximum(total, 1).to(tl.int64)
    whole = total // tl.maximum(num_even, 1)
    rest = total - whole * num_even  # share p begins at p total // S = p whole + p rest // S

    tiles_ahead = tl.zeros([], tl.int32)
    shares_ahead = tl.zeros([], tl.int32)
    for start in range(0, num_rows, WIDTH):
        row = start + tl.arange(0, WIDTH)
        length, low, num_tiles = _read_rows(
            lengths_ptr, row, num_rows, max_length, TOKENS, WINDOW, BLOCK_N
        )
        last = tiles_ahead + tl.cumsum(num_tiles, 0)
        first = last - num_tiles
        own = tl.minimum(num_tiles, parts)
        first_share = shares_ahead + tl.cumsum(own, 0) - own
        shares_ahead += tl.sum(own, 0)
        tiles_ahead += tl.sum(num_tiles, 0)
        if parts == 0:
            # Share p has tile t if p total < (t + 1) S <= (p + 1) total.
            first_share = (((first + 1).to(tl.int64) * num_even - 1) // divisor).to(tl.int32)
            last_share = ((last.to(tl.int64) * num_even - 1) // divisor).to(tl.int32)
            own = tl.where(num_tiles > 0, last_share - first_share + 1, 0)
        divider = tl.maximum(num_even, 1)
        begins_ahead = first_share * whole + first_share * rest // divider < first
        begins_ahead = (parts == 0) & begins_ahead & (num_tiles > 0)
        tl.store(tile_ends_ptr + row, last, mask=row < num_rows)
        first_place = 2 * first_share + begins_ahead.to(tl.int32)
        tl.store(row_parts_ptr + 2 * row, first_place, mask=row < num_rows)
        tl.store(row_parts_ptr + 2 * row + 1, own, mask=row < num_rows)
        for number in range(tl.max(own, 0)):
            share = first_share + number
            if parts == 0:
                begin = share * whole + share * rest // divider
                end = (share + 1) * whole + (share + 1) * rest // divider
            else:
                begin = first + number * num_tiles // tl.maximum(own, 1)
                end = first + (number + 1) * num_tiles // tl.maximum(own, 1)
            exists = number < own
            begins = exists & (begin >= first)
            record = records_ptr + RECORD * share
            tl.store(record, row, mask=begins)
            tl.store(record + 1, row, mask=exists & (end <= last))
            tl.store(record + 2, begin, mask=begins)
            tl.store(record + 3, end, mask=begins)
            stop = low + (tl.minimum(end, last) - first) * BLOCK_N
            tl.store(record + 4, begin - first, mask=begins)
            tl.store(record + 5, tl.minimum(stop, length), mask=begins)
            tl.store(record + 6, length, mask=begins)
            tl.store(record + 7, first, mask=begins)
    num_shares = tl.where(parts == 0, num_even, shares_ahead)
    place = tl.arange(0, PLACES)
    unused = (place >= num_shares) & (place < num_programs)
    for word in tl.static_range(RECORD):
        value = tl.zeros_like(place)
        if word == 1:
            value -= 1
        tl.store(records_ptr + RECORD * place + word, value, mask=unused)


def share_rows_triton(
    lengths: torch.Tensor,
    tiles: DecodeTiles,
    *,
    num_tokens: int = 1,
    window: int | None = None,
    max_length: int,
    shares: DecodeShares | None = None,
) -> DecodeShares:
    """Return the shares of R rows, R > 0, whose newest `num_tokens` tokens attend.

    shares: where they go, as `allocate` makes it for as many rows or more; None allocates.
    """
    num_rows = lengths.shape[0]
    num_programs = tiles.num_programs(num_rows)
    if shares is None:
        shares = DecodeShares.allocate(num_rows, num_programs, lengths.device)
    check_shares(shares, num_rows, num_programs, lengths.device)
    if lengths.dtype is not torch.int32 or lengths.dim() != 1 or not lengths.is_contiguous():
        raise ValueError(
            f"lengths must be contiguous int32 [rows], got {lengths.dtype} {list(lengths.shape)} "
            f"of strides {list(lengths.stride())}"
        )
    launch(_share_kernel, (1,))(
        lengths,
        *shares,
        num_rows,
        num_programs,
        max_length,
        TOKENS=num_tokens,
        WINDOW=window,
        BLOCK_N=tiles.block_n,
        SHARES=tiles.num_shares,
        START_TILES=tiles.start_tiles,
        ONE_ROW=tiles.one_row,
        MOST_PARTS=_MOST_PARTS,
        PLACES=triton.next_power_of_2(num_programs),
        WIDTH=_WIDTH,
    )
    return shares


def check_shares(
    shares: DecodeShares, num_rows: int, num_programs: int, device: torch.device
) -> None:
    """Raise ValueError unless these hold so many rows and programs."""
    sizes = (RECORD_WORDS * num_programs, num_rows, 2 * num_rows)
    for name, tensor, needed in zip(shares._fields, shares, sizes, strict=True):
        if (
            tensor.dtype is not torch.int32
            or tensor.dim() != 1
            or not tensor.is_contiguous()
            or tensor.shape[0] < needed
            or tensor.device != device
        ):
            raise ValueError(
                f"the shares' {name} must be contiguous int32 [{needed}] or longer on {device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
