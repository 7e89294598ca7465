"""Shares of a decode step are all tiles of all rows, each once, and about as long as each other."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from decode_cut import NEVER
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_device import device

from paceline.kernels.decode_shares_triton import DecodeShares, share_rows_triton
from paceline.kernels.decode_tiles import DecodeTiles

MAX_LENGTH = 900


class Found(NamedTuple):
    records: list[list[int]]
    tile_ends: list[int]
    row_parts: list[list[int]]


def share(lengths: list[int], tiles: DecodeTiles, **options: object) -> Found:
    """Share on the device, in buffers of which the rest must stay as it is."""
    num_rows, num_programs = len(lengths), tiles.num_programs(len(lengths))
    shares = DecodeShares.allocate(num_rows + 3, num_programs + 2, device())
    for part in shares:
        part.fill_(-7)
    tensor = torch.tensor(lengths, dtype=torch.int32, device=device())
    found = share_rows_triton(tensor, tiles, max_length=MAX_LENGTH, shares=shares, **options)  # type: ignore[arg-type]
    sizes = (8 * num_programs, num_rows, 2 * num_rows)
    for part, size in zip(found, sizes, strict=True):
        assert (part[size:] == -7).all()
    records, tile_ends, row_parts = (
        part[:size].cpu() for part, size in zip(found, sizes, strict=True)
    )
    return Found(records.view(-1, 8).tolist(), tile_ends.tolist(), row_parts.view(-1, 2).tolist())


def seen_tokens(length: int, num_tokens: int, window: int | None) -> range:
    if not 0 < length <= MAX_LENGTH:
        return range(0)
    return range(0 if window is None else max(length - num_tokens + 1 - window, 0), length)


def check(
    found: Found,
    lengths: list[int],
    tiles: DecodeTiles,
    num_tokens: int = 1,
    window: int | None = None,
) -> bool:
    """Compare with the rows' tiles; return whether the shares are aligned."""
    seen = [seen_tokens(length, num_tokens, window) for length in lengths]
    counts = [-(-len(tokens) // tiles.block_n) for tokens in seen]
    owners = [row for row, count in enumerate(counts) for _ in range(count)]
    ends = [0, *torch.tensor(counts).cumsum(0).tolist()]
    assert found.tile_ends == ends[1:]
    used = [p for p, record in enumerate(found.records) if record[0] <= record[1]]
    assert used == list(range(len(used)))
    bounds = [found.records[p][2] for p in used] + [len(owners)]
    assert bounds[0] == 0
    for p, (begin, end) in enumerate(pairwise(bounds)):
        assert begin < end
        row, first = owners[begin], ends[owners[begin]]
        tokens = seen[row][(begin - first) * tiles.block_n :][: (end - begin) * tiles.block_n]
        assert found.records[p] == [
            *(row, owners[end - 1], begin, end, begin - first, tokens.stop, lengths[row], first)
        ]
    assert all(record == [0, -1, 0, 0, 0, 0, 0, 0] for record in found.records[len(used) :])
    holders: list[list[int]] = [[] for _ in counts]
    for p in used:
        for row in sorted(set(owners[bounds[p] : bounds[p + 1]])):
            holders[row].append(p)
    for row, held in enumerate(holders):
        assert found.row_parts[row][1] == len(held)
        assert not held or found.row_parts[row][0] == 2 * held[0] + (bounds[held[0]] < ends[row])
    sizes = [end - begin for begin, end in pairwise(bounds)]
    is_even = not sizes or (max(sizes) - min(sizes) <= 1 and len(sizes) <= tiles.num_shares)
    parts = max(map(len, holders))
    is_aligned = all(
        len(held) == min(parts, count) for held, count in zip(holders, counts, strict=True)
    ) and all(found.records[p][0] == found.records[p][1] for p in used)
    assert is_even or is_aligned
    return is_aligned


@settings(deadline=None)
@pytest.mark.parametrize(("num_tokens", "window"), [(1, None), (1, 40), (3, 200), (3, 2)])
@given(
    lengths=st.one_of(
        st.lists(st.integers(-1, MAX_LENGTH + 20), min_size=1, max_size=12),
        st.lists(st.sampled_from([0, 300, 310]), min_size=1, max_size=40),
    ),
    num_shares=st.integers(1, 40),
    block_n=st.sampled_from([16, 64]),
)
def test_every_tile_is_in_one_share(
    num_tokens: int, window: int | None, lengths: list[int], num_shares: int, block_n: int
) -> None:
    tiles = DecodeTiles(16, block_n, num_shares)
    found = share(lengths, tiles, num_tokens=num_tokens, window=window)
    check(found, lengths, tiles, num_tokens, window)


@pytest.mark.parametrize(
    ("lengths", "is_aligned"),
    [
        ([320] * 64, True),
        ([320] * 22, True),  # three parts each
        ([320] * 128, True),  # two rows behind each other
        ([320] * 72, False),  # six rows would run behind the others alone
        ([100] * 63 + [900], False),
        ([16] * 30 + [0] * 30 + [900] * 4, False),
    ],
)
def test_rows_are_cut_evenly_where_that_ends_sooner(lengths: list[int], is_aligned: bool) -> None:
    tiles = DecodeTiles(16, 16, 66)
    assert check(share(lengths, tiles), lengths, tiles) is is_aligned


def test_no_share_is_of_two_rows_where_the_kernel_expects_none() -> None:
    """However much sooner even shares would end."""
    lengths = [900, *[16] * 40, 0, 30]
    tiles = DecodeTiles(16, 16, 8, start_tiles=NEVER, one_row=True)
    assert check(share(lengths, tiles), lengths, tiles)


def test_more_rows_than_are_taken_at_a_time() -> None:
    for lengths in ([0] * 300 + [64, 32] * 200 + [0] * 40, [64] * 700 + [900] * 3):
        tiles = DecodeTiles(16, 32, 7)
        check(share(lengths, tiles), lengths, tiles)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((2, 4), r"tile_ends must be contiguous int32 \[3\]"),
        ((3, 3), r"records must be contiguous int32 \[32\]"),
    ],
)
def test_shares_that_do_not_fit_are_refused(shares: tuple[int, int], message: str) -> None:
    lengths = torch.zeros(3, dtype=torch.int32, device=device())
    allocated = DecodeShares.allocate(*shares, device())
    with pytest.raises(ValueError, match=message):
        share_rows_triton(lengths, DecodeTiles(16, 16, 4), max_length=9, shares=allocated)


def test_lengths_of_another_kind_are_refused() -> None:
    lengths = torch.zeros(3, dtype=torch.int64, device=device())
    with pytest.raises(ValueError, match="lengths must be contiguous int32"):
        share_rows_triton(lengths, DecodeTiles(16, 16, 4), max_length=9)
