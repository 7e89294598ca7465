"""What a prefill worker does in its engine thread: compute prompts, lease their KV as it becomes
final.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from paceline.engine.step_plan import StepPlan, StepResult
from paceline.errors import IntegrityError
from paceline.failpoints import Failpoints
from paceline.groups import Groups
from paceline.kv_transfer.lease import FirstToken, Lease, LeaseTable, Progress
from paceline.prefill_worker.outcomes import PrefillDone, Refused
from paceline.prefill_worker.rate import PrefillRate
from paceline.prefill_worker.scheduler import PrefillScheduler
from paceline.request import AttemptKey, FailureReason, Work
from paceline.worker.core import LoadReport, Peer, RouterPort
from paceline.worker.prefill_spans import prefill_spans
from paceline.worker.step_output import StepOutput


@dataclass(frozen=True, slots=True, eq=False)
class _Attempt:
    """From acceptance until the lease is over."""

    session: int
    work: Work
    lease: Lease
    wanted: set[int]
    """Choices that nobody has cancelled."""


class PrefillCore:
    """Implements `paceline.worker.core.Core`.

    An attempt's blocks are referenced by the scheduler while it computes and pinned by the lease
    until the reader's confirmation, so they outlive the computation for as long as somebody may
    read them.
    """

    def __init__(
        self,
        scheduler: PrefillScheduler[int],
        leases: LeaseTable,
        routers: RouterPort,
        failpoints: Failpoints,
        *,
        worker_id: str,
        unix_offset_s: float,
    ) -> None:
        self._scheduler = scheduler
        self._leases = leases
        self._routers = routers
        self._failpoints = failpoints
        self._worker_id = worker_id
        self._unix_offset_s = unix_offset_s
        self._attempts: dict[AttemptKey, _Attempt] = {}
        self._of_request: Groups[str, _Attempt] = Groups()
        self._of_session: Groups[int, _Attempt] = Groups()
        """The same attempts."""
        self._rate = PrefillRate()
        self._draining = False
        self.notify_changed: Callable[[Lease], None] = lambda lease: None
        """Set before the first dispatch: tells the io thread that a lease has grown or is over."""

    def dispatch(self, session: int, work: Work, peer: Peer | None, now: float) -> None:
        if peer is None or self._draining:
            why = "this worker is draining" if self._draining else "prefill needs a reader"
            self._answer(session, work, admitted=False, message=why)
            return
        if message := self._reason_to_refuse(session, work):
            self._answer(session, work, admitted=False, message=message)
            return
        self._end_older(work, now)
        accepted = self._scheduler.add(work, session, now)
        if isinstance(accepted, Refused):
            self._answer(session, work, admitted=False, message=accepted.message)
            return
        lease = self._leases.grant(work.key, peer.name, now, work.choices)
        self._leases.extend(lease, accepted.block_ids)
        self._remember(_Attempt(session, work, lease, set(work.choices)))
        if accepted.cached_tokens:
            self._leases.publish(lease, Progress(accepted.cached_tokens, None))
        self.notify_changed(lease)
        self._answer(session, work, admitted=True, cached_tokens=accepted.cached_tokens)

    def cancel(self, session: int, key: AttemptKey, choices: tuple[int, ...], now: float) -> None:
        attempt = self._attempts.get(key)
        if attempt is None or attempt.session != session:
            return
        attempt.wanted.difference_update(choices or attempt.work.choices)
        if attempt.wanted:
            self._scheduler.cancel(key, choices)
        else:
            self._end(key, "the router cancelled the attempt", now)

    def end_session(self, session: int, now: float) -> None:
        for attempt in self._of_session.of(session):
            self._end(attempt.work.key, "the router is gone", now)

    def drain(self, now: float) -> None:
        self._draining = True

    def reader_lost(self, reader: str, now: float) -> None:
        """A reader's KV session has ended: what it had not confirmed is lost."""
        for lease in self._leases.revoke_reader(reader, "the reader's session ended", now):
            self._fail(lease, now)

    def released(self, reader: str, key: AttemptKey, now: float) -> None:
        """A reader gave a lease back unused; only its own."""
        attempt = self._attempts.get(key)
        if attempt is not None and attempt.lease.reader == reader:
            self._end(key, "the reader released it", now)

    def tick(self, now: float) -> None:
        for lease in self._leases.settle():
            self._forget_lease(lease)
        for lease in self._leases.expire(now):
            self._fail(lease, now)

    def plan(self, now: float) -> StepPlan | None:
        plan = self._scheduler.plan(now)
        if plan is not None:
            self._rate.planned(plan.num_tokens, now)
        return plan

    def apply(self, result: StepResult, now: float) -> None:
        step = self._scheduler.apply(result, now)
        self._rate.applied(now)
        for progress in step.progressed:
            self._failpoints.hit("chunk")
            lease = self._attempts[progress.key].lease
            self._leases.publish(lease, Progress(progress.num_tokens, None))
            self.notify_changed(lease)
        for done in step.completed:
            spans = prefill_spans(self._worker_id, done.chunk_times, self._unix_offset_s)
            # Before the tokens: the router may end the request with the first one.
            self._routers.send_phase(done.session, done.key, spans, 0, "")
        completed: dict[int, list[PrefillDone[int]]] = {}
        for done in step.completed:
            completed.setdefault(done.session, []).append(done)
        for session, prompts in completed.items():
            self._routers.send_output(session, first_tokens_output(prompts))
        for done in step.completed:
            self._complete(done, now)
        for failed in step.failed:
            # The router first: it must not hear of a lost lease before it hears why.
            stream_ids = self._attempts[failed.key].work.stream_ids
            self._routers.send_failure(
                failed.session, stream_ids, FailureReason.INTERNAL, failed.message
            )
            self._end(failed.key, failed.message, now)

    def load(self) -> LoadReport:
        load = self._scheduler.load()
        return LoadReport(
            credit_blocks=0 if self._draining else load.credit_blocks,
            credit_sequences=0 if self._draining else load.credit_sequences,
            num_running=load.num_running,
            num_pending_tokens=load.num_pending_tokens,
            num_free_blocks=load.credit_blocks,
            draining=self._draining,
            prefill_tokens_per_s=self._rate.tokens_per_s,
        )

    @property
    def is_idle(self) -> bool:
        return not self._attempts and not self._scheduler.has_work

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()
        self._leases.check_integrity()
        attempts = set(self._attempts.values())
        if not attempts == set(self._of_request) == set(self._of_session):
            raise IntegrityError(
                f"{len(attempts)} attempts are here, {len(self._of_request)} are found by their "
                f"request and {len(self._of_session)} by their session"
            )

    def _rivals(self, work: Work) -> list[_Attempt]:
        """Attempts here of the same name, or at the same choices of the same request.

        A request has no more attempts here than choices.
        """
        return [
            attempt
            for attempt in self._of_request.of(work.key.request_id)
            if attempt.work.key == work.key
            or not set(work.choices).isdisjoint(attempt.work.choices)
        ]

    def _reason_to_refuse(self, session: int, work: Work) -> str | None:
        rivals = self._rivals(work)
        if any(rival.session != session for rival in rivals):
            return f"another session has work here under the name {work.key.request_id}"
        if any(rival.work.key.attempt >= work.key.attempt for rival in rivals):
            return "a newer attempt runs here"
        return None

    def _end_older(self, work: Work, now: float) -> None:
        for rival in self._rivals(work):
            self._end(rival.work.key, f"attempt {work.key.attempt} superseded it", now)

    def _remember(self, attempt: _Attempt) -> None:
        key = attempt.work.key
        self._attempts[key] = attempt
        self._of_request.add(key.request_id, attempt)
        self._of_session.add(attempt.session, attempt)

    def _complete(self, done: PrefillDone[int], now: float) -> None:
        """Publish a context that is whole; from here on only the lease keeps its blocks."""
        self._failpoints.hit("chunk")
        attempt = self._attempts[done.key]
        first_tokens = tuple(
            FirstToken(sample.choice, sample.token_id, sample.finish_reason, sample.logprobs)
            for sample in done.first_samples
        )
        # Also when every choice has ended with its first token: the decode worker may report them
        # first. The router cancels the attempt here, which gives the lease back.
        self._leases.publish(attempt.lease, Progress(done.num_tokens, first_tokens))
        self._scheduler.release(done.key)
        self.notify_changed(attempt.lease)
        self._failpoints.hit("published")

    def _fail(self, lease: Lease, now: float) -> None:
        """A lease was lost. While the prompt is still computed, the router has to hear of it."""
        attempt = self._forget_lease(lease)
        if attempt is None:
            return
        self.notify_changed(lease)
        if self._scheduler.cancel(lease.key):
            self._routers.send_failure(
                attempt.session, attempt.work.stream_ids, FailureReason.LEASE_LOST, lease.reason
            )

    def _forget(self, attempt: _Attempt) -> None:
        key = attempt.work.key
        del self._attempts[key]
        self._of_request.remove(key.request_id, attempt)
        self._of_session.remove(attempt.session, attempt)

    def _forget_lease(self, lease: Lease) -> _Attempt | None:
        """Drop the attempt of a lease that is over, unless the key has a newer lease by now."""
        attempt = self._attempts.get(lease.key)
        if attempt is None or attempt.lease is not lease:
            return None
        self._forget(attempt)
        return attempt

    def _end(self, key: AttemptKey, reason: str, now: float) -> None:
        """Nobody wants the attempt any more."""
        attempt = self._attempts.get(key)
        if attempt is None:
            return
        self._forget(attempt)
        self._scheduler.cancel(key)
        self._leases.revoke(attempt.lease, reason, now)
        self.notify_changed(attempt.lease)

    def _answer(
        self,
        session: int,
        work: Work,
        *,
        admitted: bool,
        message: str = "",
        cached_tokens: int = 0,
    ) -> None:
        self._routers.send_admission(
            session, work.key, admitted=admitted, message=message, cached_tokens=cached_tokens
        )


def first_tokens_output(completed: list[PrefillDone[int]]) -> StepOutput:
    """Put the first tokens of prompts of one router into columns."""
    samples = [sample for done in completed for sample in done.first_samples]
    finished = [
        (sample.stream_id, sample.finish_reason.value)
        for sample in samples
        if sample.finish_reason is not None
    ]
    return StepOutput(
        stream_ids=np.array([sample.stream_id for sample in samples], dtype=np.uint32),
        indices=np.array([sample.index for sample in samples], dtype=np.uint32),
        token_ids=np.array([sample.token_id for sample in samples], dtype=np.uint32),
        finished_stream_ids=np.array([stream for stream, _ in finished], dtype=np.uint32),
        finish_reasons=np.array([reason for _, reason in finished], dtype=np.uint8),
        logprobs={
            position: sample.logprobs
            for position, sample in enumerate(samples)
            if sample.logprobs is not None
        },
    )
