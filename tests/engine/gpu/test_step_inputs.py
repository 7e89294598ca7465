"""A plan's rows arrive on the device as they are, and rows that pad do nothing."""

import numpy as np
import pytest
import torch
from triton_device import device

from paceline.engine.gpu.graphs import (
    PromptShape,
    graph_sizes,
    prompt_shapes,
    shape_for,
    size_for,
)
from paceline.engine.gpu.step_inputs import ChangeUpload, RowShape, RowUpload
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
    upload.pack(make_plan([9, 9, 9, 9, 9], [False] * 5, seed=1), 0, RowShape(5, 45, 5))
    entries = np.arange(6, dtype=np.int32).reshape(3, 2)
    sizes = (len(counts), sum(counts), len(counts), 3)
    shape = RowShape(*(size + num_padded for size in sizes))
    num_decode = next((n for n, count in enumerate(counts) if count > 1), len(counts))
    upload.pack(plan, num_decode, shape, entries)
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
    lengths = arrays.lengths.tolist()
    others = len(counts) - num_decode + num_padded
    assert arrays.decode_lengths.tolist() == lengths[:num_decode] + [0] * others
    assert arrays.offsets.tolist() == [0, *np.cumsum(counts).tolist(), *[sum(counts)] * num_padded]
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    assert arrays.token_rows.tolist() == rows + none
    assert arrays.prompt_rows.tolist() == [-1] * num_decode + rows[num_decode:] + none
    assert arrays.given.tolist() == expected_given + none
    positions = [s + i for s, n in zip(starts, counts, strict=True) for i in range(n)]
    assert arrays.positions.tolist() == positions + pad
    assert arrays.sample_positions.tolist() == plan.sample_positions.tolist() + pad
    assert arrays.sample_slots.tolist() == plan.sample_slots.tolist() + none
    assert arrays.sample_indices.tolist() == plan.sample_indices.tolist() + pad
    assert arrays.tiles.view(-1, 2).tolist() == entries.tolist() + [[-1, -1]] * num_padded
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
    sizes = graph_sizes(20)
    assert [size_for(sizes, n) for n in (1, 3, 9, 17, 20, 21)] == [1, 4, 16, 20, 20, None]


def test_steps_with_prompts_have_shapes_for_few_rows_and_some_for_all() -> None:
    assert prompt_shapes(4, 8) == ()
    assert prompt_shapes(4, 40) == ((16, 4), (32, 4))
    shapes = prompt_shapes(256, 8192)
    assert shapes[:5] == ((16, 16), (32, 32), (64, 64), (128, 64), (128, 128))
    assert shapes[-3:] == ((768, 64), (1024, 64), (1024, 256))
    assert shape_for(shapes, 65, 1) == PromptShape(128, 64)
    assert shape_for(shapes, 65, 65) == PromptShape(128, 128)
    assert shape_for(shapes, 129, 200) == PromptShape(256, 256)
    assert shape_for(shapes, 300, 65) == PromptShape(512, 256)
    assert shape_for(shapes, 1025, 1) is None
    assert shape_for(shapes, 300, 257) is None


def test_an_upload_that_pads_alone_has_no_row_and_no_token() -> None:
    upload = RowUpload(4, 32, 4, DEVICE)
    upload.pack(make_plan([9, 9], [False] * 2), 0, RowShape(2, 18, 2))
    shape = RowShape(3, 5, 2, 4)
    upload.pad(shape)
    arrays = upload.arrays(shape)
    for none in (arrays.row_slots, arrays.token_rows, arrays.prompt_rows, arrays.sample_slots):
        assert set(none.tolist()) == {-1}
    assert set(arrays.tiles.tolist()) == set(arrays.given.tolist()) == {-1}
    for zeros in (arrays.lengths, arrays.decode_lengths, arrays.offsets, arrays.sample_positions):
        assert set(zeros.tolist()) == {0}
