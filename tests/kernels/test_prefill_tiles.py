"""Every new token is in one tile, in tiles that fit model and GPU."""

import numpy as np
import pytest
import torch

from paceline.kernels.prefill_tiles import (
    PrefillTiles,
    choose_tiles,
    is_faster_specialized,
    make_tile_table,
    most_tiles,
)


def make_tiles(block_m: int, heads_per_tile: int) -> PrefillTiles:
    return PrefillTiles(block_m, 32, heads_per_tile, 1, num_warps=4, num_stages=2)


def test_tiles_cover_every_new_token_once_most_keys_first() -> None:
    starts, counts = np.array([5, 0, 900, 40]), np.array([33, 0, 16, 100])
    tiles = make_tiles(32, 2)
    entries = make_tile_table(starts, counts, tiles).entries.numpy()
    covered = [
        (row, query)
        for row, first in entries
        for query in range(first, min(first + 16, counts[row]))
    ]
    assert sorted(covered) == [(row, query) for row in range(4) for query in range(counts[row])]
    num_keys = [starts[row] + min(first + 16, counts[row]) for row, first in entries]
    assert num_keys == sorted(num_keys, reverse=True)
    assert len(entries) <= most_tiles(counts.sum(), 3, tiles)
    assert most_tiles(3, 3, tiles) == 3


def test_a_table_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=r"50 new tokens in 2 rows need 5 tiles of 16 .* has 4"):
        make_tile_table(np.array([0, 0]), np.array([33, 17]), make_tiles(16, 1), num_tiles=4)


@pytest.mark.parametrize("group", range(1, 17))
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_chosen_tiles_fit_the_group(head_dim: int, group: int) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for max_new_tokens in (0, 1, 3, 16, 63, 64, 65, 8192):
            tiles = choose_tiles(2 * group, 2, head_dim, dtype, max_new_tokens)
            assert group % tiles.heads_per_tile == 0
            assert tiles.block_m in (16, 32, 64, 128)
            assert tiles.queries >= min(max_new_tokens, 32)
            # Q and the buffers of K and V in a Hopper GPU's shared memory.
            buffers = 2 * ((tiles.num_stages + 1) // 2)
            elements = (tiles.block_m + buffers * tiles.block_n) * (
                1 << (head_dim - 1).bit_length()
            )
            assert elements * dtype.itemsize <= 227 * 1024


def test_specialized_tiles_are_for_much_work() -> None:
    assert choose_tiles(32, 8, 128, torch.bfloat16, 8192, specialized=True).specialized
    assert not choose_tiles(32, 8, 128, torch.bfloat16, 8192).specialized
    assert is_faster_specialized(2048, 2048)
    assert is_faster_specialized(512, 512 + 8192)
    assert not is_faster_specialized(1024, 1024)
    assert not is_faster_specialized(512, 512)
    assert not is_faster_specialized(16, 16 + 8192)
