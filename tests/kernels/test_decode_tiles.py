"""The tiles of a decode step fit the model, the rows and the device."""

import pytest
import torch

from paceline.kernels.decode_tiles import DecodeTiles, choose_tiles, workspace_size


def _tiles(num_rows: int, max_context: int, dtype: torch.dtype = torch.bfloat16) -> DecodeTiles:
    return choose_tiles(
        num_rows,
        num_kv_heads=8,
        num_queries=4,
        head_dim=128,
        dtype=dtype,
        max_context=max_context,
        num_sms=132,
    )


def test_few_rows_are_split_until_the_device_is_full_and_many_are_not() -> None:
    assert _tiles(1, 8192).num_splits == 16
    assert _tiles(8, 8192).num_splits == 2
    assert _tiles(256, 8192).num_splits == 1
    for num_rows in range(1, 70):
        tiles = _tiles(num_rows, 1 << 17)
        assert tiles.num_splits == 1 or tiles.num_splits * num_rows * 8 <= 132


def test_a_split_has_a_tile_of_context_at_least() -> None:
    for context in (1, 16, 100, 1000, 1024):
        tiles = _tiles(1, context)
        assert tiles.num_splits == 1 or (tiles.num_splits // 2) * tiles.block_n < context


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
        max_context=4096,
        num_sms=132,
    )
    assert tiles.block_m == min(
        16 if dtype is torch.float32 else 64 if head_dim <= 128 else 32,
        {1: 16, 16: 16, 80: 128}[num_queries],
    )
    assert 2 * tiles.block_n * head_dim * dtype.itemsize <= 64 * 1024


def test_the_workspace_holds_every_split_and_a_counter_for_each_tile_of_queries() -> None:
    tiles = DecodeTiles(16, 32, 8)
    sizes = workspace_size(3, num_kv_heads=2, num_queries=40, head_dim=64, tiles=tiles)
    assert sizes == (3 * 2 * 8 * 40 * 65, 3 * 2 * 3)
    unsplit = DecodeTiles(16, 32, 1)
    assert workspace_size(3, num_kv_heads=2, num_queries=4, head_dim=64, tiles=unsplit) == (0, 0)


@pytest.mark.parametrize(
    "arguments", [(8, 16, 1), (16, 24, 1), (16, 16, 3), (16, 16, 256), (16, 16, 2, 0)]
)
def test_tiles_that_cannot_work_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        DecodeTiles(*arguments)
