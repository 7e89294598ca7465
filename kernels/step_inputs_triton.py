"""What a step's layers need to know of its rows, in Triton (reference: kernels.step_inputs).

    programs of resolve_rows    |row 0|row 1|...|row R - 1|128 tokens|128 tokens|...

Everything is int32. Lengths, slots and tokens are read on the device, so launches of one shape can
be captured. No shape here matters for speed: a launch takes two microseconds.
"""

import torch
import triton
import triton.language as tl

from paceline.kernels.launch import launch

_WIDTH = 256
"""Entries that a program takes at a time"""


# Arrays lie anywhere in a step's upload, and their lengths vary: neither may choose another kernel.
@triton.jit(
    do_not_specialize=["num_changes"],
    do_not_specialize_on_alignment=["slots_ptr", "columns_ptr", "blocks_ptr"],
)
def _set_table_entries_kernel(  # type: ignore[no-untyped-def]
    tables_ptr, slots_ptr, columns_ptr, blocks_ptr, num_changes, table_stride, WIDTH: tl.constexpr
):
    change = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    exists = change < num_changes
    slot = tl.load(slots_ptr + change, mask=exists, other=0).to(tl.int64)
    column = tl.load(columns_ptr + change, mask=exists, other=0)
    block = tl.load(blocks_ptr + change, mask=exists, other=0)
    tl.store(tables_ptr + slot * table_stride + column, block, mask=exists)


@triton.jit(
    do_not_specialize=["num_rows", "num_tokens"],
    do_not_specialize_on_alignment=["row_slots_ptr", "lengths_ptr", "token_rows_ptr", "given_ptr"],
)
def _resolve_rows_kernel(  # type: ignore[no-untyped-def]
    tables_ptr,
    last_samples_ptr,
    row_slots_ptr,
    lengths_ptr,
    token_rows_ptr,
    given_ptr,
    row_tables_ptr,
    token_ids_ptr,
    num_rows,
    num_tokens,
    table_stride,
    row_table_stride,
    BLOCK_TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0)
    entry = tl.arange(0, WIDTH)
    if row < num_rows:
        slot = tl.load(row_slots_ptr + row).to(tl.int64)
        if slot >= 0:
            num_blocks = tl.cdiv(tl.load(lengths_ptr + row), BLOCK_TOKENS)
            source = tables_ptr + slot * table_stride
            target = row_tables_ptr + row.to(tl.int64) * row_table_stride
            for start in range(0, num_blocks, WIDTH):
                column = start + entry
                blocks = tl.load(source + column, mask=column < num_blocks, other=0)
                tl.store(target + column, blocks, mask=column < num_blocks)
    else:
        token = (row - num_rows) * WIDTH + entry
        exists = token < num_tokens
        row_of_token = tl.load(token_rows_ptr + token, mask=exists, other=-1)
        given = tl.load(given_ptr + token, mask=exists, other=0)
        sampled = exists & (row_of_token >= 0) & (given < 0)
        slot_of_token = tl.load(row_slots_ptr + row_of_token, mask=sampled, other=0)
        last = tl.load(last_samples_ptr + slot_of_token, mask=sampled, other=0)
        token_id = tl.where(sampled, last, tl.where(row_of_token >= 0, given, 0))
        tl.store(token_ids_ptr + token, token_id, mask=exists)


@triton.jit(
    do_not_specialize=["num_samples"],
    do_not_specialize_on_alignment=["sample_slots_ptr", "token_ids_ptr"],
)
def _keep_samples_kernel(  # type: ignore[no-untyped-def]
    last_samples_ptr, sample_slots_ptr, token_ids_ptr, num_samples, WIDTH: tl.constexpr
):
    sample = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    exists = sample < num_samples
    slot = tl.load(sample_slots_ptr + sample, mask=exists, other=-1)
    token_id = tl.load(token_ids_ptr + sample, mask=exists, other=-1)
    tl.store(last_samples_ptr + slot, token_id, mask=(slot >= 0) & (token_id >= 0))


def set_table_entries_triton(
    tables: torch.Tensor, slots: torch.Tensor, columns: torch.Tensor, blocks: torch.Tensor
) -> None:
    """Apply C changes to the block tables [slots, columns]; no entry may be named twice."""
    _check(tables=(tables, 2), slots=(slots, 1), columns=(columns, 1), blocks=(blocks, 1))
    num_changes = slots.shape[0]
    if not num_changes == columns.shape[0] == blocks.shape[0]:
        raise ValueError(
            f"{num_changes} slots, {columns.shape[0]} columns and {blocks.shape[0]} blocks must be "
            "of one length"
        )
    if num_changes:
        launch(_set_table_entries_kernel, (triton.cdiv(num_changes, _WIDTH),))(
            tables, slots, columns, blocks, num_changes, tables.stride(0), WIDTH=_WIDTH
        )


def resolve_rows_triton(
    tables: torch.Tensor,
    last_samples: torch.Tensor,
    row_slots: torch.Tensor,
    lengths: torch.Tensor,
    token_rows: torch.Tensor,
    given: torch.Tensor,
    block_tokens: int,
    row_tables: torch.Tensor,
    token_ids: torch.Tensor,
) -> None:
    """Fill `row_tables` [R, columns], up to each row's length, and `token_ids` [T].

    tables: [slots, columns]; last_samples: [slots]; row_slots, lengths: [R]; token_rows, given:
    [T]. A length must not exceed what the columns hold.
    """
    _check(
        tables=(tables, 2),
        last_samples=(last_samples, 1),
        row_slots=(row_slots, 1),
        lengths=(lengths, 1),
        token_rows=(token_rows, 1),
        given=(given, 1),
        row_tables=(row_tables, 2),
        token_ids=(token_ids, 1),
    )
    num_rows, num_tokens = row_slots.shape[0], token_rows.shape[0]
    if (
        lengths.shape[0] != num_rows
        or row_tables.shape[0] < num_rows
        or row_tables.shape[1] != tables.shape[1]
        or given.shape[0] != num_tokens
        or token_ids.shape[0] < num_tokens
    ):
        raise ValueError(
            f"{num_rows} rows and {num_tokens} tokens do not fit lengths [{lengths.shape[0]}], "
            f"given [{given.shape[0]}], row_tables {list(row_tables.shape)}, token_ids "
            f"[{token_ids.shape[0]}] and tables {list(tables.shape)}"
        )
    num_programs = num_rows + triton.cdiv(num_tokens, _WIDTH)
    if num_programs:
        launch(_resolve_rows_kernel, (num_programs,))(
            tables,
            last_samples,
            row_slots,
            lengths,
            token_rows,
            given,
            row_tables,
            token_ids,
            num_rows,
            num_tokens,
            tables.stride(0),
            row_tables.stride(0),
            BLOCK_TOKENS=block_tokens,
            WIDTH=_WIDTH,
        )


def keep_samples_triton(
    last_samples: torch.Tensor, sample_slots: torch.Tensor, token_ids: torch.Tensor
) -> None:
    """Keep each slot's sample; a token of -1, which could not be sampled, changes nothing.

    sample_slots, token_ids: [S]; a slot is named once.
    """
    _check(last_samples=(last_samples, 1), sample_slots=(sample_slots, 1), token_ids=(token_ids, 1))
    num_samples = sample_slots.shape[0]
    if token_ids.shape[0] != num_samples:
        raise ValueError(f"{num_samples} slots and {token_ids.shape[0]} tokens: not of one length")
    if num_samples:
        launch(_keep_samples_kernel, (triton.cdiv(num_samples, _WIDTH),))(
            last_samples, sample_slots, token_ids, num_samples, WIDTH=_WIDTH
        )


def _check(**tensors: tuple[torch.Tensor, int]) -> None:
    for name, (tensor, dims) in tensors.items():
        if tensor.dtype != torch.int32 or tensor.dim() != dims or tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must be int32 of {dims} dimensions, the last contiguous, got "
                f"{tensor.dtype} {list(tensor.shape)} of strides {tensor.stride()}"
            )
