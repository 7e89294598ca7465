"""A model runner in plain numpy that notices every wrong block, position, token and copy.

The KV of a position is a hash chain over all tokens up to it, as the KV of a real model depends on
all of them. Before a row runs, and again after all rows of its step have written, the KV that the
row attends to is compared, through its slot's block table, with what its sequence's own tokens
give. The sampled token is a function of the context's hash and of (seed, choice, index), so
`reference_output` knows the right answer without any paging.

A GPU may run a step at any time from its launch until its result is asked for. Here it runs at the
one end or at the other: `runs_late` shows what others do meanwhile to blocks that the step uses.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.step_plan import Int32Array, SlotStart, StepPlan, StepResult
from paceline.request import TopLogprobs
from paceline.sampling_params import SamplingParams

KvArray = npt.NDArray[np.uint64]

GARBAGE = np.uint64(0xDEAD)
_MASK = (1 << 64) - 1
_ROOT = 0x9E3779B97F4A7C15


class SimulationError(AssertionError):
    """The plan under test is wrong; the message says where."""


def _mix(left: int, right: int) -> int:
    value = (left ^ (right + 0x632BE59BD9B4E019)) * 0xFF51AFD7ED558CCD & _MASK
    value = (value ^ (value >> 32)) * 0xC4CEB9FE1A85EC53 & _MASK
    return value ^ (value >> 29)


@dataclass(frozen=True, slots=True)
class SimulatedModel:
    """What the runner computes, without any paging."""

    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()

    def kv_of(self, tokens: Sequence[int] | Int32Array, after: int = _ROOT) -> list[int]:
        """Give the KV of each token; `after` is the KV of the position before the first."""
        values = []
        for token in tokens:
            after = _mix(after, int(token))
            values.append(after)
        return values

    def sample(self, last_kv: int, sampling: SamplingParams, choice: int, index: int) -> int:
        """Give the token that follows the position whose KV is `last_kv`."""
        state = last_kv
        if not sampling.is_greedy:
            for part in (sampling.seed or 0, choice, index):
                state = _mix(state, part)
        forbidden: set[int] = set()
        if index < sampling.min_tokens:
            forbidden.update(self.eos_token_ids, sampling.stop_token_ids)
        while (token := state % self.vocab_size) in forbidden:
            state = _mix(state, 1)
        return token

    def reference_output(
        self,
        prompt: Sequence[int] | Int32Array,
        sampling: SamplingParams,
        choice: int,
        num_tokens: int,
    ) -> list[int]:
        """Give the first `num_tokens` output tokens; knows nothing of when to stop."""
        last_kv = self.kv_of(prompt)[-1]
        output: list[int] = []
        for index in range(num_tokens):
            output.append(self.sample(last_kv, sampling, choice, index))
            last_kv = _mix(last_kv, output[-1])
        return output


class _Sequence:
    """What the runner keeps in a slot."""

    def __init__(self, model: SimulatedModel, start: SlotStart, max_num_blocks: int) -> None:
        self.sampling = start.sampling
        self.choice = start.choice
        self.num_prompt_tokens = len(start.prompt)
        self.tokens = [int(token) for token in (*start.prompt, *start.output)]
        self.kv = model.kv_of(self.tokens)
        self.block_table = np.full(max_num_blocks, -1, dtype=np.int64)

    @property
    def next_index(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.kv.append(_mix(self.kv[-1], token))


class SimulatedHandle:
    """A step; its result counts as unknown until asked for."""

    def __init__(self, plan: StepPlan, run_until: Callable[["SimulatedHandle"], None]) -> None:
        self.plan = plan
        self.outcome: StepResult | None = None
        """None: it has not run."""
        self.is_finished = False
        self._run_until = run_until

    def done(self) -> bool:
        return self.outcome is not None

    def result(self) -> StepResult:
        self.is_finished = True
        if self.outcome is None:
            self._run_until(self)
        assert self.outcome is not None
        return self.outcome


class SimulatedRunner:
    """A ModelRunner. `pool[block, offset]` is the KV of one token."""

    def __init__(
        self,
        max_num_slots: int,
        vocab_size: int,
        num_blocks: int,
        block_tokens: int,
        eos_token_ids: tuple[int, ...] = (),
        *,
        runs_late: bool = False,
    ) -> None:
        """runs_late: a step runs when its result is asked for, not within `launch`."""
        self.max_num_slots = max_num_slots
        self.block_tokens = block_tokens
        self.model = SimulatedModel(vocab_size, eos_token_ids)
        self.pool: KvArray = np.zeros((num_blocks, block_tokens), dtype=np.uint64)
        self.num_blocks_copied = 0
        self.runs_late = runs_late
        self.has_no_token: Callable[[list[int], int], bool] = lambda tokens, index: False
        """Whether no token can be chosen after `tokens`, for output index `index`."""
        self._slots: dict[int, _Sequence] = {}
        self._last_step_id: int | None = None
        self._unfinished: list[SimulatedHandle] = []
        self._waiting: deque[SimulatedHandle] = deque()
        """Steps that have not run."""

    def launch(self, plan: StepPlan) -> SimulatedHandle:
        self._check_shapes(plan)
        self._unfinished = [handle for handle in self._unfinished if not handle.is_finished]
        _require(len(self._unfinished) <= 1, "launched with two earlier steps unfinished")
        in_order = self._last_step_id is None or plan.step_id == self._last_step_id + 1
        _require(in_order, f"step {plan.step_id} launched after step {self._last_step_id}")
        self._last_step_id = plan.step_id
        handle = SimulatedHandle(plan, self._run_until)
        self._unfinished.append(handle)
        self._waiting.append(handle)
        if not self.runs_late:
            self._run_until(handle)
        return handle

    def close(self) -> None:
        self._slots.clear()

    def reference_output(
        self,
        prompt: Sequence[int] | Int32Array,
        sampling: SamplingParams,
        choice: int,
        num_tokens: int,
    ) -> list[int]:
        return self.model.reference_output(prompt, sampling, choice, num_tokens)

    def fill(self, block_ids: Sequence[int], tokens: Sequence[int] | Int32Array) -> None:
        """Write the KV of a whole context into blocks, as if read from a peer."""
        blocks = np.asarray(block_ids, dtype=np.int64)
        kv = np.array(self.model.kv_of(tokens), dtype=np.uint64)
        positions = np.arange(len(kv))
        self.pool[blocks[positions // self.block_tokens], positions % self.block_tokens] = kv

    def finish(self, handle: SimulatedHandle, allocator: BlockAllocator) -> StepResult:
        """Give a step's result; a step that runs late must not use a block that nobody holds."""
        free = [
            block_id
            for block_id in range(allocator.num_blocks)
            if not allocator.num_references(block_id)
            and not allocator.num_pins(block_id)
            and not allocator.is_cached(block_id)
        ]
        self.pool[free] = GARBAGE
        result = handle.result()
        written = np.flatnonzero((self.pool[free] != GARBAGE).any(axis=1))
        blocks = [free[number] for number in written.tolist()]
        _require(not blocks, f"step {result.step_id} wrote blocks that nobody holds: {blocks}")
        return result

    def checksum(self, block_id: int) -> bytes:
        """For `PrefixCache.check_integrity`: cached blocks must not be written."""
        return self.pool[block_id].tobytes()

    def _run_until(self, last: SimulatedHandle) -> None:
        """Run the steps that wait, in the order of their launch, up to one of them."""
        while last.outcome is None:
            handle = self._waiting.popleft()
            handle.outcome = self._run(handle.plan)

    def _run(self, plan: StepPlan) -> StepResult:
        for start in plan.slot_starts:
            self._require_slot(start.slot)
            self._slots[start.slot] = _Sequence(self.model, start, len(self.pool))
        entries = list(zip(plan.table_slots.tolist(), plan.table_columns.tolist(), strict=True))
        _require(len(set(entries)) == len(entries), f"a table entry is set twice: {entries}")
        changes = zip(plan.table_slots, plan.table_columns, plan.table_blocks, strict=True)
        for slot, column, block in changes:
            _require(0 <= block < len(self.pool), f"block {block} is not in the pool")
            self._sequence(slot).block_table[column] = block
        self._copy_blocks(plan)
        rows = self._run_rows(plan)
        return self._sample(plan, rows)

    def _check_shapes(self, plan: StepPlan) -> None:
        num_rows = len(plan.slots)
        for name in ("starts", "num_new_tokens", "from_last_sample"):
            _require(len(getattr(plan, name)) == num_rows, f"{name} has not one element a row")
        _require(num_rows > 0, "a step without rows")
        _require(len(set(plan.slots.tolist())) == num_rows, f"a slot has two rows: {plan.slots}")
        _require(bool((plan.num_new_tokens >= 1).all()), "a row without new tokens")
        given = plan.num_new_tokens[~plan.from_last_sample].sum()
        _require(len(plan.tokens) == given, f"{len(plan.tokens)} tokens for {given} positions")
        num_samples = len(plan.sample_positions)
        _require(len(plan.sample_slots) == num_samples, "sample_slots has another length")
        _require(len(plan.sample_indices) == num_samples, "sample_indices has another length")
        _require(len(plan.copy_sources) == len(plan.copy_targets), "copies differ in length")

    def _require_slot(self, slot: int) -> None:
        _require(0 <= slot < self.max_num_slots, f"slot {slot} is not one of {self.max_num_slots}")

    def _sequence(self, slot: int) -> _Sequence:
        self._require_slot(slot)
        _require(int(slot) in self._slots, f"slot {slot} was never started")
        return self._slots[int(slot)]

    def _copy_blocks(self, plan: StepPlan) -> None:
        targets = plan.copy_targets.tolist()
        _require(len(set(targets)) == len(targets), f"a block is copied to twice: {targets}")
        overlap = set(targets) & set(plan.copy_sources.tolist())
        _require(not overlap, f"blocks are source and target at once: {overlap}")
        self.pool[plan.copy_targets] = self.pool[plan.copy_sources]
        self.num_blocks_copied += len(targets)

    def _run_rows(self, plan: StepPlan) -> list[tuple[int, int]]:
        """Run all rows; give (slot, position in its sequence) of each of the T new tokens."""
        positions_of_rows: list[tuple[int, int]] = []
        written: dict[tuple[int, int], int] = {}
        ends = []
        num_given = 0
        columns = zip(
            plan.slots.tolist(),
            plan.starts.tolist(),
            plan.num_new_tokens.tolist(),
            plan.from_last_sample.tolist(),
            strict=True,
        )
        rows = list(columns)
        for slot, start, _, _ in rows:
            self._require_kv(slot, start, "before the step")
        for slot, start, num_new, from_last in rows:
            sequence = self._sequence(slot)
            end = start + num_new
            if from_last:
                _require(num_new == 1, f"slot {slot} has {num_new} tokens from its last sample")
                _require(
                    end == len(sequence.tokens) and sequence.next_index > 0,
                    f"slot {slot} takes its last sample at {start}, it has "
                    f"{len(sequence.tokens)} tokens",
                )
            else:
                given = plan.tokens[num_given : num_given + num_new].tolist()
                num_given += num_new
                _require(
                    given == sequence.tokens[start:end],
                    f"slot {slot} gets tokens {given} at {start}, "
                    f"its sequence has {sequence.tokens[start:end]}",
                )
            for position in range(start, end):
                column, offset = divmod(position, self.block_tokens)
                block = int(sequence.block_table[column])
                _require(block >= 0, f"slot {slot} has no block for position {position}")
                owner = written.setdefault((block, offset), slot)
                _require(owner == slot, f"slots {owner} and {slot} write block {block} together")
                self.pool[block, offset] = sequence.kv[position]
                positions_of_rows.append((slot, position))
            ends.append((slot, end))
        for slot, end in ends:
            self._require_kv(slot, end, "after the step's writes")
        return positions_of_rows

    def _require_kv(self, slot: int, num_tokens: int, when: str) -> None:
        sequence = self._sequence(slot)
        _require(
            num_tokens <= len(sequence.tokens),
            f"slot {slot} claims {num_tokens} tokens, its sequence has {len(sequence.tokens)}",
        )
        num_columns = -(-num_tokens // self.block_tokens)
        table = sequence.block_table[:num_columns]
        _require(bool((table >= 0).all()), f"slot {slot} has no block in {table.tolist()} ({when})")
        found = self.pool[table].reshape(-1)[:num_tokens]
        wrong = np.flatnonzero(found != np.array(sequence.kv[:num_tokens], dtype=np.uint64))
        _require(
            len(wrong) == 0,
            f"slot {slot} has wrong KV {when} at positions {wrong[:8].tolist()} of {num_tokens}, "
            f"blocks {table.tolist()}",
        )

    def _sample(self, plan: StepPlan, rows: list[tuple[int, int]]) -> StepResult:
        token_ids = np.empty(len(plan.sample_slots), dtype=np.int32)
        logprobs: dict[int, TopLogprobs] = {}
        failures: dict[int, str] = {}
        samples = zip(
            plan.sample_positions.tolist(),
            plan.sample_slots.tolist(),
            plan.sample_indices.tolist(),
            strict=True,
        )
        for number, (position_in_step, slot, index) in enumerate(samples):
            row_slot, position = rows[position_in_step]
            sequence = self._sequence(slot)
            context = self._sequence(row_slot).tokens[: position + 1]
            _require(
                context == sequence.tokens,
                f"slot {slot} has {len(sequence.tokens)} tokens and samples after position "
                f"{position} of slot {row_slot}",
            )
            _require(
                index == sequence.next_index,
                f"slot {slot} samples index {index}, its next is {sequence.next_index}",
            )
            if self.has_no_token(sequence.tokens, index):
                failures[number] = "the model gave nan as the largest logit"
                token_ids[number] = 0
                sequence.append(0)
                continue
            sampling = sequence.sampling
            token = self.model.sample(sequence.kv[-1], sampling, sequence.choice, index)
            token_ids[number] = token
            if sampling.logprobs is not None:
                top = tuple((token + i) % self.model.vocab_size for i in range(sampling.logprobs))
                logprobs[number] = TopLogprobs(-0.5, top, tuple(-0.5 - i for i in range(len(top))))
            sequence.append(token)
        return StepResult(plan.step_id, token_ids, logprobs, failures=failures)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise SimulationError(message)
