"""What one step of the model computes, as plain arrays.

The plan is all that a model runner gets, so that a tensor-parallel rank can be sent it by a
broadcast. A sequence lives in a *slot* of the runner: its block table, the tokens that penalties
look at, its sampling parameters and its last sampled token stay there from step to step; a plan
carries only what changes. Prefill chunks (many new tokens), decode (one) and verification (k + 1)
are rows of the same kind and mix.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from paceline.request import TopLogprobs
from paceline.sampling_params import SamplingParams

Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
EMPTY = np.empty(0, dtype=np.int32)


class SlotStart(NamedTuple):
    """A sequence takes a slot: all that the runner must know. Its block table starts empty."""

    slot: int
    sampling: SamplingParams
    choice: int
    prompt: Int32Array
    """[prompt tokens]"""
    output: Int32Array
    """[output tokens so far]"""


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One step. The runner applies it in this order: starts, table changes, block copies, the model
    over all rows (writing their KV), then sampling. No row reads KV that another one of the same
    step writes: rows come in any order.

    R rows with T new tokens in all, S samples, C table changes, K block copies. Rows are
    concatenated in order: row r owns the token positions from sum(num_new_tokens[:r]).
    """

    step_id: int
    """Grows by one with every step."""
    slots: Int32Array
    """[R] slot of each row; a slot has at most one row in a step."""
    starts: Int32Array
    """[R] tokens of the sequence whose KV is already in its blocks: position of the first new
    token.
    """
    num_new_tokens: Int32Array
    """[R] at least 1"""
    from_last_sample: BoolArray
    """[R] True: the row's one new token is the slot's last sample, known to the runner alone."""
    tokens: Int32Array
    """New tokens of the rows with from_last_sample False, concatenated in row order."""
    sample_positions: Int32Array
    """[S] position, among the T, whose logits are sampled; a position may be sampled by several
    slots.
    """
    sample_slots: Int32Array
    """[S] slot whose parameters sample and whose last sample this becomes."""
    sample_indices: Int32Array
    """[S] output index of the sampled token: with (seed, choice) the key of its random bits."""
    slot_starts: Sequence[SlotStart] = ()
    table_slots: Int32Array = field(default_factory=lambda: EMPTY)
    """[C] block_table[table_slots[c], table_columns[c]] = table_blocks[c], each entry once: a GPU
    sets them all at the same time.
    """
    table_columns: Int32Array = field(default_factory=lambda: EMPTY)
    table_blocks: Int32Array = field(default_factory=lambda: EMPTY)
    copy_sources: Int32Array = field(default_factory=lambda: EMPTY)
    """[K] blocks copied whole before anything is written in this step (copy-on-write)."""
    copy_targets: Int32Array = field(default_factory=lambda: EMPTY)

    @property
    def num_tokens(self) -> int:
        return int(self.num_new_tokens.sum())


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """What a step sampled."""

    step_id: int
    token_ids: Int32Array
    """[S] in the order of the plan's samples."""
    logprobs: dict[int, TopLogprobs] = field(default_factory=dict)
    """By sample number, only of the slots whose parameters ask for them."""
    ended_s: float = field(default_factory=time.monotonic)
    """time.monotonic() when the device had computed it, which may be long before one asks."""
    failures: dict[int, str] = field(default_factory=dict)
    """By sample number: why no token could be chosen. Its token id is then 0, and means nothing."""


class StepHandle(Protocol):
    """A launched step."""

    def done(self) -> bool:
        """Whether `result` would return at once."""

    def result(self) -> StepResult:
        """Wait, with the GIL released, until the step's tokens are on the CPU and its KV is
        visible.

        Raises what the step raised; the pool's blocks that it wrote are then garbage.
        """


class FinishedStep(NamedTuple):
    """A handle of a step that has ended, well or not."""

    outcome: StepResult | Exception

    def done(self) -> bool:
        return True

    def result(self) -> StepResult:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class ModelRunner(Protocol):
    """Runs steps in the order of their launch. Called by the engine thread alone."""

    max_num_slots: int
    """Slots that plans may use: 0 to max_num_slots - 1."""

    def launch(self, plan: StepPlan) -> StepHandle:
        """Begin a step; may return before it has run. The plan must not be changed afterwards.

        At most one earlier step may be unfinished.
        """

    def close(self) -> None:
        """Free what the runner holds."""
