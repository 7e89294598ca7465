"""The worker's end of the routers' streams: translate messages into calls of the engine thread."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable

import grpc

from paceline.errors import FieldViolation, InvalidRequestError, PacelineError
from paceline.failpoints import Failpoints
from paceline.internal.v1 import worker_pb2 as wire_messages
from paceline.internal.v1 import worker_pb2_grpc
from paceline.request import AttemptKey
from paceline.sampling_params import MAX_CHOICES
from paceline.wire import MAX_NAME_CHARS, WorkLimits, work_from_proto
from paceline.worker.core import Core, Peer
from paceline.worker.hello import HELLO_TIMEOUT_S, first_message
from paceline.worker.identity import WorkerIdentity
from paceline.worker.mailbox import Mailbox
from paceline.worker.outgoing import Outgoing
from paceline.worker.router_sessions import RouterSessions, SessionStream, load_message

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
"""Several must fit into router.worker_silence_limit_s."""
_HEARTBEAT = wire_messages.SessionResponse(step=wire_messages.StepReport())


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Implements `WorkerService`. Lives on the io loop; the core is only touched through the
    mailbox.
    """

    def __init__(
        self,
        identity: WorkerIdentity,
        core: Core,
        sessions: RouterSessions,
        mailbox: Mailbox,
        failpoints: Failpoints,
        limits: WorkLimits,
        stalled_s: Callable[[], float],
    ) -> None:
        """stalled_s: since when the engine has done nothing though it should have; 0: all is well.
        Sessions end then, so that routers take the work elsewhere.
        """
        self._identity = identity
        self._core = core
        self._sessions = sessions
        self._mailbox = mailbox
        self._failpoints = failpoints
        self._limits = limits
        self._stalled_s = stalled_s
        self._stall_s = 0.0
        """How long the engine has been stalled, by two looks in a row; 0: all is well."""
        self._numbers = itertools.count()
        self._streams: set[SessionStream] = set()

    async def Session(
        self,
        request_iterator: AsyncIterator[wire_messages.SessionRequest],
        context: grpc.aio.ServicerContext[
            wire_messages.SessionRequest, wire_messages.SessionResponse
        ],
    ) -> AsyncIterator[wire_messages.SessionResponse]:
        hello = await first_message(request_iterator)
        if hello is None or not hello.HasField("hello"):
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"the first message of a session must be hello, within {HELLO_TIMEOUT_S} s",
            )
            return
        if hello.hello.worker_incarnation != self._identity.incarnation:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this is {self._identity.name}, not incarnation {hello.hello.worker_incarnation}",
            )
            return
        if self._stall_s:
            await self._refuse_stalled(context)
            return
        number = next(self._numbers)
        stream: SessionStream = Outgoing(_HEARTBEAT, HEARTBEAT_S)
        self._streams.add(stream)
        self._mailbox.post(lambda now: self._open(number, stream, now))
        receiving = asyncio.create_task(self._receive(number, request_iterator, stream))
        try:
            async for response in stream:
                yield response
            if self._stall_s:
                await self._refuse_stalled(context)
        finally:
            receiving.cancel()
            stream.close()
            self._streams.discard(stream)
            self._mailbox.post(lambda now: self._end(number, now))

    async def watch_engine(self) -> None:
        """End all sessions when the engine stalls; runs until it is cancelled."""
        last_s = 0.0
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            # Twice in a row: when the whole process stood still, its engine goes on meanwhile.
            seconds = self._stalled_s()
            self._stall_s = seconds if last_s else 0.0
            last_s = seconds
            if self._stall_s and self._streams:
                logger.warning(
                    "event=engine_stalled worker_id=%s seconds=%.1f num_sessions=%d",
                    self._identity.name,
                    seconds,
                    len(self._streams),
                )
                for stream in self._streams:
                    stream.close()

    async def _refuse_stalled(
        self,
        context: grpc.aio.ServicerContext[
            wire_messages.SessionRequest, wire_messages.SessionResponse
        ],
    ) -> None:
        await context.abort(
            grpc.StatusCode.UNAVAILABLE,
            f"the engine of {self._identity.name} has finished no step for {self._stall_s:.1f} s, "
            "far longer than its steps take",
        )

    def _open(self, number: int, stream: SessionStream, now: float) -> None:
        self._sessions.open(number, stream)
        load = self._sessions.first_load(self._core, now)
        welcome = wire_messages.Welcome(
            worker_id=self._identity.worker_id,
            incarnation=self._identity.incarnation,
            num_blocks=self._identity.num_blocks,
            block_tokens=self._identity.block_tokens,
            local_prefill_tokens=self._identity.local_prefill_tokens,
            max_num_seqs=self._identity.max_num_seqs,
            load=load_message(load, 0),
        )
        stream.send(wire_messages.SessionResponse(welcome=welcome))

    def _end(self, number: int, now: float) -> None:
        self._sessions.close(number)
        self._core.end_session(number, now)

    async def _receive(
        self,
        number: int,
        requests: AsyncIterator[wire_messages.SessionRequest],
        stream: SessionStream,
    ) -> None:
        try:
            async for request in requests:
                if self._mailbox.is_full:
                    logger.warning("event=session_ended session=%d reason=mailbox_full", number)
                    return
                self._take(number, request, stream)
        finally:
            stream.close()

    def _take(
        self, number: int, request: wire_messages.SessionRequest, stream: SessionStream
    ) -> None:
        kind = request.WhichOneof("message")
        if kind == "prefill":
            self._dispatch(number, request.prefill.work, request.prefill.reader, stream)
        elif kind == "admit":
            source = request.admit.source if request.admit.HasField("source") else None
            self._dispatch(number, request.admit.work, source, stream)
        elif kind == "claim":
            claim = request.claim
            self._mailbox.post(
                lambda now: self._sessions.claim(
                    number,
                    claim.num_blocks,
                    claim.num_sequences,
                    claim.waited_ms / 1000,
                    claim.holds,
                    now,
                )
            )
        elif kind == "cancel":
            key = AttemptKey(request.cancel.request_id, request.cancel.attempt)
            # No work has more choices than this, so what follows names none.
            choices = tuple(request.cancel.choices[:MAX_CHOICES])
            self._mailbox.post(lambda now: self._core.cancel(number, key, choices, now))

    def _dispatch(
        self,
        number: int,
        message: wire_messages.Work,
        address: wire_messages.WorkerAddress | None,
        stream: SessionStream,
    ) -> None:
        try:
            peer = None if address is None else _peer(address)
            work = work_from_proto(message, self._limits)
        except PacelineError as error:
            # Refused alone: the session carries other requests.
            refusal = wire_messages.Admission(
                request_id=message.request_id[:MAX_NAME_CHARS],
                attempt=message.attempt,
                message=str(error),
            )
            stream.send(wire_messages.SessionResponse(admission=refusal))
            self._mailbox.post(lambda now: self._sessions.count_dispatch(number))
            return
        self._failpoints.hit("queued")

        def call(now: float) -> None:
            self._sessions.count_dispatch(number)
            self._core.dispatch(number, work, peer, now)

        self._mailbox.post(call)


def _peer(address: wire_messages.WorkerAddress) -> Peer:
    longest = max(len(address.worker_id), len(address.address))
    if longest > MAX_NAME_CHARS:
        raise InvalidRequestError(
            FieldViolation("worker", f"has a name of {longest} characters, over {MAX_NAME_CHARS}")
        )
    return Peer(address.worker_id, address.incarnation, address.address)
