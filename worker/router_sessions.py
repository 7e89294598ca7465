"""Sessions with routers: the engine thread's way to answer, and what each router was told."""

import time
from collections.abc import Iterable

from paceline.internal.v1 import worker_pb2 as wire_messages
from paceline.request import AttemptKey, FailureReason, Span
from paceline.wire import failure_reason_to_proto, pack_uint32, span_to_proto, top_logprobs_to_proto
from paceline.worker.core import Core, LoadReport
from paceline.worker.credit import Claim, Offers, Room, offer
from paceline.worker.outgoing import Outgoing
from paceline.worker.step_output import StepOutput

SessionStream = Outgoing[wire_messages.SessionResponse]


class _Session:
    """One router's stream, as the engine thread sees it."""

    def __init__(self, stream: SessionStream) -> None:
        self.stream = stream
        self.num_dispatches_seen = 0
        self.output: StepOutput | None = None
        self.reported: tuple[LoadReport, int] | None = None
        """The load that the router was told last, and the dispatches counted in it."""


class RouterSessions:
    """All sessions with routers; implements `RouterPort`. Engine thread only."""

    def __init__(self) -> None:
        self._sessions: dict[int, _Session] = {}
        self._claims: dict[int, Claim] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, session: int, stream: SessionStream) -> None:
        self._sessions[session] = _Session(stream)

    def close(self, session: int) -> None:
        self._sessions.pop(session, None)
        self._claims.pop(session, None)

    def claim(
        self,
        session: int,
        num_blocks: int,
        num_sequences: int,
        waited_s: float,
        holds: bool,
        now: float,
    ) -> None:
        """Take what a router's next work needs here; no sequences: nothing waits any more."""
        if num_sequences and session in self._sessions:
            self._claims[session] = Claim(num_blocks, num_sequences, now - waited_s, holds, now)
        else:
            self._claims.pop(session, None)

    def count_dispatch(self, session: int) -> None:
        """Count a dispatch of this router as seen, so that its next load includes it.

        The work was what the router's claim stood for, so that ends.
        """
        self._claims.pop(session, None)
        if session in self._sessions:
            self._sessions[session].num_dispatches_seen += 1

    def send_admission(
        self, session: int, key: AttemptKey, *, admitted: bool, message: str, cached_tokens: int
    ) -> None:
        admission = wire_messages.Admission(
            request_id=key.request_id,
            attempt=key.attempt,
            admitted=admitted,
            message=message,
            cached_tokens=cached_tokens,
        )
        self._send(session, wire_messages.SessionResponse(admission=admission))

    def send_output(self, session: int, output: StepOutput) -> None:
        """Keep the output for the message that `report` sends at the end of the round."""
        if session in self._sessions:
            held = self._sessions[session]
            self._flush_output(held)
            held.output = output

    def send_failure(
        self, session: int, stream_ids: tuple[int, ...], reason: FailureReason, message: str
    ) -> None:
        failure = wire_messages.Failure(
            stream_ids=stream_ids,
            reason=failure_reason_to_proto(reason),
            message=message,
        )
        self._send(session, wire_messages.SessionResponse(failure=failure))

    def send_phase(
        self, session: int, key: AttemptKey, spans: list[Span], kv_bytes: int, transport: str
    ) -> None:
        phase = wire_messages.PhaseReport(
            request_id=key.request_id,
            attempt=key.attempt,
            spans=[span_to_proto(span) for span in spans],
            kv_bytes=kv_bytes,
            transport=transport,
        )
        self._send(session, wire_messages.SessionResponse(phase=phase))

    def report(self, core: Core, now: float) -> None:
        """Send every router its new tokens and, when it changed, the load."""
        whole = core.load()
        offers = self._offers(whole, now)
        for number, session in self._sessions.items():
            room = offers.claimed.get(number, offers.rest)
            load = whole._replace(
                credit_blocks=room.num_blocks, credit_sequences=room.num_sequences
            )
            news = (load, session.num_dispatches_seen) != session.reported
            if session.output is not None or news:
                self._report(session, load)

    def first_load(self, core: Core, now: float) -> LoadReport:
        """Say what a router that has just connected may send."""
        load = core.load()
        room = self._offers(load, now).rest
        return load._replace(credit_blocks=room.num_blocks, credit_sequences=room.num_sequences)

    def _offers(self, load: LoadReport, now: float) -> Offers:
        return offer(Room(load.credit_blocks, load.credit_sequences), self._claims, now)

    def _report(self, session: _Session, load: LoadReport | None) -> None:
        step = step_report(session.output or StepOutput())
        step.made_s = time.monotonic()
        if load is not None:
            step.load.CopyFrom(load_message(load, session.num_dispatches_seen))
            session.reported = (load, session.num_dispatches_seen)
        session.output = None
        session.stream.send(wire_messages.SessionResponse(step=step))

    def _send(self, session: int, message: wire_messages.SessionResponse) -> None:
        # A session that has ended meanwhile: its router has forgotten the attempt.
        if session in self._sessions:
            held = self._sessions[session]
            self._flush_output(held)
            held.stream.send(message)

    def _flush_output(self, session: _Session) -> None:
        """Keep the order: tokens come before what is said about their attempt afterwards.

        Without the load, which is known at the end of the round only.
        """
        if session.output is not None:
            self._report(session, None)


def step_report(output: StepOutput) -> wire_messages.StepReport:
    """Put a step's output into its message."""
    return wire_messages.StepReport(
        stream_ids=pack_uint32(output.stream_ids),
        indices=pack_uint32(output.indices),
        token_ids=pack_uint32(output.token_ids),
        finished_stream_ids=pack_uint32(output.finished_stream_ids),
        finish_reasons=output.finish_reasons.tobytes(),
        logprobs=list(_logprobs(output)) if output.logprobs else None,
    )


def _logprobs(output: StepOutput) -> Iterable[wire_messages.TokenLogprobs]:
    for position, logprobs in output.logprobs.items():
        yield wire_messages.TokenLogprobs(
            position=position,
            logprob=logprobs.logprob,
            top=top_logprobs_to_proto(logprobs),
        )


def load_message(load: LoadReport, num_dispatches_seen: int) -> wire_messages.Load:
    return wire_messages.Load(
        credit_blocks=load.credit_blocks,
        credit_sequences=load.credit_sequences,
        num_dispatches_seen=num_dispatches_seen,
        num_running=load.num_running,
        num_pending_tokens=load.num_pending_tokens,
        num_free_blocks=load.num_free_blocks,
        draining=load.draining,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
    )
