"""The router's stream to one worker: gRPC in, dispatcher events out, and reconnection.

One link lives as long as membership names its worker. A broken or silent stream means that the
worker is lost, at once; a stream that comes back counts as a worker that joined, without the work
it had.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

import grpc

from paceline.errors import InvalidRequestError, UnavailableError
from paceline.grpc_options import INTERNAL_CHANNEL
from paceline.internal.v1 import worker_pb2, worker_pb2_grpc
from paceline.request import AttemptKey, FinishReason
from paceline.router.capacity import WorkerPool
from paceline.router.dispatch import Dispatcher
from paceline.router.journal import Logprobs
from paceline.router.lag import LoopLag, MessageDelay
from paceline.router.settings import RouterSettings
from paceline.router.worker_messages import TokenColumns
from paceline.router.worker_view import WorkerLoad, WorkerMember, WorkerView
from paceline.silence import Company, Patience, Silence, wait_for_silence
from paceline.wire import (
    failure_reason_from_proto,
    span_from_proto,
    step_columns_from_proto,
)

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.05
_FINISH_REASONS = {reason.value: reason for reason in FinishReason}

Session: TypeAlias = (
    "grpc.aio.StreamStreamCall[worker_pb2.SessionRequest, worker_pb2.SessionResponse]"
)


class WorkerLink:
    """Keep one worker connected to the dispatcher."""

    def __init__(
        self,
        member: WorkerMember,
        *,
        router_id: str,
        router_incarnation: int,
        settings: RouterSettings,
        dispatcher: Dispatcher,
        company: Company,
        lag: LoopLag,
        clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self.member = member
        self.last_error: str | None = None
        """Why the worker is not connected now."""
        self._hello = worker_pb2.SessionRequest(
            hello=worker_pb2.Hello(
                router_id=router_id,
                router_incarnation=router_incarnation,
                worker_incarnation=member.incarnation,
            )
        )
        self._settings = settings
        self._dispatcher = dispatcher
        self._company = company
        self._lag = lag
        self._delay = MessageDelay()
        self._patience = Patience(settings.worker_silence_limit_s)
        self._clock = clock
        self._on_change = on_change
        # Dispatches are bounded by the worker's credit, and cancels by dispatches.
        self._outgoing: deque[worker_pb2.SessionRequest] = deque()
        self._has_outgoing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_stopping = False

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"link to {self.member.worker_id}")

    async def stop(self) -> None:
        """Close the stream; the worker cancels what came over it, and counts as lost here, but not
        as dead."""
        self._is_stopping = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def send(self, message: worker_pb2.SessionRequest) -> None:
        """Send when the event loop is free; messages keep their order."""
        self._outgoing.append(message)
        self._has_outgoing.set()

    async def _run(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            started_s = self._clock()
            try:
                await self._connect_and_serve()
            except (grpc.aio.AioRpcError, UnavailableError, InvalidRequestError) as error:
                self.last_error = _describe(error)
            except Exception as error:
                # A bug, here or in the worker. The stream has ended and its work goes elsewhere.
                self.last_error = f"{type(error).__name__}: {error}"
                logger.exception("worker_link_failed worker_id=%s", self.member.worker_id)
            logger.info(
                "worker_disconnected worker_id=%s incarnation=%d address=%s reason=%r",
                self.member.worker_id,
                self.member.incarnation,
                self.member.address,
                self.last_error,
            )
            if self._clock() - started_s > self._settings.max_reconnect_backoff_s:
                backoff_s = _FIRST_BACKOFF_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, self._settings.max_reconnect_backoff_s)

    async def _connect_and_serve(self) -> None:
        async with grpc.aio.insecure_channel(
            self.member.address, options=INTERNAL_CHANNEL
        ) as channel:
            session = worker_pb2_grpc.WorkerServiceStub(channel).Session()
            try:
                welcome = await self._greet(session)
                await self._serve(session, welcome)
            finally:
                session.cancel()

    async def _greet(self, session: Session) -> worker_pb2.Welcome:
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                await session.write(self._hello)
                answer = await session.read()
        except TimeoutError as error:
            raise UnavailableError(
                f"no Welcome within router.connect_timeout_s, {self._settings.connect_timeout_s} s"
            ) from error
        if not isinstance(answer, worker_pb2.SessionResponse):
            raise UnavailableError("the stream ended before Welcome")
        if answer.WhichOneof("message") != "welcome":
            raise UnavailableError(
                f"the first message is {answer.WhichOneof('message')}, not Welcome"
            )
        welcome = answer.welcome
        if (welcome.worker_id, welcome.incarnation) != (
            self.member.worker_id,
            self.member.incarnation,
        ):
            raise UnavailableError(
                f"{self.member.address} is {welcome.worker_id} of incarnation "
                f"{welcome.incarnation}, "
                f"but {self.member.worker_id} of incarnation {self.member.incarnation} was meant"
            )
        if not welcome.max_num_seqs:
            raise UnavailableError("Welcome lacks max_num_seqs: the worker is of another version")
        return welcome

    async def _serve(self, session: Session, welcome: worker_pb2.Welcome) -> None:
        worker_id = self.member.worker_id
        pool = WorkerPool(
            welcome.num_blocks,
            welcome.block_tokens,
            welcome.max_num_seqs,
            welcome.local_prefill_tokens,
        )
        self._outgoing.clear()
        self.last_error = None
        self._patience.answered(self._clock())
        self._company.num_peers += 1
        writer = asyncio.create_task(self._write(session), name=f"writer to {worker_id}")
        try:
            logger.info(
                "worker_connected worker_id=%s incarnation=%d role=%s num_blocks=%d",
                worker_id,
                self.member.incarnation,
                self.member.role.value,
                pool.num_blocks,
            )
            view = WorkerView(self.member, pool, _load(welcome.load))
            self._dispatcher.worker_joined(view, self._clock())
            self._on_change()
            await self._read(session)
        finally:
            self._company.num_peers -= 1
            writer.cancel()
            self._dispatcher.worker_lost(worker_id, self._clock(), is_planned=self._is_stopping)
            self._on_change()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, session: Session) -> None:
        # When a write fails the stream has ended, and the reader says why.
        while True:
            await self._has_outgoing.wait()
            self._has_outgoing.clear()
            while self._outgoing:
                await session.write(self._outgoing.popleft())

    async def _read(self, session: Session) -> None:
        limit_s = self._patience.limit_s(self._clock())
        silence = Silence(limit_s, asyncio.get_running_loop().time(), self._company)
        watching: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(None) as deadline:
                watching = asyncio.create_task(_end_when_silent(silence, deadline))
                while isinstance(answer := await session.read(), worker_pb2.SessionResponse):
                    silence.heard()
                    self._take(answer)
        except TimeoutError as error:
            self._patience.alarm(self._clock())
            raise UnavailableError(
                f"no message for {limit_s:g} s (router.worker_silence_limit_s is "
                f"{self._settings.worker_silence_limit_s:g})"
            ) from error
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
        code, details = await session.code(), await session.details()
        raise UnavailableError(f"the worker ended the stream: {code.name} {details}".rstrip())

    def _take(self, answer: worker_pb2.SessionResponse) -> None:
        kind = answer.WhichOneof("message")
        worker_id, now, dispatcher = self.member.worker_id, self._clock(), self._dispatcher
        if kind == "step":
            step = answer.step
            lag_s = self._lag_s(step, now)
            if step.stream_ids or step.finished_stream_ids:
                dispatcher.tokens(worker_id, _columns(step, lag_s), now)
            if step.HasField("load"):
                load = _load(step.load)
                was_draining = self._is_draining()
                dispatcher.load_changed(worker_id, load, now)
                if load.draining != was_draining:
                    self._on_change()
        elif kind == "admission":
            admission = answer.admission
            key = AttemptKey(admission.request_id, admission.attempt)
            refusal = None if admission.admitted else admission.message
            dispatcher.admission(worker_id, key, refusal, admission.cached_tokens, now)
        elif kind == "failure":
            failure = answer.failure
            reason = failure_reason_from_proto(failure.reason)
            dispatcher.failure(worker_id, list(failure.stream_ids), reason, failure.message, now)
        elif kind == "phase":
            phase = answer.phase
            key = AttemptKey(phase.request_id, phase.attempt)
            dispatcher.phase(key, [span_from_proto(span) for span in phase.spans])
        else:
            logger.warning(
                "worker_message_unknown worker_id=%s kind=%s: is it of another version?",
                worker_id,
                kind,
            )
        if kind in ("admission", "failure"):
            self._on_change()

    def _lag_s(self, step: worker_pb2.StepReport, now: float) -> float:
        """Return how long the message has waited for this router."""
        if not step.HasField("made_s"):  # a heartbeat
            return 0.0
        return self._lag.message(self._delay.of(step.made_s, now), now)

    def _is_draining(self) -> bool:
        view = self._dispatcher.placement.workers.get(self.member.worker_id)
        return view is not None and view.load.draining


async def _end_when_silent(silence: Silence, deadline: asyncio.Timeout) -> None:
    await wait_for_silence(silence)
    deadline.reschedule(asyncio.get_running_loop().time())


def _columns(step: worker_pb2.StepReport, lag_s: float) -> TokenColumns:
    columns = step_columns_from_proto(step)
    finished: Sequence[tuple[int, FinishReason]] = ()
    if len(columns.finished_stream_ids):
        reasons = [_FINISH_REASONS[value] for value in columns.finish_reasons.tolist()]
        finished = list(zip(columns.finished_stream_ids.tolist(), reasons, strict=True))
    logprobs = None
    if step.logprobs:
        logprobs = {
            entry.position: Logprobs(
                entry.logprob, tuple((top.token_id, top.logprob) for top in entry.top)
            )
            for entry in step.logprobs
        }
    return TokenColumns(
        columns.stream_ids.tolist(),
        columns.indices.tolist(),
        columns.token_ids.tolist(),
        finished,
        logprobs,
        lag_s,
    )


def _load(load: worker_pb2.Load) -> WorkerLoad:
    return WorkerLoad(
        load.credit_blocks,
        load.credit_sequences,
        load.num_dispatches_seen,
        load.num_running,
        load.num_pending_tokens,
        load.num_free_blocks,
        load.draining,
        load.prefill_tokens_per_s,
    )


def _describe(error: Exception) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
