"""Blocks that Triton copies, gathers and scatters are equal to their sources; no other changes."""

import pytest
import torch
from triton_device import device

from paceline.kernels.block_copy_triton import (
    Tile,
    block_copy_triton,
    block_gather_triton,
    block_scatter_triton,
)

# Widths that are moved as words of 8, 4, 2 bytes and 1, in one chunk or several, the last partial.
WIDTHS = [9000, 1024, 332, 334, 333, 1]
INDEX_DTYPES = [torch.int32, torch.int64]


def make_blocks(num_blocks: int, num_bytes: int) -> torch.Tensor:
    torch.manual_seed(num_bytes)
    return torch.randint(0, 256, (num_blocks, num_bytes), dtype=torch.uint8, device=device())


def make_ids(*ids: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(ids, dtype=dtype, device=device())


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
@pytest.mark.parametrize("num_bytes", WIDTHS)
def test_copied_blocks_equal_their_sources_and_nothing_else_changes(
    num_bytes: int, dtype: torch.dtype
) -> None:
    blocks = make_blocks(10, num_bytes)
    expected = blocks.clone()
    expected[[7, 2]] = blocks[[1, 1]]
    block_copy_triton(blocks, make_ids(1, 1, dtype=dtype), make_ids(7, 2, dtype=dtype))
    assert torch.equal(blocks, expected)


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
@pytest.mark.parametrize("num_bytes", WIDTHS)
def test_gathered_blocks_scatter_to_where_they_belong(num_bytes: int, dtype: torch.dtype) -> None:
    blocks, pool, staging = (make_blocks(n, num_bytes) for n in (10, 12, 5))
    rest = staging[3:].clone()
    block_gather_triton(blocks, make_ids(9, 0, 4, dtype=dtype), staging)
    assert torch.equal(staging[:3], blocks[[9, 0, 4]])
    assert torch.equal(staging[3:], rest)
    expected = pool.clone()
    expected[[11, 3, 0]] = blocks[[9, 0, 4]]
    block_scatter_triton(staging, pool, make_ids(11, 3, 0, dtype=dtype))
    assert torch.equal(pool, expected)


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
@pytest.mark.parametrize("num_live", [0, 1, 3, 9])
def test_a_count_on_the_device_says_how_many_blocks_move(num_live: int, dtype: torch.dtype) -> None:
    blocks = make_blocks(10, 640)
    expected = blocks.clone()
    sources, targets = [0, 1, 2, 3], [6, 9, 5, 8]
    expected[targets[:num_live]] = blocks[sources[:num_live]]
    count = make_ids(num_live, dtype=dtype)
    block_copy_triton(blocks, make_ids(*sources), make_ids(*targets), count=count)
    assert torch.equal(blocks, expected)


@pytest.mark.parametrize("tile", [Tile(16, 1, 1), Tile(64, 2, 3), Tile(256, 4, 1000)])
def test_every_tile_moves_the_same_bytes(tile: Tile) -> None:
    blocks = make_blocks(8, 776)
    pool = torch.zeros_like(blocks)
    block_copy_triton(blocks, make_ids(7, 2, 4), make_ids(0, 1, 6), into=pool, tile=tile)
    assert torch.equal(pool[[0, 1, 6]], blocks[[7, 2, 4]])
    assert not pool[[2, 3, 4, 5, 7]].any()


@pytest.mark.parametrize(("first", "end"), [(0, 64), (192, 448), (3, 100)])
def test_a_part_of_each_block_moves_alone(first: int, end: int) -> None:
    blocks, pool = make_blocks(6, 512), torch.zeros(6, 512, dtype=torch.uint8, device=device())
    staging = torch.zeros(2, end - first, dtype=torch.uint8, device=device())
    block_gather_triton(blocks[:, first:end], make_ids(5, 1), staging)
    assert torch.equal(staging, blocks[[5, 1], first:end])
    block_scatter_triton(staging, pool[:, first:end], make_ids(0, 3))
    expected = torch.zeros_like(pool)
    expected[[0, 3], first:end] = blocks[[5, 1], first:end]
    assert torch.equal(pool, expected)


def test_a_copy_into_the_wrong_block_is_noticed() -> None:
    blocks = make_blocks(10, 333)
    expected = blocks.clone()
    expected[7] = blocks[1]
    block_copy_triton(blocks, make_ids(1), make_ids(6))
    assert not torch.equal(blocks, expected)


def test_no_ids_are_nothing_to_do() -> None:
    blocks = make_blocks(3, 64)
    expected = blocks.clone()
    block_copy_triton(blocks, make_ids(), make_ids())
    assert torch.equal(blocks, expected)


def test_inputs_that_do_not_fit_are_refused() -> None:
    blocks = make_blocks(4, 8)
    with pytest.raises(ValueError, match="must be of one length"):
        block_copy_triton(blocks, make_ids(1, 2), make_ids(3))
    with pytest.raises(ValueError, match="1 rows for 2 block ids"):
        block_gather_triton(blocks, make_ids(1, 2), make_blocks(1, 8))
    with pytest.raises(ValueError, match="source block of 8 bytes cannot fill a target of 9"):
        block_gather_triton(blocks, make_ids(1), make_blocks(1, 9))
    with pytest.raises(ValueError, match=r"must be uint8 .* got torch.float32 \[4, 2\]"):
        block_copy_triton(blocks.view(torch.float32), make_ids(1), make_ids(2))
    with pytest.raises(ValueError, match=r"int32 or int64 \[K\], got torch.float32 \[1\]"):
        block_copy_triton(blocks, make_ids(1).float(), make_ids(2))
    with pytest.raises(ValueError, match=r"count must be one int32 or int64, got .* \[2\]"):
        block_copy_triton(blocks, make_ids(1), make_ids(2), count=make_ids(1, 1))
