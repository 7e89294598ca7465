"""Blocks, references and pins without a prefix cache; with one: test_prefix_cache.py."""

from collections.abc import Callable

import pytest

from paceline.engine.block_allocator import BlockAllocator
from paceline.errors import IntegrityError, OutOfBlocksError


def test_allocated_blocks_differ_and_have_one_reference_each() -> None:
    allocator = BlockAllocator(8)
    blocks = allocator.allocate(3) + allocator.allocate(5)
    assert sorted(blocks) == list(range(8))
    assert [allocator.num_references(block) for block in blocks] == [1] * 8
    assert allocator.num_free == allocator.num_available == 0
    allocator.check_integrity()


def test_allocating_nothing_takes_nothing() -> None:
    allocator = BlockAllocator(2)
    assert allocator.allocate(0) == []
    assert allocator.num_free == 2


def test_allocation_takes_all_or_nothing_and_says_the_numbers() -> None:
    allocator = BlockAllocator(4)
    allocator.allocate(3)
    with pytest.raises(OutOfBlocksError, match=r"2 KV blocks .* 1 are free .* of 4.* 3 are in use"):
        allocator.allocate(2)
    assert allocator.num_free == 1
    allocator.check_integrity()


def test_block_is_free_after_as_many_releases_as_references() -> None:
    allocator = BlockAllocator(2)
    blocks = allocator.allocate(2)
    allocator.share(blocks)
    allocator.release(blocks)
    assert allocator.num_free == 0
    allocator.release(blocks)
    assert allocator.num_free == 2
    allocator.check_integrity()


def test_block_is_shared_by_references_but_not_by_pins() -> None:
    allocator = BlockAllocator(1)
    (block,) = allocator.allocate(1)
    allocator.pin([block])
    allocator.pin([block])
    assert not allocator.is_shared(block)
    allocator.share([block])
    assert allocator.is_shared(block)


@pytest.mark.parametrize("pins_last", [True, False])
def test_block_is_free_only_when_references_and_pins_are_both_zero(pins_last: bool) -> None:
    allocator = BlockAllocator(1)
    blocks = allocator.allocate(1)
    allocator.pin(blocks)
    first, second = allocator.release, allocator.unpin
    if not pins_last:
        first, second = second, first
    first(blocks)
    assert allocator.num_available == 0
    allocator.check_integrity()
    second(blocks)
    assert allocator.num_free == 1
    allocator.check_integrity()


def test_several_pins_need_several_unpins() -> None:
    allocator = BlockAllocator(1)
    blocks = allocator.allocate(1)
    allocator.pin(blocks)
    allocator.pin(blocks)
    allocator.release(blocks)
    allocator.unpin(blocks)
    assert (allocator.num_pins(blocks[0]), allocator.num_free) == (1, 0)
    allocator.unpin(blocks)
    assert (allocator.num_pins(blocks[0]), allocator.num_free) == (0, 1)


def test_one_call_may_name_a_block_twice() -> None:
    allocator = BlockAllocator(1)
    (block,) = allocator.allocate(1)
    allocator.share([block, block])
    assert allocator.num_references(block) == 3
    allocator.release([block, block, block])
    assert allocator.num_free == 1
    allocator.check_integrity()


Wrong = Callable[[BlockAllocator, int, int], None]
"""(allocator, a block with one reference, a free block): a call that must raise."""


@pytest.mark.parametrize(
    "wrong",
    [
        lambda allocator, used, free: allocator.release([used, free]),
        lambda allocator, used, free: allocator.release([used, used]),
        lambda allocator, used, free: allocator.share([used, free]),
        lambda allocator, used, free: allocator.pin([used, free]),
        lambda allocator, used, free: allocator.unpin([used]),
        lambda allocator, used, free: allocator.release([used, -1]),
        lambda allocator, used, free: allocator.release([used, 4]),
        lambda allocator, used, free: allocator.share([used, 4]),
        lambda allocator, used, free: allocator.pin([used, -4]),
        lambda allocator, used, free: allocator.unpin([-1]),
        lambda allocator, used, free: allocator.set_cached(free),
        lambda allocator, used, free: allocator.set_cached(-3),
        lambda allocator, used, free: allocator.uncache([used]),
    ],
)
def test_wrong_call_raises_and_changes_nothing(wrong: Wrong) -> None:
    allocator = BlockAllocator(4)
    used, free = allocator.allocate(2)
    allocator.release([free])
    with pytest.raises(IntegrityError, match=r"block -?\d"):
        wrong(allocator, used, free)
    allocator.check_integrity()
    assert allocator.num_references(used) == 1
    assert allocator.num_pins(used) == 0
    assert allocator.num_free == 3


def test_block_that_is_only_pinned_cannot_be_shared() -> None:
    allocator = BlockAllocator(1)
    blocks = allocator.allocate(1)
    allocator.pin(blocks)
    allocator.release(blocks)
    with pytest.raises(IntegrityError, match="0 references, 1 pins"):
        allocator.share(blocks)


def test_double_release_says_how_often() -> None:
    allocator = BlockAllocator(2)
    (block,) = allocator.allocate(1)
    with pytest.raises(IntegrityError, match=f"block {block} was released 2 times .* which are 1"):
        allocator.release([block] * 3)


@pytest.mark.parametrize("count", [-1, -100])
def test_negative_count_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=str(count)):
        BlockAllocator(4).allocate(count)


def test_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="not 0"):
        BlockAllocator(0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda allocator: allocator._free.append(allocator._free[0]),
        lambda allocator: allocator._free.pop(),
        lambda allocator: allocator._references.__setitem__(allocator._free[0], 1),
        lambda allocator: allocator._pins.__setitem__(0, -1),
        lambda allocator: allocator._cached.__setitem__(allocator._free[0], True),
        lambda allocator: setattr(allocator, "_num_evictable", 1),
    ],
)
def test_integrity_check_finds_damage(damage: Callable[[BlockAllocator], None]) -> None:
    allocator = BlockAllocator(4)
    allocator.allocate(2)
    allocator.check_integrity()
    damage(allocator)
    with pytest.raises(IntegrityError):
        allocator.check_integrity()
