"""Copied blocks are equal to their sources, and no other block changes."""

import pytest
import torch

from paceline.kernels.block_copy import block_copy


def test_targets_equal_sources_and_nothing_else_changes() -> None:
    blocks = torch.randint(0, 256, (10, 333), dtype=torch.uint8)
    expected = blocks.clone()
    expected[[7, 2]] = blocks[[1, 1]]
    block_copy(blocks, torch.tensor([1, 1]), torch.tensor([7, 2]))
    assert torch.equal(blocks, expected)


def test_a_copy_into_the_wrong_block_is_noticed() -> None:
    blocks = torch.randint(0, 256, (10, 333), dtype=torch.uint8)
    expected = blocks.clone()
    expected[7] = blocks[1]
    block_copy(blocks, torch.tensor([1]), torch.tensor([6]))
    assert not torch.equal(blocks, expected)


def test_unequal_numbers_of_sources_and_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="must be of one length"):
        block_copy(torch.zeros(4, 8, dtype=torch.uint8), torch.tensor([1, 2]), torch.tensor([3]))
