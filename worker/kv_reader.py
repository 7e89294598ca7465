"""The reader's end of KV sessions: one link to each owner, shared by all imports from it. Io loop
only.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence

import grpc

from paceline.errors import PacelineError
from paceline.failpoints import Failpoints
from paceline.grpc_options import INTERNAL_CHANNEL
from paceline.internal.v1 import kv_pb2, kv_pb2_grpc
from paceline.kv_transfer.read_plan import ReadPlan
from paceline.kv_transfer.transport import Connection, ReadOutcome, Transport
from paceline.request import AttemptKey
from paceline.silence import Silence, wait_for_silence
from paceline.wire import unpack_uint32
from paceline.worker.core import Peer
from paceline.worker.first_token import first_token_from_proto
from paceline.worker.identity import WorkerIdentity
from paceline.worker.kv_import import ImportListener, ImportState, KvImport, LeaseNews, Read
from paceline.worker.outgoing import Outgoing

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.5
"""Long enough for a busy owner to answer, far shorter than what a request waits."""


class KvReader:
    """All imports of a worker. `begin` and `abandon` are for any thread."""

    def __init__(
        self,
        identity: WorkerIdentity,
        transport: Transport,
        listener: ImportListener,
        failpoints: Failpoints,
        *,
        heartbeat_s: float,
        silence_limit_s: float,
        verdict_timeout_s: float,
        vocab_size: int,
    ) -> None:
        self._identity = identity
        self._transport = transport
        self._listener = listener
        self._failpoints = failpoints
        self._heartbeat_s = heartbeat_s
        self._silence_limit_s = silence_limit_s
        self._verdict_timeout_s = verdict_timeout_s
        self._vocab_size = vocab_size
        self._loop = asyncio.get_running_loop()
        self._links: dict[str, OwnerLink] = {}
        self._owners: dict[AttemptKey, str] = {}

    def begin(
        self, key: AttemptKey, owner: Peer, num_tokens: int, targets: Sequence[int], num_cached: int
    ) -> None:
        """Import an attempt's KV from its owner into `targets`, one block for each of the context.

        The first `num_cached` blocks are there already. The listener hears how it goes.
        """
        plan = ReadPlan(
            block_tokens=self._identity.block_tokens,
            num_context_tokens=num_tokens,
            targets=list(targets),
            num_cached_blocks=num_cached,
        )
        started = KvImport(
            key,
            plan,
            self._listener,
            reader_id=self._identity.worker_id,
            block_tokens=self._identity.block_tokens,
        )
        self._loop.call_soon_threadsafe(self._begin, started, owner)

    def abandon(self, key: AttemptKey) -> None:
        """Stop an import; the listener hears `import_ended` when nothing writes any more."""
        self._loop.call_soon_threadsafe(self._abandon, key)

    async def close(self) -> None:
        for link in list(self._links.values()):
            await link.close("this worker is stopping")

    def drop_absent(self, live_names: Collection[str]) -> None:
        """Membership says which incarnations live: fail at once what was read from others."""
        for name, link in list(self._links.items()):
            if name not in live_names:
                link.fail(f"{name} left the deployment")

    def connect(self, owner: Peer) -> "OwnerLink":
        """Open the link to an owner, unless there is one."""
        link = self._links.get(owner.name)
        if link is None or link.is_closed:
            link = OwnerLink(
                owner,
                self._identity,
                self._transport,
                self._failpoints,
                heartbeat_s=self._heartbeat_s,
                silence_limit_s=self._silence_limit_s,
                verdict_timeout_s=self._verdict_timeout_s,
                vocab_size=self._vocab_size,
                on_closed=self._forget_link,
                on_quiet=self._forget_import,
            )
            self._links[owner.name] = link
        return link

    def _begin(self, started: KvImport, owner: Peer) -> None:
        self._owners[started.key] = owner.name
        self.connect(owner).add(started)

    def _abandon(self, key: AttemptKey) -> None:
        owner = self._owners.get(key)
        link = self._links.get(owner) if owner is not None else None
        if link is not None:
            link.abandon(key)

    def _forget_import(self, key: AttemptKey) -> None:
        self._owners.pop(key, None)

    def _forget_link(self, link: "OwnerLink") -> None:
        if self._links.get(link.owner.name) is link:
            del self._links[link.owner.name]


class OwnerLink:
    """The stream to one owner incarnation. When it breaks, all its unconfirmed imports are lost."""

    def __init__(
        self,
        owner: Peer,
        identity: WorkerIdentity,
        transport: Transport,
        failpoints: Failpoints,
        *,
        heartbeat_s: float,
        silence_limit_s: float,
        verdict_timeout_s: float,
        vocab_size: int,
        on_closed: Callable[["OwnerLink"], None],
        on_quiet: Callable[[AttemptKey], None],
    ) -> None:
        self.owner = owner
        self._identity = identity
        self._transport = transport
        self._failpoints = failpoints
        self._heartbeat_s = heartbeat_s
        self._silence_limit_s = silence_limit_s
        self._verdict_timeout_s = verdict_timeout_s
        self._vocab_size = vocab_size
        self._on_closed = on_closed
        self._on_quiet = on_quiet
        self._loop = asyncio.get_running_loop()
        self._outgoing: Outgoing[kv_pb2.ReadLeasesRequest] = Outgoing()
        self._connection: Connection | None = None
        self._imports: dict[AttemptKey, KvImport] = {}
        self._by_lease: dict[int, KvImport] = {}
        self.is_closed = False
        self._is_welcome = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def add(self, started: KvImport) -> None:
        self._imports[started.key] = started
        subscribe = kv_pb2.Subscribe(request_id=started.key.request_id, attempt=started.key.attempt)
        self._outgoing.send(kv_pb2.ReadLeasesRequest(subscribe=subscribe))

    def abandon(self, key: AttemptKey) -> None:
        if (found := self._imports.get(key)) is None:
            return
        if not found.has_ended:
            self._release(found)
        found.abandon()
        self._forget_if_quiet(found)

    def send_heartbeat(self) -> None:
        """Renew the leases of the imports that go on, and of no others."""
        wanted = (i.lease_id for i in self._imports.values() if not i.has_ended)
        heartbeat = kv_pb2.Heartbeat(lease_ids=[i for i in wanted if i is not None])
        self._outgoing.send(kv_pb2.ReadLeasesRequest(heartbeat=heartbeat))

    def fail(self, reason: str) -> None:
        """End the link: every import that is not confirmed is lost."""
        if self.is_closed:
            return
        self.is_closed = True
        logger.info("event=kv_link_closed owner=%s reason=%r", self.owner.name, reason)
        self._outgoing.close()
        self._task.cancel()
        for found in list(self._imports.values()):
            found.lose(f"{self.owner.name}: {reason}")
        if self._connection is not None:
            # Ends running reads first, so that every import hears `import_ended`.
            self._connection.close()
        for found in list(self._imports.values()):
            self._forget_if_quiet(found)
        self._on_closed(self)

    async def close(self, reason: str) -> None:
        self.fail(reason)
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        reason = "the session's task failed; the log has the cause"
        try:
            async with grpc.aio.insecure_channel(
                self.owner.address, options=INTERNAL_CHANNEL
            ) as channel:
                async with asyncio.timeout(CONNECT_TIMEOUT_S) as until_welcome:
                    await channel.channel_ready()
                    await self._converse(kv_pb2_grpc.KvServiceStub(channel), until_welcome)
            reason = "the owner ended the session"
        except TimeoutError:
            reason = f"no answer from {self.owner.address} within {CONNECT_TIMEOUT_S} s"
        except grpc.aio.AioRpcError as error:
            reason = f"the session broke: {error.code().name} {error.details()}"
        except PacelineError as error:
            reason = str(error)
        finally:
            self._loop.call_soon(self.fail, reason)

    async def _converse(
        self, stub: "kv_pb2_grpc.KvServiceAsyncStub", until_welcome: asyncio.Timeout
    ) -> None:
        silence = Silence(self._silence_limit_s, self._loop.time())
        tasks: list[asyncio.Task[None]] = [asyncio.create_task(self._send_heartbeats())]
        try:
            async for response in stub.ReadLeases(self._requests()):
                if not self._is_welcome.is_set():
                    until_welcome.reschedule(None)
                    tasks.append(asyncio.create_task(self._end_when_silent(silence)))
                silence.heard()
                self._take(response)
        finally:
            for task in tasks:
                task.cancel()

    async def _requests(self) -> AsyncIterator[kv_pb2.ReadLeasesRequest]:
        hello = kv_pb2.ReaderHello(
            worker_id=self._identity.worker_id,
            incarnation=self._identity.incarnation,
            owner_incarnation=self.owner.incarnation,
            layout_fingerprint=self._identity.layout_fingerprint,
            layout_description=self._identity.layout_description,
            transport=self._transport.name,
        )
        yield kv_pb2.ReadLeasesRequest(hello=hello)
        # A message that met a refusal on its way would hide the reason: gRPC then says INTERNAL.
        await self._is_welcome.wait()
        async for request in self._outgoing:
            yield request

    async def _end_when_silent(self, silence: Silence) -> None:
        await wait_for_silence(silence)
        self.fail(f"no message for kv.silence_limit_s, {self._silence_limit_s:g} s")

    async def _send_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_s)
            self.send_heartbeat()

    def _take(self, response: kv_pb2.ReadLeasesResponse) -> None:
        kind = response.WhichOneof("message")
        if kind == "welcome":
            self._connection = self._transport.connect(
                self.owner.name,
                self.owner.incarnation,
                response.welcome.transport_endpoint,
                _StreamChannel(self._outgoing),
            )
            self._is_welcome.set()
        elif kind == "update":
            self._take_update(response.update)
        elif kind == "verdict":
            if (found := self._by_lease.get(response.verdict.lease_id)) is not None:
                found.take_verdict(response.verdict.held)
                self._forget_if_quiet(found)
        elif kind == "revoked":
            key = AttemptKey(response.revoked.request_id, response.revoked.attempt)
            if (found := self._imports.get(key)) is not None:
                found.lose(response.revoked.reason)
                self._forget_if_quiet(found)
        elif kind == "transport" and self._connection is not None:
            self._connection.on_message(response.transport.payload)

    def _take_update(self, update: kv_pb2.LeaseUpdate) -> None:
        found = self._imports.get(AttemptKey(update.request_id, update.attempt))
        if found is None or self._connection is None:
            return
        self._failpoints.hit("published" if update.first_tokens else "progressed")
        self._by_lease[update.lease_id] = found
        news = LeaseNews(
            lease_id=update.lease_id,
            block_ids=unpack_uint32(update.block_ids).tolist(),
            num_tokens=update.num_tokens,
            first_tokens=tuple(
                first_token_from_proto(message, self._vocab_size) for message in update.first_tokens
            ),
        )
        had_ended = found.has_ended
        read = found.take_news(news)
        if found.has_ended and not had_ended:
            self._release(found)
        if read is not None:
            self._failpoints.hit("reading")
            handle = self._connection.read(update.lease_id, read.sources, read.targets)
            handle.add_done_callback(
                lambda outcome: self._call_soon(self._read_ended, found, read, outcome)
            )
        self._confirm_if_read(found)

    def _read_ended(self, found: KvImport, read: Read, outcome: ReadOutcome) -> None:
        self._failpoints.hit("read_done")
        had_ended = found.has_ended
        found.read_ended(read, outcome)
        if found.has_ended and not had_ended:
            self._release(found)
        self._confirm_if_read(found)
        self._forget_if_quiet(found)

    def _confirm_if_read(self, found: KvImport) -> None:
        if found.state is not ImportState.CONFIRMING or found.lease_id is None:
            return
        confirm = kv_pb2.Confirm(lease_id=found.lease_id)
        self._outgoing.send(kv_pb2.ReadLeasesRequest(confirm=confirm))
        self._failpoints.hit("confirm_sent")
        self._loop.call_later(self._verdict_timeout_s, self._verdict_is_late, found)

    def _verdict_is_late(self, found: KvImport) -> None:
        if found.state is ImportState.CONFIRMING:
            found.lose(f"no verdict from {self.owner.name} within {self._verdict_timeout_s} s")
            self._release(found)
            self._forget_if_quiet(found)

    def _release(self, found: KvImport) -> None:
        """Give the lease back at once, instead of letting it expire."""
        key = found.key
        release = kv_pb2.Release(request_id=key.request_id, attempt=key.attempt)
        self._outgoing.send(kv_pb2.ReadLeasesRequest(release=release))

    def _forget_if_quiet(self, found: KvImport) -> None:
        if found.is_quiet:
            self._imports.pop(found.key, None)
            if found.lease_id is not None:
                self._by_lease.pop(found.lease_id, None)
            self._on_quiet(found.key)

    def _call_soon(self, callback: Callable[..., None], *values: object) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *values)
        except RuntimeError:
            logger.debug("event=loop_closed owner=%s", self.owner.name)


class _StreamChannel:
    """The transport's messages inside the session's stream."""

    def __init__(self, outgoing: Outgoing[kv_pb2.ReadLeasesRequest]) -> None:
        self._outgoing = outgoing

    def send(self, payload: bytes) -> None:
        message = kv_pb2.TransportMessage(payload=payload)
        self._outgoing.send(kv_pb2.ReadLeasesRequest(transport=message))
