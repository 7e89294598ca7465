"""Runs of blocks say the same as the lists they were made from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.kv_transfer.block_runs import BlockRun, block_runs, find_fault


def test_neighbours_on_both_sides_become_one_run() -> None:
    assert list(block_runs([4, 5, 6, 9], [1, 2, 3, 4], 10)) == [
        BlockRun(4, 1, 3),
        BlockRun(9, 4, 1),
    ]


def test_neighbours_on_one_side_only_stay_apart() -> None:
    assert list(block_runs([4, 5], [1, 3], 10)) == [BlockRun(4, 1, 1), BlockRun(5, 3, 1)]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30),
    st.integers(1, 4),
)
def test_runs_name_the_same_pairs_in_the_same_order(
    pairs: list[tuple[int, int]], max_blocks: int
) -> None:
    runs = list(block_runs([s for s, _ in pairs], [t for _, t in pairs], max_blocks))
    again = [(s + i, t + i) for s, t, num_blocks in runs for i in range(num_blocks)]
    assert again == pairs
    assert all(1 <= run.num_blocks <= max_blocks for run in runs)


@pytest.mark.parametrize(
    ("sources", "targets", "is_fault"),
    [([0, 1], [1, 0], False), ([0, 0], [0, 1], False), ([0, 1], [1, 1], True), ([3], [0], True)],
)
def test_a_fault_is_found_when_there_is_one(
    sources: list[int], targets: list[int], is_fault: bool
) -> None:
    fault = find_fault(sources, targets, num_source_blocks=3, num_target_blocks=2)
    assert (fault is not None) is is_fault
