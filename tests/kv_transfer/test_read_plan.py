"""Which blocks are read when, from what the owner says is final."""

import pytest

from paceline.errors import IntegrityError, TransferError
from paceline.kv_transfer.read_plan import ReadPlan

TARGETS = [100, 101, 102, 103]


def make_plan(num_context_tokens: int = 14, num_cached_blocks: int = 0) -> ReadPlan:
    """Four tokens a block: three full blocks and half a one."""
    return ReadPlan(4, num_context_tokens, TARGETS, num_cached_blocks)


def test_full_block_is_read_once_when_all_its_tokens_are_final() -> None:
    plan = make_plan()
    assert plan.update([7, 8], 3, False) == []
    assert plan.update([], 5, False) == [(7, 100)]
    assert plan.update([9, 6], 12, False) == [(8, 101), (9, 102)]
    assert plan.update([], 12, False) == []
    assert plan.num_running == 2


def test_partial_last_block_is_read_when_the_lease_is_complete() -> None:
    plan = make_plan()
    plan.update([6, 7, 8, 9], 12, False)
    assert plan.update([], 14, False) == []
    assert plan.update([], 14, True) == [(9, 103)]


def test_all_is_read_when_the_lease_is_complete_and_every_read_has_ended() -> None:
    plan = make_plan()
    plan.update([6, 7, 8, 9], 13, False)
    plan.read_ended()
    assert not plan.all_read
    plan.update([], 14, True)
    assert not plan.all_read
    plan.read_ended()
    assert plan.all_read


def test_blocks_that_the_reader_has_are_not_read() -> None:
    plan = make_plan(num_cached_blocks=2)
    assert plan.update([6, 7, 8, 9], 8, False) == []
    assert plan.update([], 14, True) == [(8, 102), (9, 103)]


def test_context_that_is_cached_whole_needs_no_read_but_a_complete_lease() -> None:
    plan = make_plan(16, num_cached_blocks=4)
    plan.update([6, 7, 8, 9], 15, False)
    assert not plan.all_read
    assert plan.update([], 16, True) == []
    assert plan.all_read


def test_context_of_full_blocks_leaves_nothing_for_the_end() -> None:
    plan = make_plan(16)
    assert len(plan.update([6, 7, 8, 9], 16, False)) == 4
    assert plan.update([], 16, True) == []


def test_everything_may_come_in_one_update() -> None:
    assert make_plan().update([6, 7, 8, 9], 14, True) == [(6, 100), (7, 101), (8, 102), (9, 103)]


@pytest.mark.parametrize(
    ("added", "num_tokens", "complete", "problem"),
    [
        ([], 7, False, "8 tokens were final before"),
        ([], 9, False, "a block holds 4 tokens"),
        ([8, 9], 15, False, "the context has 14 tokens"),
        ([8, 9, 5], 8, False, "4 blocks"),
        ([8, 9], 13, True, "complete means 14 tokens"),
    ],
)
def test_update_that_contradicts_fails_the_transfer(
    added: list[int], num_tokens: int, complete: bool, problem: str
) -> None:
    plan = make_plan()
    plan.update([6, 7], 8, False)
    with pytest.raises(TransferError, match=problem):
        plan.update(added, num_tokens, complete)
    assert plan.update([8, 9], 14, True) == [(8, 102), (9, 103)]  # nothing had changed


def test_nothing_follows_the_complete_update() -> None:
    plan = make_plan()
    plan.update([6, 7, 8, 9], 14, True)
    with pytest.raises(TransferError, match="completed"):
        plan.update([], 14, True)


def test_read_that_never_started_cannot_end() -> None:
    with pytest.raises(IntegrityError, match="none is running"):
        make_plan().read_ended()


@pytest.mark.parametrize("num_context_tokens", [0, 12, 17])
def test_targets_must_cover_the_context(num_context_tokens: int) -> None:
    with pytest.raises(ValueError, match="4 targets"):
        make_plan(num_context_tokens)


@pytest.mark.parametrize("num_cached_blocks", [-1, 5])
def test_cached_blocks_must_lie_in_the_context(num_cached_blocks: int) -> None:
    with pytest.raises(ValueError, match="cannot be cached"):
        make_plan(num_cached_blocks=num_cached_blocks)
