"""A plan's rows arrive on the device as they are, and rows that pad do nothing."""

import numpy as np
import pytest
import torch
from triton_device import device

from paceline.engine.gpu.graphs import StepGraphs, graph_sizes
from paceline.engine.gpu.step_inputs import ChangeUpload, RowUpload
from paceline.engine.step_plan import StepPlan

DEVICE = torch.device(device())


def make_plan(counts: list[int], sampled: list[bool], seed: int = 0) -> StepPlan:
    """Rows of these lengths; those `sampled` continue from their slot's last sample."""
    draw = np.random.default_rng(seed)
    num_new = np.array(counts, np.int32)
    given = [n for n, is_sampled in zip(counts, sampled, strict=True) if not is_sampled]
    slots = draw.permutation(40)[: len(counts)].astype(np.int32)
    return StepPlan(
        step_id=1,
        slots=slots,
        starts=draw.integers(0, 500, len(counts)).astype(np.int32),
        num_new_tokens=num_new,
        from_last_sample=np.array(sampled),
        tokens=draw.integers(0, 1000, sum(given)).astype(np.int32),
        sample_positions=(np.cumsum(num_new) - 1).astype(np.int32),
        sample_slots=slots,
        sample_indices=draw.integers(0, 99, len(counts)).astype(np.int32),
    )


@pytest.mark.parametrize(
    ("counts", "sampled"),
    [
        ([1], [True]),
        ([1, 1, 1], [True, False, True]),
        ([1, 1, 7, 1, 30], [True, True, False, False, False]),
        ([5, 1], [False, True]),
    ],
)
@pytest.mark.parametrize("num_padded", [0, 3])
def test_rows_tokens_and_samples_arrive(
    counts: list[int], sampled: list[bool], num_padded: int
) -> None:
    upload = RowUpload(16, 64, 16, DEVICE)
    plan = make_plan(counts, sampled)
    # What is there from before must not shine through.
    upload.pack(make_plan([9, 9, 9, 9, 9], [False] * 5, seed=1))
    entries = np.arange(6, dtype=np.int32).reshape(3, 2)
    shape = upload.pack(plan, num_padded, entries)
    arrays = upload.arrays(shape)
    pad = [0] * num_padded
    none = [-1] * num_padded
    starts = plan.starts.tolist()
    expected_given, left = [], plan.tokens.tolist()
    for count, is_sampled in zip(counts, sampled, strict=True):
        expected_given += [-1] if is_sampled else left[:count]
        left = left if is_sampled else left[count:]
    assert arrays.row_slots.tolist() == plan.slots.tolist() + none
    assert arrays.lengths.tolist() == [s + n for s, n in zip(starts, counts, strict=True)] + pad
    assert arrays.offsets.tolist() == [0, *np.cumsum(counts).tolist(), *[sum(counts)] * num_padded]
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    assert arrays.token_rows.tolist() == rows + none
    assert arrays.given.tolist() == expected_given + none
    positions = [s + i for s, n in zip(starts, counts, strict=True) for i in range(n)]
    assert arrays.positions.tolist() == positions + pad
    assert arrays.sample_positions.tolist() == plan.sample_positions.tolist() + pad
    assert arrays.sample_slots.tolist() == plan.sample_slots.tolist() + none
    assert arrays.sample_indices.tolist() == plan.sample_indices.tolist() + pad
    assert upload.tiles(shape, 3).tolist() == entries.tolist()
    assert all(array.data_ptr() % 16 == 0 for array in arrays)


def test_two_steps_may_be_packed_before_the_first_has_been_copied() -> None:
    upload = RowUpload(4, 8, 4, DEVICE)
    first, second = upload._ring.next().data_ptr(), upload._ring.next().data_ptr()
    assert first != second


def test_changes_of_any_length_arrive() -> None:
    upload = ChangeUpload(DEVICE)
    draw = np.random.default_rng(0)
    for sizes in ((0, 3, 17), (5, 0, 1), (100_000, 1, 2), (4, 4, 4)):
        arrays = [draw.integers(-(2**31), 2**31, size).astype(np.int32) for size in sizes]
        arrived = upload.pack(arrays)
        assert [tensor.tolist() for tensor in arrived] == [array.tolist() for array in arrays]


def test_sizes_are_close_where_padding_costs_most_and_end_with_the_limit() -> None:
    assert graph_sizes(1) == (1,)
    assert graph_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert graph_sizes(256)[-3:] == (128, 192, 256)
    graphs: StepGraphs[int] = StepGraphs(graph_sizes(20), torch.device("cpu"))
    assert [graphs.size_for(n) for n in (1, 3, 9, 17, 20, 21)] == [1, 4, 16, 20, 20, None]
