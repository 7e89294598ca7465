"""The tiles of a decode step fit the model, the rows and the device."""

import pytest
import torch

from paceline.kernels.decode_tiles import DecodeTiles, choose_tiles, workspace_size


def _tiles(num_rows: int, num_kv_heads: int = 8) -> DecodeTiles:
    return choose_tiles(
        num_rows,
        num_kv_heads=num_kv_heads,
        num_queries=4,
        head_dim=128,
        dtype=torch.bfloat16,
        num_sms=132,
    )


def test_shares_fill_the_device_and_no_more() -> None:
    for num_rows in (2, 5, 8):
        assert _tiles(num_rows).num_shares == 132 // 8
    for num_rows in (9, 64, 256):
        assert _tiles(num_rows).num_shares == 4 * 132 // 8


def test_few_rows_are_not_cut_into_more_parts_than_are_merged_quickly() -> None:
    assert _tiles(1, num_kv_heads=1).num_shares == 16
    assert _tiles(3, num_kv_heads=1).num_shares == 48


def test_more_heads_than_programs_take_a_share_each() -> None:
    assert _tiles(64, num_kv_heads=1000).num_shares == 1


def test_there_is_a_program_for_each_row() -> None:
    assert _tiles(64).num_programs(64) == 66
    assert _tiles(72).num_programs(72) == 72


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("num_queries", [1, 16, 80])
def test_chosen_tiles_are_valid_for_every_shape(
    head_dim: int, dtype: torch.dtype, num_queries: int
) -> None:
    tiles = choose_tiles(
        3,
        num_kv_heads=2,
        num_queries=num_queries,
        head_dim=head_dim,
        dtype=dtype,
        num_sms=132,
    )
    assert tiles.block_m == min(
        16 if dtype is torch.float32 else 64 if head_dim <= 128 else 32,
        {1: 16, 16: 16, 80: 128}[num_queries],
    )
    assert 2 * tiles.block_n * head_dim * dtype.itemsize <= 64 * 1024


def test_the_workspace_holds_two_parts_of_each_program_and_counters_of_each_row() -> None:
    tiles = DecodeTiles(16, 32, 8)
    sizes = workspace_size(3, num_kv_heads=2, num_queries=40, head_dim=64, tiles=tiles)
    assert sizes == (2 * 3 * 8 * 2 * 16 * 65, 3 * 2 * 3)
    few = workspace_size(3, num_kv_heads=2, num_queries=3, head_dim=64, tiles=tiles)
    assert few == (2 * 8 * 2 * 4 * 65, 3 * 2)
    many = workspace_size(30, num_kv_heads=2, num_queries=3, head_dim=64, tiles=tiles)
    assert many == (2 * 30 * 2 * 4 * 65, 30 * 2)
    whole = DecodeTiles(16, 32, 1)
    assert workspace_size(3, num_kv_heads=2, num_queries=4, head_dim=64, tiles=whole) == (0, 0)


@pytest.mark.parametrize("arguments", [(8, 16, 1), (16, 24, 1), (16, 8, 3), (16, 16, 0)])
def test_tiles_that_cannot_work_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        DecodeTiles(*arguments)
