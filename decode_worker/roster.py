"""Who is on this worker and what each holds: blocks, slots, promises and rows.

The scheduler says what happens to an attempt; the roster moves what it holds accordingly, so that
all of it is in exactly one place: with the attempt until it forks, then with each sequence, at last
among the departures. A block that a sequence has copied for itself goes there at once.
"""

from collections import OrderedDict

import numpy as np

from paceline.decode_worker.admission import BlockBudget, Limits, num_promised_beyond_context
from paceline.decode_worker.attempts import Attempt, AttemptState, Sequence, SequenceState
from paceline.decode_worker.batch import RunningBatch, SlotTables
from paceline.decode_worker.departures import Departure, Departures
from paceline.decode_worker.outbox import Outbox
from paceline.decode_worker.outcomes import EndedAttempt, SequenceFailure
from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.chunking import PromptQueue
from paceline.engine.prefix_cache import PrefixCache
from paceline.errors import IntegrityError
from paceline.groups import Groups
from paceline.request import AttemptKey, FailureReason


class Roster:
    """All attempts of a worker, by age."""

    def __init__(
        self,
        allocator: BlockAllocator,
        prefix_cache: PrefixCache,
        limits: Limits,
        outbox: Outbox,
    ) -> None:
        self._allocator = allocator
        self._prefix_cache = prefix_cache
        self._limits = limits
        self._outbox = outbox
        self._open: dict[tuple[str, int], Sequence] = {}
        self._of_session: Groups[int, Attempt] = Groups()
        self._num_admitted = 0
        self.attempts: dict[AttemptKey, Attempt] = {}
        """Those of which something is still to be reported, oldest first."""
        self.holders: OrderedDict[Attempt, None] = OrderedDict()
        """Attempts with sequences that wait or run, oldest first. The others have no blocks."""
        self.imports: OrderedDict[AttemptKey, Attempt] = OrderedDict()
        """Those that are IMPORTING, the one whose prefill was seen longest ago first."""
        self.draining_imports: dict[AttemptKey, Attempt] = {}
        self.prompts: PromptQueue[Attempt] = PromptQueue(limits.prefill_age_bound_s)
        """Attempts whose context is computed here, until all of it is planned."""
        self.budget = BlockBudget(allocator)
        self.batch = RunningBatch(limits.max_num_seqs, limits.block_tokens)
        self.tables = SlotTables(limits.max_num_seqs, limits.max_model_len, limits.block_tokens)
        self.free_slots = list(reversed(range(limits.max_num_seqs)))
        self.departures = Departures(
            allocator, prefix_cache, self.tables, self.free_slots, limits.block_tokens
        )
        self.last_planned_step = -1
        self.last_applied_step = -1

    def open_sequence(self, request_id: str, choice: int) -> Sequence | None:
        """Find the sequence that reports this choice."""
        return self._open.get((request_id, choice))

    def attempts_of(self, session: int) -> tuple[Attempt, ...]:
        return self._of_session.of(session)

    def add(self, attempt: Attempt) -> None:
        """Take an attempt that has its context's blocks: give it slots and promises."""
        work = attempt.work
        self._num_admitted += 1
        attempt.number = self._num_admitted
        attempt.sequences = tuple(
            Sequence(attempt, choice, stream_id, self.free_slots.pop())
            for choice, stream_id in zip(work.choices, work.stream_ids, strict=True)
        )
        self.attempts[work.key] = attempt
        for sequence in attempt:
            self._open[work.key.request_id, sequence.choice] = sequence
        self._of_session.add(attempt.session, attempt)
        self.holders[attempt] = None
        if attempt.state is AttemptState.PREFILLING:
            self.prompts.add(attempt)
        else:
            self.imports[work.key] = attempt
        self._promise_to_waiting(attempt)

    def fork(self, attempt: Attempt, *, next_index: int, is_given: bool) -> list[Sequence]:
        """Give each waiting sequence the context's blocks and a row; they share until they write.

        All but one may have to copy a partial last block.
        """
        waiting = attempt.in_state(SequenceState.WAITING)
        blocks = attempt.context_block_ids
        is_partial = attempt.num_tokens % self._limits.block_tokens != 0
        for _ in waiting[1:]:
            self._allocator.share(blocks)
        attempt.owns_blocks = False
        attempt.num_promised = 0
        for sequence in waiting:
            sequence.move_to(SequenceState.RUNNING)
            sequence.num_copies_promised = int(is_partial and sequence is not waiting[-1])
            self.tables.block_table[sequence.slot, : len(blocks)] = blocks
            self.tables.tokens[sequence.slot, : attempt.num_tokens] = attempt.context
            self.batch.add(
                sequence,
                position=attempt.num_tokens,
                next_index=next_index,
                num_blocks=len(blocks),
                is_held=attempt.state is AttemptState.UNCONFIRMED,
                is_given=is_given,
            )
        return waiting

    def renew_import(self, key: AttemptKey, now: float) -> None:
        """Count the time of an import's promise from now."""
        if (attempt := self.imports.get(key)) is not None:
            attempt.renewed_s = now
            self.imports.move_to_end(key)

    def oldest_import(self) -> Attempt | None:
        return next(iter(self.imports.values()), None)

    def cache_context(self, attempt: Attempt, num_final_tokens: int) -> None:
        """Put the full blocks among the context's final tokens into the prefix cache.

        Somebody must hold a reference to them still.
        """
        size = self._limits.block_tokens
        for number in range(attempt.num_cached_blocks, num_final_tokens // size):
            tokens = attempt.context[number * size : (number + 1) * size]
            attempt.chain = self._prefix_cache.insert(
                attempt.chain, tokens, attempt.context_block_ids[number]
            )
            attempt.num_cached_blocks = number + 1

    def forget_context(self, attempt: Attempt) -> None:
        """Take the context out of the prefix cache."""
        self._prefix_cache.forget(attempt.chain)

    def finish(self, sequence: Sequence, num_output_tokens: int, now: float) -> None:
        """End a sequence whose last token is known."""
        self._leave(sequence, SequenceState.FINISHED)
        sequence.attempt.num_output_tokens += num_output_tokens
        self._close(sequence.attempt, now)

    def give_up(self, sequences: list[Sequence], now: float, *, is_kv_good: bool = True) -> None:
        """End open sequences of one attempt that nobody wants any more."""
        for sequence in sequences:
            self._leave(sequence, SequenceState.GONE, is_kv_good=is_kv_good)
        if sequences:
            self._close(sequences[0].attempt, now)

    def fail(
        self,
        sequences: list[Sequence],
        reason: FailureReason,
        message: str,
        now: float,
        *,
        is_kv_good: bool = True,
    ) -> None:
        """Give open sequences of one attempt back to their router.

        is_kv_good: False if their KV must not enter the prefix cache.
        """
        if sequences:
            stream_ids = tuple(sequence.stream_id for sequence in sequences)
            session = sequences[0].attempt.session
            self._outbox.add_failure(SequenceFailure(session, stream_ids, reason, message))
            self.give_up(sequences, now, is_kv_good=is_kv_good)

    def confirm(self, attempt: Attempt, now: float) -> None:
        """Report from now on, and what was held back first."""
        attempt.move_to(AttemptState.RUNNING)
        if attempt.in_state(SequenceState.WAITING) or attempt.in_state(SequenceState.RUNNING):
            self.cache_context(attempt, attempt.num_tokens)
        for sequence in attempt.in_state(SequenceState.RUNNING):
            self.batch.stop_holding(sequence)
        wanted = {
            sequence.stream_id for sequence in attempt if sequence.state is not SequenceState.GONE
        }
        held_back = [token for token in attempt.held_back if token.stream_id in wanted]
        attempt.held_back.clear()
        self._outbox.add_tokens(attempt.session, held_back)
        for sequence in attempt.in_state(SequenceState.FINISHED):
            self._forget(sequence)
        self._close(attempt, now)

    def end_import(self, attempt: Attempt) -> None:
        """Free what reads might have written until now."""
        attempt.move_to(AttemptState.ENDED)
        del self.draining_imports[attempt.work.key]
        self._allocator.release(attempt.context_block_ids)

    def check_integrity(self) -> None:
        """Add up blocks, slots and promises; raise IntegrityError where they disagree."""
        self._allocator.check_integrity()
        self.batch.check_integrity()
        waiting = [s for a in self.attempts.values() for s in a.in_state(SequenceState.WAITING)]
        running = [s for a in self.attempts.values() for s in a.in_state(SequenceState.RUNNING)]
        if set(map(id, running)) != set(map(id, self.batch.sequences)):
            raise IntegrityError(f"{len(running)} sequences run, rows: {self.batch.num_rows}")
        in_use = [sequence.slot for sequence in (*waiting, *running)]
        slots = [*in_use, *self.departures.slots, *self.free_slots]
        if sorted(slots) != list(range(self._limits.max_num_seqs)):
            raise IntegrityError(
                f"slots are not 0 to {self._limits.max_num_seqs - 1} once each: {sorted(slots)}"
            )
        promised = sum(attempt.num_promised for attempt in self.attempts.values())
        promised += int(self.batch.promised[: self.batch.num_rows].sum())
        promised += sum(sequence.num_copies_promised for sequence in running)
        self.budget.check_integrity(promised)
        self.prompts.check_integrity(
            [a for a in self.attempts.values() if a.state is AttemptState.PREFILLING]
        )
        self._check_indexes()
        self._check_references()

    def _check_indexes(self) -> None:
        """Compare the attempts with what finds some of them."""
        attempts = list(self.attempts.values())
        if set(self._of_session) != set(attempts):
            raise IntegrityError(
                f"{len(attempts)} attempts are here, {len(self._of_session)} are found by session"
            )
        holders = [attempt for attempt in attempts if attempt.holds_blocks]
        if list(self.holders) != holders:
            raise IntegrityError(
                f"{len(holders)} attempts hold blocks, those counted are {len(self.holders)}, or "
                "in another order"
            )
        importing = {a.work.key for a in attempts if a.state is AttemptState.IMPORTING}
        renewed = [attempt.renewed_s for attempt in self.imports.values()]
        if self.imports.keys() != importing or renewed != sorted(renewed):
            raise IntegrityError(
                f"{len(importing)} attempts are imported, those counted are {len(self.imports)}, "
                f"renewed at {renewed}"
            )

    def _check_references(self) -> None:
        holders = [*self.departures.block_ids]
        for attempt in (*self.attempts.values(), *self.draining_imports.values()):
            if attempt.owns_blocks:
                holders += attempt.context_block_ids
        for sequence in self.batch.sequences:
            holders += self._blocks_of(sequence)
        counts = np.bincount(
            np.array(holders, dtype=np.int64), minlength=self._allocator.num_blocks
        )
        for block_id, count in enumerate(counts.tolist()):
            if self._allocator.num_references(block_id) != count:
                raise IntegrityError(
                    f"block {block_id} is held by {count} sequences and attempts and has "
                    f"{self._allocator.num_references(block_id)} references"
                )

    def _blocks_of(self, sequence: Sequence) -> list[int]:
        row = self.batch.row_of(sequence)
        num_blocks = int(self.batch.capacities[row]) // self._limits.block_tokens
        return self.tables.blocks(sequence.slot, num_blocks)

    def _leave(self, sequence: Sequence, state: SequenceState, *, is_kv_good: bool = True) -> None:
        """Take everything from a sequence; what steps in flight may use goes to the departures."""
        attempt, before = sequence.attempt, sequence.state
        if before is SequenceState.RUNNING:
            row = self.batch.row_of(sequence)
            self.budget.promise(-int(self.batch.promised[row]) - sequence.num_copies_promised)
            sequence.num_copies_promised = 0
            is_right = is_kv_good and attempt.state is AttemptState.RUNNING
            departure = Departure(
                self.last_planned_step,
                (sequence.slot,),
                tuple(self._blocks_of(sequence)),
                attempt if is_right else None,
                int(self.batch.positions[row]),
            )
            self.batch.remove(sequence)
            self.departures.add(departure)
        sequence.move_to(state)
        if before is SequenceState.WAITING:
            self.departures.add(Departure(self.last_planned_step, (sequence.slot,), ()))
            self._promise_to_waiting(attempt)
        if not sequence.is_open:
            self._forget(sequence)
        if before is not SequenceState.FINISHED and not attempt.holds_blocks:
            del self.holders[attempt]

    def _close(self, attempt: Attempt, now: float) -> None:
        """End an attempt of which nothing is open; free blocks that no sequence waits for."""
        importing = attempt.state is AttemptState.IMPORTING and not attempt.reads_ended
        if attempt.owns_blocks and not importing and not attempt.in_state(SequenceState.WAITING):
            attempt.owns_blocks = False
            self.departures.add(Departure(self.last_planned_step, (), attempt.context_block_ids))
        if attempt.open_sequences() or attempt.work.key not in self.attempts:
            return
        key = attempt.work.key
        del self.attempts[key]
        self.prompts.discard(attempt)
        self.imports.pop(key, None)
        self._of_session.remove(attempt.session, attempt)
        if importing:
            attempt.move_to(AttemptState.DRAINING_IMPORT)
            self.draining_imports[key] = attempt
            self._outbox.add_abandoned_import(key)
        else:
            attempt.move_to(AttemptState.ENDED)
        self._outbox.add_ended(
            EndedAttempt(
                key,
                attempt.session,
                attempt.arrived_s,
                attempt.running_s,
                now,
                attempt.num_output_tokens,
            )
        )

    def _promise_to_waiting(self, attempt: Attempt) -> None:
        """Promise what the waiting sequences will take, instead of what was promised before."""
        num_waiting = len(attempt.in_state(SequenceState.WAITING))
        promised = num_promised_beyond_context(
            attempt.num_tokens, num_waiting, self._limits.block_tokens
        )
        self.budget.promise(promised - attempt.num_promised)
        attempt.num_promised = promised

    def _forget(self, sequence: Sequence) -> None:
        name = (sequence.attempt.work.key.request_id, sequence.choice)
        if self._open.get(name) is sequence:
            del self._open[name]
