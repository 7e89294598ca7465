"""The arrays a model computes one step from, made from a StepPlan and the block tables."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from paceline.engine.step_plan import Int32Array, StepPlan
from paceline.kernels.decode_attention import DecodeSpans, plan_spans
from paceline.kernels.prefill_attention import PrefillContext, plan_context


@dataclass(frozen=True, slots=True, eq=False)
class DecodeRows:
    """Rows with one new token."""

    tokens: torch.Tensor | None
    """int64 [rows] their positions among the step's tokens; None: the step has no other rows."""
    spans: dict[int | None, DecodeSpans]
    """By window."""


@dataclass(frozen=True, slots=True, eq=False)
class PrefillRow:
    """A row with several new tokens: positions first to end of the step's tokens."""

    first: int
    end: int
    contexts: dict[int | None, PrefillContext]
    """By window."""


@dataclass(frozen=True, slots=True, eq=False)
class StepBatch:
    """T tokens of all rows, in row order."""

    token_ids: torch.Tensor
    """int64 [T]"""
    positions: torch.Tensor
    """int64 [T] within their sequences"""
    kv_rows: torch.Tensor
    """int64 [T * 2 * kv_heads]: where layer 0's keys and values go (see kernels.rope_kv_write)"""
    decode: DecodeRows | None
    prefill: tuple[PrefillRow, ...]
    sample_positions: torch.Tensor | None
    """int64 [S] among the T; None: every token in order"""


def make_step_batch(
    plan: StepPlan,
    tables: Int32Array,
    last_samples: npt.NDArray[np.int64],
    kv: torch.Tensor,
    windows: frozenset[int | None],
) -> StepBatch:
    """Resolve a plan.

    tables: [slots, columns] block ids; last_samples: [slots] token ids; kv: the pool's view.
    """
    counts = plan.num_new_tokens
    num_tokens = int(counts.sum())
    firsts = np.cumsum(counts) - counts
    if num_tokens == len(counts):
        slots, positions = plan.slots, plan.starts
    else:
        slots = np.repeat(plan.slots, counts)
        positions = np.repeat(plan.starts - firsts, counts) + np.arange(num_tokens, dtype=np.int32)
    everything = len(plan.sample_positions) == num_tokens and bool(
        (plan.sample_positions == np.arange(num_tokens)).all()
    )
    return StepBatch(
        token_ids=torch.from_numpy(_token_ids(plan, last_samples, num_tokens)),
        positions=torch.from_numpy(positions.astype(np.int64)),
        kv_rows=torch.from_numpy(_kv_rows(tables, slots, positions, kv)),
        decode=_decode_rows(plan, firsts, tables, kv, windows),
        prefill=_prefill_rows(plan, firsts, tables, kv, windows),
        sample_positions=None
        if everything
        else torch.from_numpy(plan.sample_positions.astype(np.int64)),
    )


def _token_ids(
    plan: StepPlan, last_samples: npt.NDArray[np.int64], num_tokens: int
) -> npt.NDArray[np.int64]:
    sampled = plan.from_last_sample
    if sampled.all():
        return last_samples[plan.slots]
    if not sampled.any():
        return plan.tokens.astype(np.int64)
    token_ids = np.empty(num_tokens, np.int64)
    of_tokens = np.repeat(sampled, plan.num_new_tokens)
    token_ids[of_tokens] = last_samples[plan.slots[sampled]]
    token_ids[~of_tokens] = plan.tokens
    return token_ids


def _kv_rows(
    tables: Int32Array, slots: Int32Array, positions: Int32Array, kv: torch.Tensor
) -> npt.NDArray[np.int64]:
    _, num_layers, num_kv_heads, _, block_tokens, _ = kv.shape
    columns, offsets = np.divmod(positions, block_tokens)
    blocks = tables[slots, columns].astype(np.int64)
    # [T, k|v, kv_head]: the order in which keys and values lie in the merged product.
    runs = (
        (blocks * (num_layers * num_kv_heads))[:, None, None]
        + np.arange(num_kv_heads)[None, None, :]
    ) * 2 + np.arange(2)[None, :, None]
    rows: npt.NDArray[np.int64] = (runs * block_tokens + offsets[:, None, None]).reshape(-1)
    return rows


def _decode_rows(
    plan: StepPlan,
    firsts: npt.NDArray[np.int64],
    tables: Int32Array,
    kv: torch.Tensor,
    windows: frozenset[int | None],
) -> DecodeRows | None:
    single = plan.num_new_tokens == 1
    if not single.any():
        return None
    everything = bool(single.all())
    slots = plan.slots if everything else plan.slots[single]
    lengths = (plan.starts if everything else plan.starts[single]) + 1
    row_tables = tables[slots]
    return DecodeRows(
        None if everything else torch.from_numpy(firsts[single].astype(np.int64)),
        {window: plan_spans(row_tables, lengths, kv, window) for window in windows},
    )


def _prefill_rows(
    plan: StepPlan,
    firsts: npt.NDArray[np.int64],
    tables: Int32Array,
    kv: torch.Tensor,
    windows: frozenset[int | None],
) -> tuple[PrefillRow, ...]:
    rows = []
    for row in np.flatnonzero(plan.num_new_tokens > 1):
        first, count = int(firsts[row]), int(plan.num_new_tokens[row])
        table, start = tables[plan.slots[row]], int(plan.starts[row])
        contexts = {window: plan_context(table, start, count, kv, window) for window in windows}
        rows.append(PrefillRow(first, first + count, contexts))
    return tuple(rows)
