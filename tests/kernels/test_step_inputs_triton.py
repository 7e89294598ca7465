"""Rows, tokens and tables that Triton resolves are those of the reference, and nothing else."""

import pytest
import torch
from triton_device import device

from paceline.kernels.step_inputs import keep_samples, resolve_rows, set_table_entries
from paceline.kernels.step_inputs_triton import (
    keep_samples_triton,
    resolve_rows_triton,
    set_table_entries_triton,
)

POISON = -77


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device())


def random_ints(seed: int, low: int, high: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32).to(device())


@pytest.mark.parametrize("num_changes", [0, 1, 16, 300])
def test_table_changes_set_their_entries_alone(num_changes: int) -> None:
    tables = random_ints(0, 0, 1000, 9, 50)
    expected = tables.clone()
    places = torch.randperm(9 * 50, generator=torch.Generator().manual_seed(1))[:num_changes]
    # At an odd place in a larger buffer, as in a step's upload.
    upload = torch.cat((ints(0), places.int().to(device()) // 50, places.int().to(device()) % 50))
    slots, columns = upload[1 : num_changes + 1], upload[num_changes + 1 :]
    blocks = random_ints(2, 0, 1000, num_changes)
    set_table_entries(expected, slots, columns, blocks)
    set_table_entries_triton(tables, slots, columns, blocks)
    assert torch.equal(tables, expected)


@pytest.mark.parametrize("block_tokens", [16, 32])
@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("num_tokens", [1, 40, 600])
def test_resolved_rows_equal_the_reference(
    block_tokens: int, num_rows: int, num_tokens: int
) -> None:
    num_slots, num_columns = 11, 300
    tables = random_ints(0, 0, 1000, num_slots, num_columns)
    last_samples = random_ints(1, 0, 500, num_slots)
    row_slots = torch.randperm(num_slots).int()[:num_rows].to(device())
    lengths = random_ints(2, 1, num_columns * block_tokens + 1, num_rows)
    lengths[0] = num_columns * block_tokens
    if num_rows > 2:
        row_slots[-1], lengths[-1] = -1, 0
    token_rows = random_ints(3, -1, num_rows, num_tokens)
    token_rows[(token_rows == num_rows - 1) & (num_rows > 2)] = -1
    given = random_ints(4, -1, 3, num_tokens)
    outputs = []
    for resolve in (resolve_rows, resolve_rows_triton):
        row_tables = torch.full_like(tables[:num_rows], POISON)
        token_ids = torch.full((num_tokens + 1,), POISON, dtype=torch.int32, device=device())
        resolve(
            tables,
            last_samples,
            row_slots,
            lengths,
            token_rows,
            given,
            block_tokens,
            row_tables,
            token_ids[:num_tokens],
        )
        outputs.append((row_tables, token_ids))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert int(outputs[1][1][num_tokens]) == POISON


def test_kept_samples_leave_out_padding_and_failures() -> None:
    slots, tokens = ints(3, -1, 0, 4), ints(7, 8, -1, 9)
    expected, kept = ints(1, 2, 3, 4, 5), ints(1, 2, 3, 4, 5)
    keep_samples(expected, slots, tokens)
    keep_samples_triton(kept, slots, tokens)
    assert kept.tolist() == expected.tolist() == [1, 2, 3, 7, 9]


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="of one length"):
        set_table_entries_triton(ints(1, 2).view(1, 2), ints(0), ints(0, 1), ints(5))
    with pytest.raises(ValueError, match="last_samples must be int32 of 1 dimensions"):
        keep_samples_triton(ints(1).long(), ints(0), ints(5))
