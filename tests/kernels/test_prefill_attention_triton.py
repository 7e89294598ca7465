"""Chunks of many sequences, however cut into tiles, attend as plain causal attention does."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from paged_context import LAYER, Paged, make_paged, plain_attention
from triton_device import device, poisoned

from paceline.kernels.prefill_attention_triton import DTYPES, prefill_attention_triton
from paceline.kernels.prefill_tiles import (
    PrefillTiles,
    TileTable,
    choose_tiles,
    make_tile_table,
)

# Outputs are averages of values near 1. float32: exp2 of the hardware and the order of sums. The
# others: weights and outputs are each rounded, to 2**-11 of float16; bfloat16 has 2**-8, and the
# interpreter cuts it instead of rounding, twice as far and always down.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}

SCALE = 0.2


class Case(NamedTuple):
    """Rows with `starts` tokens before `counts` new ones, in a pool whose unused places are NaN."""

    paged: Paged
    starts: np.ndarray
    counts: np.ndarray
    q: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        return on_device(self.starts + self.counts)

    @property
    def offsets(self) -> torch.Tensor:
        return on_device(np.concatenate(([0], np.cumsum(self.counts))))

    @property
    def tables(self) -> torch.Tensor:
        return on_device(self.paged.tables)

    def attend(
        self, tiles: PrefillTiles, window: int | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return prefill_attention_triton(
            self.q,
            self.paged.kv,
            LAYER,
            self.tables,
            self.lengths,
            self.offsets,
            table_on_device(make_tile_table(self.starts, self.counts, tiles)),
            SCALE,
            window=window,
            out=poisoned(tuple(self.q.shape), self.q.dtype) if out is None else out,
        )

    def expected(self, window: int | None = None) -> torch.Tensor:
        queries = self.q.cpu().split(self.counts.tolist())
        return torch.cat(
            [
                plain_attention(row_q, keys, values, window, SCALE)
                for row_q, keys, values in zip(
                    queries, self.paged.keys, self.paged.values, strict=True
                )
            ]
        )


def on_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int32)).to(device())


def table_on_device(table: TileTable) -> TileTable:
    return table._replace(entries=table.entries.to(device()))


def make_case(
    starts: list[int],
    counts: list[int],
    *,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 64,
    block_tokens: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Case:
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    paged = make_paged(
        lengths, kv_heads=kv_heads, head_dim=head_dim, block_tokens=block_tokens, dtype=dtype
    )
    kv = paged.kv.masked_fill(paged.kv == paged.kv.max(), torch.nan).to(device())
    q = torch.randn(sum(counts), heads, head_dim).to(device(), dtype)
    return Case(paged._replace(kv=kv), np.array(starts), np.array(counts), q)


def assert_near(output: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[output.dtype]
    torch.testing.assert_close(output.cpu().float(), expected, rtol=tolerance, atol=tolerance)


def small_tiles(
    block_m: int = 16, block_n: int = 32, heads_per_tile: int = 1, heads_at_once: int = 1
) -> PrefillTiles:
    return PrefillTiles(block_m, block_n, heads_per_tile, heads_at_once, num_warps=4, num_stages=2)


@pytest.mark.parametrize("window", [None, 1, 20, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_rows_equal_plain_attention(dtype: torch.dtype, window: int | None) -> None:
    """Without and with a cached prefix, across block and tile borders, shorter than a tile."""
    case = make_case([37, 0, 84, 48, 31], [35, 3, 20, 16, 1], dtype=dtype)
    assert_near(case.attend(small_tiles(heads_at_once=2), window), case.expected(window))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_tokens", "tiles"),
    [
        (4, 2, 96, 16, small_tiles(32, 32, 1, 2)),
        (3, 3, 128, 32, small_tiles(16, 32, 1, 1)),
        (2, 1, 256, 64, small_tiles(32, 16, 2, 1)),
        (6, 2, 64, 32, small_tiles(16, 64, 3, 2)),
        (7, 1, 96, 16, small_tiles(16, 32, 7, 1)),
        (16, 1, 64, 16, small_tiles(16, 64, 16, 1)),
        (8, 2, 64, 64, small_tiles(64, 32, 2, 4)),
    ],
)
def test_every_shape_in_any_tiles(
    heads: int, kv_heads: int, head_dim: int, block_tokens: int, tiles: PrefillTiles
) -> None:
    """Head sizes, groups and blocks; steps shorter and longer than a block, idle rows in a tile."""
    case = make_case(
        [50, 0],
        [21, 9],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_tokens=block_tokens,
    )
    assert_near(case.attend(tiles, window=40), case.expected(40))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_new_tokens", [5, 200])
def test_chosen_tiles_work(dtype: torch.dtype, max_new_tokens: int) -> None:
    case = make_case([80, 3], [5, 2], heads=2, dtype=dtype)
    tiles = choose_tiles(2, 1, 64, dtype, max_new_tokens)
    assert (tiles.heads_per_tile > 1) == (max_new_tokens == 5)
    assert_near(case.attend(tiles), case.expected())


def test_rows_without_tokens_and_tables_with_spare_entries_do_nothing() -> None:
    """A captured launch: rows of length 0, spare entries, and entries past a row's new tokens."""
    case = make_case([20, 7], [18, 6])
    tiles = small_tiles()
    out = poisoned((30, 2, 64), torch.float32)
    out[24:] = 7
    q = torch.cat((case.q, poisoned((6, 2, 64), torch.float32)))
    table = make_tile_table(np.array([20, 7, 0, 0]), np.array([18, 33, 6, 0]), tiles, num_tiles=9)
    prefill_attention_triton(
        q,
        case.paged.kv,
        LAYER,
        torch.cat((case.tables, torch.full_like(case.tables, 1 << 30))),
        on_device(np.array([38, 13, 0, 0])),
        on_device(np.array([0, 18, 24, 30, 30])),
        table_on_device(table),
        SCALE,
        out=out,
    )
    assert_near(out[:24], case.expected())
    assert (out[24:] == 7).all()


def test_blocks_behind_the_window_are_not_read() -> None:
    """Their entries may be stale: here they name a block of NaN, within a step that is read."""
    case = make_case([70], [10])
    num_hidden = (70 - 22 + 1) // 16
    assert num_hidden * 16 % small_tiles().block_n
    (unused,) = set(range(len(case.paged.kv))) - set(case.paged.tables.flat)
    case.paged.tables[0, :num_hidden] = unused
    assert_near(case.attend(small_tiles(), window=22), case.expected(22))


def test_any_strides() -> None:
    """Queries within the merged product, a pool with layers outermost, a wider output."""
    case = make_case([20], [18], heads=4, kv_heads=2)
    merged = torch.randn(18, 8, 64, device=device())
    merged[:, 2:6] = case.q
    layers_first = case.paged.kv.transpose(0, 1).contiguous().transpose(0, 1)
    wide = poisoned((18, 6, 64), torch.float32)
    moved = case._replace(q=merged[:, 2:6], paged=case.paged._replace(kv=layers_first))
    moved.attend(small_tiles(), out=wide[:, 1:5])
    assert_near(wide[:, 1:5], case.expected())
    assert wide[:, 0].isnan().all()
    assert wide[:, 5].isnan().all()


def test_places_beyond_32_bits_are_reached() -> None:
    """Memory that nothing touches is not taken: 4 GiB here are three small blocks."""
    case = make_case([3], [14], dtype=torch.float16)
    small = case.paged.kv
    strides = (1 << 30, *small[0].contiguous().stride())
    storage = torch.empty((2 << 30) + small[0].numel(), dtype=torch.float16, device=device())
    far = storage.as_strided(small.shape, strides)
    for block in range(len(small)):
        far[block] = small[block]
    assert 2 in case.paged.tables
    assert_near(
        case._replace(paged=case.paged._replace(kv=far)).attend(small_tiles()), case.expected()
    )


@pytest.mark.parametrize(
    "fault", ["a swapped block", "a position off", "a window off", "a row off"]
)
def test_faults_are_noticed(fault: str) -> None:
    """The loosest tolerance still tells a wrong block, position, window or row from a right one."""
    case = make_case([20, 24], [18, 14], dtype=torch.bfloat16)
    expected = case.expected(9)
    assert_near(case.attend(small_tiles(), 9), expected)
    window = 9
    if fault == "a swapped block":
        tables = case.paged.tables
        tables[0, 1], tables[1, 1] = tables[1, 1], tables[0, 1]
    elif fault == "a position off":
        case = case._replace(starts=case.starts - 1)
    elif fault == "a window off":
        window = 8
    else:
        case = case._replace(paged=case.paged._replace(tables=case.paged.tables[::-1].copy()))
    with pytest.raises(AssertionError):
        assert_near(case.attend(small_tiles(), window), expected)


def test_a_step_without_new_tokens_launches_nothing() -> None:
    case = make_case([20], [1])
    case = case._replace(counts=np.array([0]), q=case.q[:0])
    assert case.attend(small_tiles()).shape == (0, 2, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 3, 64)}, "3 query heads cannot share 2"),
        ({"q": torch.zeros(4, 4, 32)}, r"q \[4, 4, 32\] and kv"),
        ({"q": torch.zeros(4, 4, 64).half()}, "float16 and kv torch.float32"),
        ({"q": torch.zeros(4, 64, 4).transpose(1, 2)}, r"strides are \(256, 1, 4\) of q"),
        ({"layer": 2}, "layer 2 is not one of the pool's 2"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"window": 0}, "window is 0"),
        ({"lengths": torch.zeros(2, dtype=torch.int32)}, r"lengths \[2\]"),
        ({"offsets": torch.zeros(2, dtype=torch.int64)}, "torch.int64"),
        (
            {"tables": torch.zeros(1, 6, dtype=torch.int32)[:, ::2]},
            r"strides are \(6, 2\) of tables",
        ),
        ({"out": torch.zeros(4, 4, 65)}, r"out must be torch.float32 \[4, 4, 64\]"),
        ({"tile_table": TileTable(small_tiles(), torch.zeros(2, 3).int())}, r"int32 \[N, 2\]"),
        ({"tile_table": TileTable(small_tiles(), torch.zeros(2, 2).int().T)}, "contiguous"),
        ({"tile_table": TileTable(small_tiles(heads_per_tile=4), torch.zeros(1, 2).int())}, "of 2"),
        ({"tile_table": TileTable(small_tiles(heads_at_once=3), torch.zeros(1, 2).int())}, "3 at"),
    ],
)
def test_what_cannot_be_done_is_refused(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "q": torch.zeros(4, 4, 64),
        "kv": torch.zeros(3, 2, 2, 2, 16, 64),
        "layer": 0,
        "tables": torch.zeros(1, 3, dtype=torch.int32),
        "lengths": torch.full((1,), 4, dtype=torch.int32),
        "offsets": torch.zeros(2, dtype=torch.int32),
        "tile_table": make_tile_table(np.array([0]), np.array([4]), small_tiles()),
        "scale": SCALE,
    }
    with pytest.raises(ValueError, match=message):
        prefill_attention_triton(**{**arguments, **changes})


@pytest.mark.parametrize("head_dim", [20, 264])
def test_head_sizes_that_no_tile_fits_are_refused(head_dim: int) -> None:
    case = make_case([0], [4], head_dim=head_dim)
    with pytest.raises(ValueError, match=f"head_dim is {head_dim}"):
        case.attend(small_tiles())
