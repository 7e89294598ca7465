"""What a step's layers need to know of its rows, from what the device keeps by slot.

    tables[slot, column] = block                               where a step changes block tables
    row_tables[r, :n]    = tables[row_slots[r], :n]            n = blocks of the row's context
    token_ids[t]         = given[t], or last_samples[row_slots[token_rows[t]]] where it is -1
    last_samples[slot]   = token sampled                       once the step has sampled

Slots and rows of -1 pad a step: their tokens are 0, and nothing else of them is written. All of it
is int32.
"""

import torch


def set_table_entries(
    tables: torch.Tensor, slots: torch.Tensor, columns: torch.Tensor, blocks: torch.Tensor
) -> None:
    """Apply C changes to the block tables [slots, columns]."""
    tables[slots.long(), columns.long()] = blocks


def resolve_rows(
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
    """Fill `row_tables` [R, columns], up to each row's length, and `token_ids` [T]."""
    for row, (slot, length) in enumerate(zip(row_slots.tolist(), lengths.tolist(), strict=True)):
        if slot >= 0:
            num_blocks = -(-length // block_tokens)
            row_tables[row, :num_blocks] = tables[slot, :num_blocks]
    sampled = last_samples[row_slots[token_rows.clamp(min=0).long()].clamp(min=0).long()]
    token_ids.copy_(torch.where(given >= 0, given, sampled))
    token_ids.masked_fill_(token_rows < 0, 0)


def keep_samples(
    last_samples: torch.Tensor, sample_slots: torch.Tensor, token_ids: torch.Tensor
) -> None:
    """Keep each slot's sample; a token of -1, which could not be sampled, changes nothing."""
    valid = (sample_slots >= 0) & (token_ids >= 0)
    last_samples[sample_slots[valid].long()] = token_ids[valid]
