"""Both ends of a KV session over gRPC and shared memory: handshake, reads, verdicts, breaks."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest
import torch
from kv_peer import Worker

from paceline.engine.block_allocator import BlockAllocator
from paceline.failpoints import Failpoints
from paceline.internal.v1 import kv_pb2, kv_pb2_grpc
from paceline.kv_transfer.lease import FirstToken, Lease, LeaseTable, Progress
from paceline.request import AttemptKey, Span
from paceline.worker.core import Peer
from paceline.worker.identity import WorkerIdentity
from paceline.worker.kv_owner import KvOwner, _Subscription
from paceline.worker.kv_reader import KvReader, OwnerLink
from paceline.worker.mailbox import Mailbox

TIMEOUT_S = 20.0
KEY = AttemptKey("r", 1)
FIRST = (FirstToken(0, 7),)
OWNER = WorkerIdentity("prefill-0", 7, 64, 16, 8, 0, b"layout", "16 tokens a block")
READER = WorkerIdentity("decode-0", 3, 64, 16, 8, 0, b"layout", "16 tokens a block")


class Heard:
    """Writes down what the reader's engine would hear."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.reason = ""

    def import_progressed(self, key: AttemptKey) -> None:
        self.calls.append("progressed")

    def imported(self, key: AttemptKey, first_tokens: Sequence[FirstToken]) -> None:
        assert tuple(first_tokens) == FIRST
        self.calls.append("imported")

    def confirmed(self, key: AttemptKey, spans: list[Span], num_bytes: int) -> None:
        self.calls.append("confirmed")

    def lost(self, key: AttemptKey, reason: str) -> None:
        self.calls.append("lost")
        self.reason = reason

    def import_ended(self, key: AttemptKey) -> None:
        self.calls.append("ended")


class Pair:
    """An owner and a reader on one event loop; the test plays both engines."""

    def __init__(self) -> None:
        self.owner_pool, self.reader_pool = Worker("shm", OWNER.name), Worker("shm", READER.name)
        self.owner_pool.fill(1)
        self.allocator = BlockAllocator(64)
        self.leases = LeaseTable(self.allocator, ttl_s=5.0)
        self.heard = Heard()
        self.silence_limit_s = TIMEOUT_S
        self.lost_readers: list[str] = []
        self.released: list[AttemptKey] = []
        self.mailbox = Mailbox()
        self.address = ""

    def grant(self, num_blocks: int) -> Lease:
        lease = self.leases.grant(KEY, READER.name, time.monotonic())
        self.leases.extend(lease, self.allocator.allocate(num_blocks))
        return lease

    def publish(self, lease: Lease, progress: Progress) -> None:
        self.leases.publish(lease, progress)
        self.owner.notify_changed(lease)

    async def import_half(self, reader: KvReader) -> Lease:
        """Begin to import two blocks, of which the first is published; return once it is there."""
        lease = self.grant(2)
        reader.begin(KEY, self.peer, 32, [10, 11], 0)
        self.publish(lease, Progress(16))
        await self.until(lambda: "progressed" in self.heard.calls)
        return lease

    async def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            self.mailbox.run_calls(time.monotonic())
            assert time.monotonic() < deadline, f"heard {self.heard.calls}: {self.heard.reason}"
            await asyncio.sleep(0.005)

    @property
    def peer(self) -> Peer:
        return Peer(OWNER.worker_id, OWNER.incarnation, self.address)

    def make_reader(self, identity: WorkerIdentity) -> KvReader:
        return KvReader(
            identity,
            self.reader_pool.transport,
            self.heard,
            Failpoints(),
            heartbeat_s=0.05,
            silence_limit_s=self.silence_limit_s,
            verdict_timeout_s=TIMEOUT_S,
            vocab_size=100,
        )

    @asynccontextmanager
    async def run(
        self,
        identity: WorkerIdentity = READER,
        owner: kv_pb2_grpc.KvServiceServicer | None = None,
    ) -> AsyncIterator[KvReader]:
        self.owner = KvOwner(
            OWNER,
            self.leases,
            self.owner_pool.transport,
            self.mailbox,
            lambda reader, now: self.lost_readers.append(reader),
            lambda reader, key, now: self.released.append(key),
            Failpoints(),
        )
        self.server = grpc.aio.server()
        kv_pb2_grpc.add_KvServiceServicer_to_server(owner or self.owner, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()
        reader = self.make_reader(identity)
        try:
            yield reader
        finally:
            await reader.close()
            await self.server.stop(None)
            self.owner_pool.close()
            self.reader_pool.close()


async def test_blocks_are_read_as_they_are_published_and_confirmed() -> None:
    pair = Pair()
    async with pair.run() as reader:
        lease = pair.grant(3)
        reader.begin(KEY, pair.peer, 40, [10, 11, 12], 0)
        pair.publish(lease, Progress(32))
        await pair.until(lambda: "progressed" in pair.heard.calls)
        pair.publish(lease, Progress(40, FIRST))
        await pair.until(lambda: "ended" in pair.heard.calls)
        assert pair.heard.calls[-3:] == ["imported", "confirmed", "ended"]
        sources = list(lease.block_ids)
        assert torch.equal(pair.reader_pool.blocks[10:13], pair.owner_pool.blocks[sources])
        assert [settled.key for settled in pair.leases.settle()] == [KEY]


async def test_a_settled_lease_is_not_told_again() -> None:
    """Its block list is gone: an update would have tokens without their blocks."""
    pair = Pair()
    async with pair.run() as reader:
        lease = pair.grant(1)
        reader.begin(KEY, pair.peer, 16, [10], 0)
        pair.publish(lease, Progress(16, FIRST))
        await pair.until(lambda: "ended" in pair.heard.calls)
        assert pair.leases.settle() == [lease]
        [session] = pair.owner._sessions.values()
        session.subscriptions[KEY] = _Subscription()
        told: list[kv_pb2.ReadLeasesResponse] = []
        session.stream.send = told.append  # type: ignore[method-assign]
        pair.owner.notify_changed(lease)
        await pair.until(lambda: not session.subscriptions)
        assert told == []


async def test_a_proxy_in_the_environment_does_not_stop_an_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    pair = Pair()
    async with pair.run() as reader:
        lease = pair.grant(1)
        reader.begin(KEY, pair.peer, 16, [10], 0)
        pair.publish(lease, Progress(16, FIRST))
        await pair.until(lambda: "ended" in pair.heard.calls)
        assert "confirmed" in pair.heard.calls, pair.heard.reason


async def test_a_subscription_may_come_before_the_grant() -> None:
    pair = Pair()
    async with pair.run() as reader:
        reader.begin(KEY, pair.peer, 16, [10], 0)
        link = reader.connect(pair.peer)
        await pair.until(lambda: link._connection is not None)
        pair.publish(pair.grant(1), Progress(16, FIRST))
        await pair.until(lambda: "confirmed" in pair.heard.calls)


async def test_a_first_token_outside_the_vocabulary_never_reaches_the_engine() -> None:
    pair = Pair()
    async with pair.run() as reader:
        lease = pair.grant(1)
        reader.begin(KEY, pair.peer, 16, [10], 0)
        pair.publish(lease, Progress(16, (FirstToken(0, 100),)))
        await pair.until(lambda: "ended" in pair.heard.calls)
        assert "imported" not in pair.heard.calls
        assert "the first token of choice 0 is 100" in pair.heard.reason


async def test_a_lease_revoked_before_the_confirmation_is_lost() -> None:
    pair = Pair()
    async with pair.run() as reader:
        lease = await pair.import_half(reader)
        assert pair.leases.revoke(lease, "cancelled for the test", time.monotonic())
        pair.owner.notify_changed(lease)
        await pair.until(lambda: "ended" in pair.heard.calls)
        assert pair.heard.calls[-2:] == ["lost", "ended"]
        assert "cancelled for the test" in pair.heard.reason


async def test_heartbeats_keep_the_lease_of_an_import_and_none_that_the_reader_forgot() -> None:
    """A lease that nobody subscribed to is one whose dispatch the reader has refused."""
    pair = Pair()
    async with pair.run() as reader:
        lease = await pair.import_half(reader)
        forgotten = pair.leases.grant(AttemptKey("forgotten", 1), READER.name, lease.renewed_s)
        began_s = time.monotonic()
        await pair.until(lambda: lease.renewed_s > began_s + 0.2)
        assert pair.leases.expire(began_s + 5.1) == [forgotten]


async def test_an_abandoned_import_is_released_at_its_owner() -> None:
    pair = Pair()
    async with pair.run() as reader:
        await pair.import_half(reader)
        reader.abandon(KEY)
        await pair.until(lambda: pair.released == [KEY])
        await pair.until(lambda: pair.heard.calls[-1] == "ended")
        assert "lost" not in pair.heard.calls


async def test_an_import_whose_read_failed_is_released_at_its_owner() -> None:
    pair = Pair()
    async with pair.run() as reader:
        lease = pair.grant(2)
        reader.begin(KEY, pair.peer, 32, [10, 999], 0)
        pair.publish(lease, Progress(32, FIRST))
        await pair.until(lambda: pair.released == [KEY])
        await pair.until(lambda: pair.heard.calls[-1] == "ended")
        assert "999 is outside its pool" in pair.heard.reason


async def test_another_layout_is_refused_with_both_layouts_in_the_message() -> None:
    pair = Pair()
    other = replace(READER, layout_fingerprint=b"other", layout_description="32 tokens a block")
    async with pair.run(other) as reader:
        reader.begin(KEY, pair.peer, 16, [10], 0)
        await pair.until(lambda: "ended" in pair.heard.calls)
        for part in ("32 tokens a block", "16 tokens a block", "kv.block_tokens"):
            assert part in pair.heard.reason


async def test_another_incarnation_of_the_owner_is_refused() -> None:
    pair = Pair()
    async with pair.run() as reader:
        reader.begin(KEY, pair.peer._replace(incarnation=6), 16, [10], 0)
        await pair.until(lambda: "ended" in pair.heard.calls)
        assert "prefill-0.7, not incarnation 6" in pair.heard.reason


class _RefusesLate(kv_pb2_grpc.KvServiceServicer):
    """Refuses a reader some heartbeats after its hello."""

    heard_more = False

    async def ReadLeases(
        self,
        request_iterator: AsyncIterator[kv_pb2.ReadLeasesRequest],
        context: grpc.aio.ServicerContext[kv_pb2.ReadLeasesRequest, kv_pb2.ReadLeasesResponse],
    ) -> AsyncIterator[kv_pb2.ReadLeasesResponse]:
        await anext(request_iterator)
        more = asyncio.ensure_future(anext(request_iterator))
        await asyncio.wait([more], timeout=0.3)
        self.heard_more = more.done()
        more.cancel()
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "it is another incarnation")
        yield kv_pb2.ReadLeasesResponse()


async def test_nothing_follows_a_hello_that_may_be_refused_so_that_the_reason_arrives() -> None:
    """What is written while a refusal is on its way makes gRPC report INTERNAL instead of it."""
    pair, owner = Pair(), _RefusesLate()
    async with pair.run(owner=owner) as reader:
        reader.begin(KEY, pair.peer, 16, [10], 0)
        await pair.until(lambda: "ended" in pair.heard.calls)
        assert "it is another incarnation" in pair.heard.reason
        assert not owner.heard_more


async def test_an_owner_that_does_not_answer_a_hello_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("paceline.worker.kv_reader.CONNECT_TIMEOUT_S", 0.1)
    pair = Pair()
    async with pair.run(owner=_RefusesLate()) as reader:
        reader.begin(KEY, pair.peer, 16, [10], 0)
        await pair.until(lambda: "ended" in pair.heard.calls)
        assert f"no answer from {pair.address} within 0.1 s" in pair.heard.reason


async def test_the_deadline_of_an_answer_does_not_end_a_session_that_has_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("paceline.worker.kv_reader.CONNECT_TIMEOUT_S", 1.0)
    pair = Pair()
    async with pair.run() as reader:
        lease = await pair.import_half(reader)
        await asyncio.sleep(1.2)
        pair.publish(lease, Progress(32, FIRST))
        await pair.until(lambda: "ended" in pair.heard.calls)
        assert "imported" in pair.heard.calls


async def test_an_owner_that_falls_silent_loses_its_imports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("paceline.worker.kv_owner.HEARTBEAT_S", 1000.0)
    pair = Pair()
    pair.silence_limit_s = 0.2
    async with pair.run() as reader:
        await pair.import_half(reader)
        await pair.until(lambda: "ended" in pair.heard.calls)
        assert pair.heard.calls[-2:] == ["lost", "ended"]
        assert "no message for kv.silence_limit_s, 0.2 s" in pair.heard.reason


async def test_an_owner_whose_engine_takes_its_time_is_not_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("paceline.worker.kv_owner.HEARTBEAT_S", 0.05)
    pair = Pair()
    pair.silence_limit_s = 0.5
    async with pair.run() as reader:
        lease = await pair.import_half(reader)
        await asyncio.sleep(1.0)
        pair.publish(lease, Progress(32, FIRST))
        await pair.until(lambda: "ended" in pair.heard.calls)
        assert "imported" in pair.heard.calls


async def test_an_owner_that_is_gone_loses_its_imports_and_a_new_link_can_be_opened() -> None:
    pair = Pair()
    async with pair.run() as reader:
        await pair.import_half(reader)
        await pair.server.stop(None)
        await pair.until(lambda: "ended" in pair.heard.calls)
        assert pair.heard.calls[-2:] == ["lost", "ended"]
        assert reader.connect(pair.peer).is_closed is False


async def test_a_reader_that_is_gone_is_told_to_the_owners_engine() -> None:
    pair = Pair()
    async with pair.run() as reader:
        link = reader.connect(pair.peer)
        await pair.until(lambda: link._connection is not None)
        await reader.close()
        await pair.until(lambda: pair.lost_readers == [READER.name])


@pytest.mark.parametrize("is_complete", [False, True])
async def test_a_reader_that_connects_again_gives_up_what_it_read_over_its_old_session(
    is_complete: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not what was granted for the new one before the owner saw that."""
    pair = Pair()
    async with pair.run() as reader:
        lease = await pair.import_half(reader)
        if is_complete:
            monkeypatch.setattr(OwnerLink, "_confirm_if_read", lambda link, found: None)
            pair.publish(lease, Progress(32, FIRST))
            await pair.until(lambda: "imported" in pair.heard.calls)
        pair.leases.grant(AttemptKey("granted meanwhile", 1), READER.name, time.monotonic())
        # The owner does not see the end of the old stream.
        again = pair.make_reader(READER)
        link = again.connect(pair.peer)
        await pair.until(lambda: link._connection is not None)
        await pair.until(lambda: pair.released == [KEY])
        assert pair.lost_readers == []
        await again.close()


async def test_an_owner_takes_no_more_readers_than_its_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("paceline.worker.kv_owner.MAX_READERS", 1)
    pair = Pair()
    async with pair.run() as reader:
        link = reader.connect(pair.peer)
        await pair.until(lambda: link._connection is not None)
        other = pair.make_reader(replace(READER, worker_id="decode-1"))
        other.begin(KEY, pair.peer, 16, [10], 0)
        await pair.until(lambda: "ended" in pair.heard.calls)
        assert "prefill-0.7 has 1 readers, and takes no more" in pair.heard.reason
        await other.close()


async def test_a_reader_that_subscribes_without_end_loses_its_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("paceline.worker.kv_owner.MAX_SUBSCRIPTIONS", 8)
    pair = Pair()
    async with pair.run() as reader:
        for number in range(9):
            reader.begin(AttemptKey("never granted", number), pair.peer, 16, [10], 0)
        await pair.until(lambda: pair.heard.calls.count("ended") == 9)
        await pair.until(lambda: pair.lost_readers == [READER.name])


async def test_a_reader_that_brings_more_than_the_engine_can_take_loses_its_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = Pair()
    async with pair.run() as reader:
        await pair.import_half(reader)
        monkeypatch.setattr("paceline.worker.mailbox.MAX_CALLS", 0)
        await pair.until(lambda: pair.lost_readers == [READER.name])


async def test_membership_without_the_owner_ends_the_link_at_once() -> None:
    pair = Pair()
    async with pair.run() as reader:
        await pair.import_half(reader)
        reader.drop_absent({READER.name})
        await pair.until(lambda: "ended" in pair.heard.calls)
        assert "left the deployment" in pair.heard.reason


async def test_a_session_must_begin_with_hello() -> None:
    pair = Pair()
    async with pair.run(), grpc.aio.insecure_channel(pair.address) as channel:
        call = kv_pb2_grpc.KvServiceStub(channel).ReadLeases()
        await call.write(kv_pb2.ReadLeasesRequest(heartbeat=kv_pb2.Heartbeat()))
        with pytest.raises(grpc.aio.AioRpcError, match="hello"):
            await call.read()
