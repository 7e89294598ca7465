"""Continuous batching: what is taken, what the next step computes, what came of it."""

from collections import deque
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf

import numpy as np

from paceline.decode_worker.admission import (
    Limits,
    num_blocks_to_commit,
    num_promised_beyond_context,
    reason_never_to_admit,
)
from paceline.decode_worker.attempts import Attempt, AttemptState, OutputToken, SequenceState
from paceline.decode_worker.outbox import Outbox
from paceline.decode_worker.outcomes import Admitted, DecodeStep, Refused
from paceline.decode_worker.planning import StepPlanner, UnappliedStep
from paceline.decode_worker.results import take_samples
from paceline.decode_worker.roster import Roster
from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.prefix_cache import PrefixCache
from paceline.engine.step_plan import StepPlan, StepResult
from paceline.engine.stop_conditions import StopConditions
from paceline.errors import IntegrityError
from paceline.kv_transfer.lease import FirstToken
from paceline.request import AttemptKey, FailureReason, Work, num_blocks_for
from paceline.worker.core import LoadReport


class DecodeScheduler:
    """Called by the engine thread alone; times are arguments. Up to two steps may be unapplied.

    Everything that leaves the worker comes out of `apply`, or of `take_output` when no step is
    there to be applied (after any other call, and after a `plan` that gave None): tokens, failures,
    imports to abandon.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        prefix_cache: PrefixCache,
        *,
        block_tokens: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        local_prefill_tokens: int | None,
        watermark_blocks: int,
        promise_ttl_s: float,
        prefill_age_bound_s: float,
        eos_token_ids: Collection[int],
        max_model_len: int,
    ) -> None:
        """local_prefill_tokens: longest uncached context computed here; None: any, 0: none."""
        self._limits = Limits(
            block_tokens=block_tokens,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            local_prefill_tokens=local_prefill_tokens,
            watermark_blocks=watermark_blocks,
            promise_ttl_s=promise_ttl_s,
            prefill_age_bound_s=prefill_age_bound_s,
            max_model_len=max_model_len,
        )
        self._allocator = allocator
        self._prefix_cache = prefix_cache
        self._eos_token_ids = frozenset(eos_token_ids)
        self._outbox = Outbox()
        self._roster = Roster(allocator, prefix_cache, self._limits, self._outbox)
        self._planner = StepPlanner(allocator, self._limits, self._roster)
        self._unapplied: deque[UnappliedStep] = deque()
        self._is_draining = False

    # What arrives.

    def admit(
        self, work: Work, session: int, *, has_source: bool, now: float
    ) -> Admitted | Refused:
        """Take the work with everything it needs, or refuse it and keep nothing.

        With a source, reads may write the blocks after the cached ones until `imported` or
        `import_ended`. A newer attempt ends an older one of the same choices and session; an older
        one is refused.
        """
        if self._is_draining:
            return Refused(FailureReason.DRAINING, "this decode worker is draining")
        message = self._supersede(work, session, now)
        if message is not None:
            return Refused(FailureReason.REFUSED, message)
        conditions = StopConditions.of(
            work.sampling,
            num_prompt_tokens=len(work.prompt),
            max_model_len=self._limits.max_model_len,
            eos_token_ids=self._eos_token_ids,
        )
        message = reason_never_to_admit(
            work, conditions.max_output_tokens, self._allocator.num_blocks, self._limits
        )
        if message is not None:
            return Refused(FailureReason.REFUSED, message)
        self.tidy()
        num_free = len(self._roster.free_slots)
        if len(work.choices) > num_free:
            return Refused(
                FailureReason.REFUSED,
                f"{len(work.choices)} choices are as many sequences, {num_free} of "
                f"{self._limits.max_num_seqs} are free now. If this happens often, raise "
                "decode.max_num_seqs or decode.replicas",
            )
        return self._take_blocks(work, session, conditions, has_source, now)

    def import_progressed(self, key: AttemptKey, now: float) -> None:
        """Renew the promise."""
        self._roster.renew_import(key, now)

    def imported(self, key: AttemptKey, first_tokens: SequenceOf[FirstToken], now: float) -> None:
        """All reads have ended well: choices may run, outputs are held back until `confirmed`."""
        attempt = self._roster.imports.pop(key, None)
        if attempt is None:
            return
        attempt.reads_ended = True
        attempt.move_to(AttemptState.UNCONFIRMED)
        index = attempt.work.next_index
        first_of = {first.choice: first for first in first_tokens}
        for sequence in attempt.in_state(SequenceState.WAITING):
            first = first_of.get(sequence.choice)
            if first is None:
                message = f"prefill gave no first token for choice {sequence.choice}"
                self._roster.fail([sequence], FailureReason.LEASE_LOST, message, now)
                continue
            reason = first.finish_reason
            token = OutputToken(sequence.stream_id, index, first.token_id, reason, first.logprobs)
            attempt.held_back.append(token)
            if reason is None:
                sequence.first_token = first.token_id
            else:
                self._roster.finish(sequence, 1, now)
        if attempt.in_state(SequenceState.WAITING):
            self._planner.take_imported(attempt)

    def confirmed(self, key: AttemptKey, now: float) -> None:
        """HELD. The first tokens, and what was held back, are in the next output."""
        attempt = self._roster.attempts.get(key)
        if attempt is not None and attempt.state is AttemptState.UNCONFIRMED:
            self._roster.confirm(attempt, now)

    def lost(self, key: AttemptKey, message: str, now: float) -> None:
        """Fail an unconfirmed attempt (LEASE_LOST); others have ended, or need no lease."""
        attempt = self._roster.attempts.get(key)
        if attempt is not None and attempt.state in (
            AttemptState.IMPORTING,
            AttemptState.UNCONFIRMED,
        ):
            sequences = attempt.open_sequences()
            self._roster.fail(sequences, FailureReason.LEASE_LOST, message, now)

    def import_ended(self, key: AttemptKey) -> None:
        """Nothing writes to the destination blocks any more; harmless when said again."""
        draining = self._roster.draining_imports.get(key)
        if draining is not None:
            self._roster.end_import(draining)
        elif (attempt := self._roster.imports.get(key)) is not None:
            attempt.reads_ended = True

    # What ends early.

    def cancel(self, key: AttemptKey, choices: Collection[int] = (), *, now: float) -> None:
        """End some choices, or all when none is named; unknown ones have ended already."""
        attempt = self._roster.attempts.get(key)
        if attempt is not None:
            wanted = choices or attempt.work.choices
            self._roster.give_up([s for s in attempt.open_sequences() if s.choice in wanted], now)

    def end_session(self, session: int, now: float) -> None:
        """The router is gone: cancel all its work and drop what was to be reported to it."""
        for attempt in self._roster.attempts_of(session):
            self._roster.give_up(attempt.open_sequences(), now)
        self._outbox.drop_session(session)

    def drain(self) -> None:
        """Refuse new work from now on."""
        self._is_draining = True

    def expire(self, now: float) -> None:
        """Fail promises whose prefill made no progress for promise_ttl_s (PROMISE_EXPIRED)."""
        ttl_s = self._limits.promise_ttl_s
        while (attempt := self._roster.oldest_import()) and now - attempt.renewed_s > ttl_s:
            message = (
                f"prefill made no progress for {now - attempt.renewed_s:.1f} s, "
                f"decode.promise_ttl_s is {ttl_s}"
            )
            sequences = attempt.open_sequences()
            self._roster.fail(sequences, FailureReason.PROMISE_EXPIRED, message, now)

    # Steps.

    def plan(self, now: float) -> StepPlan | None:
        """Plan the next step; None when there is nothing to compute now."""
        if len(self._unapplied) > 1:
            raise IntegrityError(f"planned a step while {len(self._unapplied)} are not applied")
        self.tidy()
        planned = self._planner.plan(now)
        if planned is None:
            return None
        plan, unapplied = planned
        self._unapplied.append(unapplied)
        return plan

    def apply(self, result: StepResult, now: float) -> DecodeStep:
        """Take the result of the oldest unapplied step; give all that may leave the worker."""
        if not self._unapplied or self._unapplied[0].step_id != result.step_id:
            expected = [step.step_id for step in self._unapplied]
            raise IntegrityError(f"result of step {result.step_id} while {expected} are unapplied")
        step = self._unapplied.popleft()
        take_samples(step, result, self._roster, self._outbox, now)
        self._roster.last_applied_step = step.step_id
        return self._outbox.take()

    def take_output(self) -> DecodeStep:
        """Give what came up since the last output without a step."""
        return self._outbox.take()

    def tidy(self) -> None:
        """Free what has ended and cache its blocks.

        `plan` and `admit` do it. To call it earlier, beside a running step, takes it off their
        time.
        """
        if len(self._roster.departures):
            self._roster.departures.settle(self._roster.last_applied_step)

    # What is seen from outside.

    def load(self) -> LoadReport:
        """Say what all routers together may send now."""
        roster = self._roster
        credit_blocks = credit_sequences = 0
        if not self._is_draining:
            credit_blocks = self._num_blocks_to_commit()
            credit_sequences = len(roster.free_slots)
        return LoadReport(
            credit_blocks=credit_blocks,
            credit_sequences=credit_sequences,
            num_running=roster.batch.num_rows,
            num_pending_tokens=roster.prompts.num_tokens,
            num_free_blocks=max(roster.budget.num_spare, 0),
            draining=self._is_draining,
        )

    @property
    def is_idle(self) -> bool:
        """Whether no request holds anything here."""
        roster = self._roster
        return not (
            roster.attempts or roster.draining_imports or len(roster.departures) or self._unapplied
        )

    def check_integrity(self) -> None:
        """Add everything up; raise IntegrityError with the numbers that disagree."""
        self._roster.check_integrity()
        if len(self._unapplied) > 2:
            raise IntegrityError(f"{len(self._unapplied)} steps are unapplied, 2 may be")

    # Parts of admission.

    def _supersede(self, work: Work, session: int, now: float) -> str | None:
        """End older attempts of the work's choices, or say why this one may not replace them."""
        key = work.key
        if key in self._roster.attempts or key in self._roster.draining_imports:
            return f"attempt {key.attempt} of {key.request_id} is here already"
        found = [self._roster.open_sequence(key.request_id, choice) for choice in work.choices]
        earlier = [sequence for sequence in found if sequence is not None]
        for sequence in earlier:
            if sequence.attempt.session != session:
                return f"another session has work here under the name {key.request_id}"
            number = sequence.attempt.work.key.attempt
            if number > key.attempt:
                return f"attempt {key.attempt} of {key.request_id} is older than {number}, now here"
        for sequence in earlier:
            self._roster.give_up([sequence], now)
        return None

    def _take_blocks(
        self,
        work: Work,
        session: int,
        conditions: StopConditions,
        has_source: bool,
        now: float,
    ) -> Admitted | Refused:
        size = self._limits.block_tokens
        context = np.concatenate((work.prompt, work.output)).astype(np.int32, copy=False)
        # Who only reads KV needs no logits of the last token; who computes it does.
        limit = work.num_tokens if has_source else work.num_tokens - 1
        match = self._prefix_cache.match(context, work.tenant, limit=limit)
        num_cached = len(match.block_ids) * size
        num_new = num_blocks_for(work.num_tokens, size) - len(match.block_ids)
        promised = num_promised_beyond_context(work.num_tokens, len(work.choices), size)
        message = self._no_room(num_new + promised, work.num_tokens - num_cached, has_source)
        if message is not None:
            self._allocator.release(match.block_ids)
            return Refused(FailureReason.REFUSED, message)
        block_ids = (*match.block_ids, *self._allocator.allocate(num_new))
        attempt = Attempt(
            num_tokens=work.num_tokens,
            num_planned=num_cached,
            arrived_s=now,
            work=work,
            session=session,
            context=context,
            context_block_ids=block_ids,
            stop_conditions=conditions,
            chain=match.chain,
            num_cached_blocks=len(match.block_ids),
            state=AttemptState.IMPORTING if has_source else AttemptState.PREFILLING,
            renewed_s=now,
        )
        self._roster.add(attempt)
        return Admitted(block_ids, num_cached)

    def _no_room(self, num_blocks: int, num_uncached: int, has_source: bool) -> str | None:
        most = self._limits.local_prefill_tokens
        if not has_source and most is not None and num_uncached > most:
            return f"{num_uncached} tokens have no cached KV, decode.local_prefill_tokens is {most}"
        num_free = self._num_blocks_to_commit()
        if num_blocks > num_free:
            return (
                f"{num_blocks} KV blocks are needed beside cached ones, {num_free} of "
                f"{self._allocator.num_blocks} can be committed now. If this happens often, raise "
                "decode.num_kv_blocks or decode.replicas"
            )
        return None

    def _num_blocks_to_commit(self) -> int:
        return num_blocks_to_commit(
            self._roster.budget.num_spare,
            self._roster.batch.num_rows,
            self._limits.watermark_blocks,
            is_empty=not self._roster.attempts,
        )
