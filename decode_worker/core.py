"""What a decode worker does in its engine thread: admit work, have its KV read, run it, say what
came out.
"""

from collections.abc import Sequence
from typing import Protocol

from paceline.decode_worker.outcomes import DecodeStep, Refused
from paceline.decode_worker.scheduler import DecodeScheduler
from paceline.engine.step_plan import StepPlan, StepResult
from paceline.failpoints import Failpoints
from paceline.kv_transfer.lease import FirstToken
from paceline.request import AttemptKey, Span, Work
from paceline.worker.core import LoadReport, Peer, RouterPort
from paceline.worker.prefill_spans import prefill_spans


class Importer(Protocol):
    """Where imports are begun and given up; see `paceline.worker.kv_reader.KvReader`."""

    def begin(
        self, key: AttemptKey, owner: Peer, num_tokens: int, targets: Sequence[int], num_cached: int
    ) -> None: ...

    def abandon(self, key: AttemptKey) -> None: ...


class DecodeCore:
    """Implements `paceline.worker.core.Core`, and what `intake` posts about imports."""

    def __init__(
        self,
        scheduler: DecodeScheduler,
        routers: RouterPort,
        failpoints: Failpoints,
        *,
        worker_id: str,
        block_tokens: int,
        transport: str,
        unix_offset_s: float,
    ) -> None:
        self._scheduler = scheduler
        self._routers = routers
        self._failpoints = failpoints
        self._worker_id = worker_id
        self._block_tokens = block_tokens
        self._transport = transport
        self._unix_offset_s = unix_offset_s
        self._sessions: dict[AttemptKey, int] = {}
        self.importer: Importer | None = None
        """Set before the first dispatch."""

    def dispatch(self, session: int, work: Work, peer: Peer | None, now: float) -> None:
        answer = self._scheduler.admit(work, session, has_source=peer is not None, now=now)
        if isinstance(answer, Refused):
            self._routers.send_admission(
                session, work.key, admitted=False, message=answer.message, cached_tokens=0
            )
            return
        self._sessions[work.key] = session
        self._routers.send_admission(
            session,
            work.key,
            admitted=True,
            message="",
            cached_tokens=answer.num_cached_tokens,
        )
        if peer is not None:
            assert self.importer is not None
            num_cached = answer.num_cached_tokens // self._block_tokens
            self.importer.begin(work.key, peer, work.num_tokens, answer.block_ids, num_cached)

    def cancel(self, session: int, key: AttemptKey, choices: tuple[int, ...], now: float) -> None:
        if self._sessions.get(key) == session:
            self._scheduler.cancel(key, choices, now=now)

    def end_session(self, session: int, now: float) -> None:
        self._scheduler.end_session(session, now)

    def drain(self, now: float) -> None:
        self._scheduler.drain()

    def import_progressed(self, key: AttemptKey, now: float) -> None:
        self._scheduler.import_progressed(key, now)

    def imported(self, key: AttemptKey, first_tokens: Sequence[FirstToken], now: float) -> None:
        self._scheduler.imported(key, first_tokens, now)

    def confirmed(self, key: AttemptKey, spans: list[Span], num_bytes: int, now: float) -> None:
        self._scheduler.confirmed(key, now)
        session = self._sessions.get(key)
        if session is not None:
            self._routers.send_phase(session, key, spans, num_bytes, self._transport)

    def lost(self, key: AttemptKey, reason: str, now: float) -> None:
        self._scheduler.lost(key, reason, now)

    def import_ended(self, key: AttemptKey, now: float) -> None:
        self._scheduler.import_ended(key)

    def tick(self, now: float) -> None:
        self._scheduler.expire(now)
        self._emit(self._scheduler.take_output())

    def plan(self, now: float) -> StepPlan | None:
        plan = self._scheduler.plan(now)
        if plan is None:
            self._emit(self._scheduler.take_output())
        return plan

    def apply(self, result: StepResult, now: float) -> None:
        self._emit(self._scheduler.apply(result, now))

    def load(self) -> LoadReport:
        return self._scheduler.load()

    @property
    def is_idle(self) -> bool:
        return self._scheduler.is_idle

    def check_integrity(self) -> None:
        self._scheduler.check_integrity()

    def _emit(self, step: DecodeStep) -> None:
        """Send what may leave the worker, in the order in which the router needs it."""
        for prefilled in step.prefilled:
            spans = prefill_spans(self._worker_id, prefilled.chunk_times, self._unix_offset_s)
            # Before the tokens: the router may end the request with the first one.
            self._routers.send_phase(prefilled.session, prefilled.key, spans, 0, "")
        for session, output in step.outputs.items():
            self._failpoints.hit("token")
            self._routers.send_output(session, output)
        for failure in step.failures:
            self._routers.send_failure(
                failure.session, failure.stream_ids, failure.reason, failure.message
            )
        for key in step.abandoned_imports:
            assert self.importer is not None
            self.importer.abandon(key)
        for ended in step.ended:
            self._sessions.pop(ended.key, None)
            if ended.running_s is None:
                continue
            span = Span(
                "decode",
                self._worker_id,
                ended.running_s + self._unix_offset_s,
                ended.ended_s + self._unix_offset_s,
                ended.num_output_tokens,
            )
            self._routers.send_phase(ended.session, ended.key, [span], 0, "")
