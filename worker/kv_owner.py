"""The owner's end of KV sessions: tell readers what they may read, judge their confirmations.

The engine thread grants and publishes leases; this end, on the io loop, forwards what has grown to
the one reader of each lease and answers confirmations at once, in the middle of a step if need be.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

import grpc

from paceline.errors import TransferError
from paceline.failpoints import Failpoints
from paceline.internal.v1 import kv_pb2, kv_pb2_grpc
from paceline.kv_transfer.lease import Lease, LeaseState, LeaseTable
from paceline.kv_transfer.transport import OwnerPeer, Transport
from paceline.request import AttemptKey
from paceline.wire import pack_uint32
from paceline.worker.first_token import first_token_to_proto
from paceline.worker.hello import HELLO_TIMEOUT_S, first_message
from paceline.worker.identity import WorkerIdentity
from paceline.worker.mailbox import Mailbox
from paceline.worker.outgoing import Outgoing

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
"""Of a message that says nothing; several must fit into kv.silence_limit_s."""
MAX_READERS = 1024
"""Sessions at a time; a deployment has one for each decode worker."""
MAX_SUBSCRIPTIONS = 65_536
"""Of one reader: many times the sequences that a decode worker holds."""

OwnerStream = Outgoing[kv_pb2.ReadLeasesResponse]


class _Subscription:
    """How much of a lease its reader has been told."""

    def __init__(self) -> None:
        self.num_blocks_sent = 0
        self.num_tokens_sent = 0


class _ReaderSession:
    """One reader's stream. Io loop only."""

    def __init__(self, reader: str, stream: OwnerStream) -> None:
        self.reader = reader
        self.stream = stream
        self.subscriptions: dict[AttemptKey, _Subscription] = {}
        """To leases that may still grow, or that are not granted yet."""
        self.unconfirmed: dict[int, AttemptKey] = {}
        """Leases that are complete, by id; bounded by the leases that live."""


class KvOwner(kv_pb2_grpc.KvServiceServicer):
    """Implements `KvService`. Made on the io loop; `notify_changed` is for the engine thread."""

    def __init__(
        self,
        identity: WorkerIdentity,
        leases: LeaseTable,
        transport: Transport,
        mailbox: Mailbox,
        on_reader_lost: Callable[[str, float], None],
        on_released: Callable[[str, AttemptKey, float], None],
        failpoints: Failpoints,
    ) -> None:
        self._identity = identity
        self._leases = leases
        self._transport = transport
        self._mailbox = mailbox
        self._on_reader_lost = on_reader_lost
        self._on_released = on_released
        self._failpoints = failpoints
        self._loop = asyncio.get_running_loop()
        self._sessions: dict[str, _ReaderSession] = {}

    def notify_changed(self, lease: Lease) -> None:
        """Forward what has grown, or that the lease is over. Any thread."""
        self._loop.call_soon_threadsafe(self._forward_to_reader, lease)

    async def ReadLeases(
        self,
        request_iterator: AsyncIterator[kv_pb2.ReadLeasesRequest],
        context: grpc.aio.ServicerContext[kv_pb2.ReadLeasesRequest, kv_pb2.ReadLeasesResponse],
    ) -> AsyncIterator[kv_pb2.ReadLeasesResponse]:
        hello = await first_message(request_iterator)
        if hello is None or not hello.HasField("hello"):
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"the first message of a KV session must be hello, within {HELLO_TIMEOUT_S} s",
            )
            return
        if refusal := self._refusal(hello.hello):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
            return
        reader = f"{hello.hello.worker_id}.{hello.hello.incarnation}"
        if reader not in self._sessions and len(self._sessions) >= MAX_READERS:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._identity.name} has {MAX_READERS} readers, and takes no more",
            )
            return
        stream: OwnerStream = Outgoing(kv_pb2.ReadLeasesResponse(), HEARTBEAT_S)
        session = _ReaderSession(reader, stream)
        self._begin(session)
        peer = self._transport.accept(reader, _StreamChannel(stream), self._leases.is_readable)
        stream.send(
            kv_pb2.ReadLeasesResponse(
                welcome=kv_pb2.OwnerWelcome(
                    worker_id=self._identity.worker_id,
                    incarnation=self._identity.incarnation,
                    transport_endpoint=self._transport.endpoint(),
                )
            )
        )
        receiving = asyncio.create_task(self._receive(session, peer, request_iterator))
        try:
            async for response in stream:
                yield response
        finally:
            receiving.cancel()
            stream.close()
            peer.close()
            self._end(session)

    def _begin(self, session: _ReaderSession) -> None:
        """Register a session; one of the same reader that we have not seen end is over.

        The reader has given up what it read over that one, and nothing else: leases that were
        granted meanwhile are for the new session.
        """
        old = self._sessions.get(session.reader)
        self._sessions[session.reader] = session
        if old is not None:
            old.stream.close()
            for key in (*old.subscriptions, *old.unconfirmed.values()):
                self._release(session.reader, key)

    def _end(self, session: _ReaderSession) -> None:
        if self._sessions.get(session.reader) is session:
            del self._sessions[session.reader]
            self._mailbox.post(lambda now: self._on_reader_lost(session.reader, now))

    def _release(self, reader: str, key: AttemptKey) -> None:
        self._mailbox.post(lambda now: self._on_released(reader, key, now))

    def _refusal(self, hello: kv_pb2.ReaderHello) -> str:
        if hello.owner_incarnation != self._identity.incarnation:
            return f"this is {self._identity.name}, not incarnation {hello.owner_incarnation}"
        if hello.layout_fingerprint != self._identity.layout_fingerprint:
            return (
                f"{hello.worker_id} cannot read the KV of {self._identity.name}: its layout is "
                f"{hello.layout_description}, here it is {self._identity.layout_description}; both "
                "workers need the same model, kv.block_tokens and model.dtype"
            )
        if hello.transport != self._transport.name:
            return (
                f"{hello.worker_id} reads over {hello.transport}, {self._identity.name} serves "
                f"{self._transport.name}; set kv.transport the same for both"
            )
        return ""

    async def _receive(
        self,
        session: _ReaderSession,
        peer: OwnerPeer,
        requests: AsyncIterator[kv_pb2.ReadLeasesRequest],
    ) -> None:
        try:
            async for request in requests:
                if self._mailbox.is_full:
                    raise TransferError("the engine has too many calls waiting")
                self._take(session, peer, request)
        except TransferError as error:
            logger.warning("event=kv_session_ended reader=%s reason=%s", session.reader, error)
        finally:
            session.stream.close()

    def _take(
        self, session: _ReaderSession, peer: OwnerPeer, request: kv_pb2.ReadLeasesRequest
    ) -> None:
        now = time.monotonic()
        kind = request.WhichOneof("message")
        if kind == "subscribe":
            key = AttemptKey(request.subscribe.request_id, request.subscribe.attempt)
            if len(session.subscriptions) >= MAX_SUBSCRIPTIONS:
                raise TransferError(
                    f"{session.reader} has subscribed to {MAX_SUBSCRIPTIONS} attempts that are not "
                    "complete; its session ends"
                )
            session.subscriptions[key] = _Subscription()
            lease = self._leases.find(key)
            if lease is not None:
                self._leases.renew(session.reader, now, (lease.lease_id,))
                self._forward(session, lease)
        elif kind == "heartbeat":
            self._leases.renew(session.reader, now, request.heartbeat.lease_ids)
        elif kind == "confirm":
            self._failpoints.hit("confirm_received")
            lease_id = request.confirm.lease_id
            held = self._leases.confirm(lease_id, session.reader, now)
            session.unconfirmed.pop(lease_id, None)
            verdict = kv_pb2.Verdict(lease_id=lease_id, held=held)
            session.stream.send(kv_pb2.ReadLeasesResponse(verdict=verdict))
            if held:
                # The engine thread drops the pins.
                self._mailbox.wake()
        elif kind == "release":
            key = AttemptKey(request.release.request_id, request.release.attempt)
            session.subscriptions.pop(key, None)
            if (lease := self._leases.find(key)) is not None:
                session.unconfirmed.pop(lease.lease_id, None)
            self._release(session.reader, key)
        elif kind == "transport":
            peer.on_message(request.transport.payload)

    def _forward_to_reader(self, lease: Lease) -> None:
        session = self._sessions.get(lease.reader)
        if session is not None:
            self._forward(session, lease)

    def _forward(self, session: _ReaderSession, lease: Lease) -> None:
        """Send what the reader has not been told of its lease."""
        if lease.state is LeaseState.REVOKED:
            session.unconfirmed.pop(lease.lease_id, None)
        told = session.subscriptions.get(lease.key)
        if told is None or lease.reader != session.reader:
            return
        update = lease.update_since(told.num_blocks_sent)
        if lease.state is LeaseState.REVOKED:
            del session.subscriptions[lease.key]
            revoked = kv_pb2.Revoked(
                request_id=lease.key.request_id, attempt=lease.key.attempt, reason=lease.reason
            )
            session.stream.send(kv_pb2.ReadLeasesResponse(revoked=revoked))
            return
        if update is None:  # HELD: its reader has confirmed it, so it has been told everything
            del session.subscriptions[lease.key]
            return
        block_ids, progress = update
        complete = progress.is_complete
        if not block_ids and progress.num_tokens == told.num_tokens_sent and not complete:
            return
        message = kv_pb2.LeaseUpdate(
            request_id=lease.key.request_id,
            attempt=lease.key.attempt,
            lease_id=lease.lease_id,
            block_ids=pack_uint32(block_ids),
            num_tokens=progress.num_tokens,
            first_tokens=map(first_token_to_proto, progress.first_tokens or ()),
        )
        told.num_blocks_sent += len(block_ids)
        told.num_tokens_sent = progress.num_tokens
        session.stream.send(kv_pb2.ReadLeasesResponse(update=message))
        if complete:
            # Nothing can be added, and from here on the confirmation decides.
            del session.subscriptions[lease.key]
            if lease.state is LeaseState.ALIVE:
                session.unconfirmed[lease.lease_id] = lease.key


class _StreamChannel:
    """The transport's messages inside the session's stream."""

    def __init__(self, stream: OwnerStream) -> None:
        self._stream = stream

    def send(self, payload: bytes) -> None:
        message = kv_pb2.TransportMessage(payload=payload)
        self._stream.send(kv_pb2.ReadLeasesResponse(transport=message))
