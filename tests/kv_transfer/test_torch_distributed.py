"""What is special to process groups; the rest is in test_transport_contract."""

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
import torch
from kv_peer import (
    LEASE,
    NO_LEASE,
    LocalSession,
    PipeSession,
    Worker,
    expected_blocks,
    resources,
    wait_ended,
    wait_until,
)

from paceline.errors import ConfigError, TransportError
from paceline.kv_transfer.device_wire import STAGING_BYTES
from paceline.kv_transfer.select import build_transport
from paceline.kv_transfer.settings import KvSettings, TransportName
from paceline.kv_transfer.transport import Connection, OwnerPeer, ReadState


class LocalPair:
    """An owner and a reader in this process."""

    def __init__(self, owner: Worker, reader: Worker, owner_name: str = "owner-0.7") -> None:
        self.session = LocalSession()
        self.peer: OwnerPeer = owner.transport.accept(
            "reader-0.1", self.session.owner, lambda lease, blocks: lease == LEASE
        )
        self.connection: Connection = reader.transport.connect(
            owner_name, 7, owner.transport.endpoint(), self.session.reader
        )
        self.session.start(self.connection, self.peer)

    def close(self) -> None:
        self.connection.close()
        self.peer.close()
        self.session.close()


@pytest.fixture(params=["torch_distributed", "staged"])
def transport(request: pytest.FixtureRequest) -> str:
    """Over Gloo, and by what GPUs use over a group that fails as NCCL does."""
    return str(request.param)


@pytest.fixture
def workers(transport: str) -> Iterator[tuple[Worker, Worker]]:
    owner = Worker(transport, "owner-0.7", read_timeout_s=5.0)
    reader = Worker(transport, "reader-0.1", read_timeout_s=5.0)
    owner.fill(7)
    yield owner, reader
    owner.close()
    reader.close()


def listening_addresses() -> set[str]:
    connections = psutil.Process().net_connections("inet")
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def test_no_port_is_open_before_the_first_pair_and_only_loopback_after() -> None:
    before = listening_addresses()
    owner = Worker("torch_distributed", "owner-0.7")
    reader = Worker("torch_distributed", "reader-0.1")
    assert listening_addresses() == before
    pair = LocalPair(owner, reader)
    assert wait_ended(pair.connection.read(LEASE, [1], [1])).state is ReadState.DONE
    assert listening_addresses() - before <= {"127.0.0.1"}
    pair.close()
    owner.close()
    reader.close()
    assert listening_addresses() == before


def test_a_pair_is_made_again_after_either_end_has_lost_it(
    workers: tuple[Worker, Worker],
) -> None:
    owner, reader = workers
    before = resources().threads
    for number in range(20):
        pair = LocalPair(owner, reader)
        outcome = wait_ended(pair.connection.read(LEASE, [number], [number]))
        assert outcome.state is ReadState.DONE, outcome.error
        if number % 2:
            pair.connection.close()
        else:
            pair.peer.close()
        pair.close()
    assert torch.equal(reader.blocks[:20], owner.blocks[:20])
    reader.transport.close()
    owner.transport.close()
    assert resources().threads == before


def test_two_workers_read_from_each_other_at_the_same_time(workers: tuple[Worker, Worker]) -> None:
    first, second = workers
    second.fill(9)
    there, back = LocalPair(first, second), LocalPair(second, first, "reader-0.1")
    ids, other_ids = list(range(32)), list(range(32, 64))
    handles = []
    for _ in range(20):
        handles.append(there.connection.read(LEASE, ids, other_ids))
        handles.append(back.connection.read(LEASE, ids, other_ids))
    assert {wait_ended(handle).state for handle in handles} == {ReadState.DONE}
    block_bytes = first.pool.layout.block_bytes
    assert torch.equal(second.blocks[32:], expected_blocks(7, 64, block_bytes)[:32])
    assert torch.equal(first.blocks[32:], expected_blocks(9, 64, block_bytes)[:32])
    there.close()
    back.close()


def test_a_read_of_many_pieces_arrives_in_order(transport: str) -> None:
    block_kib = STAGING_BYTES // 2 >> 10
    owner = Worker(transport, "owner-0.7", 11, block_kib)
    reader = Worker(transport, "reader-0.1", 11, block_kib)
    owner.fill(5)
    pair = LocalPair(owner, reader)
    outcome = wait_ended(pair.connection.read(LEASE, list(range(11)), list(reversed(range(11)))))
    assert outcome.state is ReadState.DONE, outcome.error
    assert torch.equal(reader.blocks.flip(0), owner.blocks)
    pair.close()
    owner.close()
    reader.close()


def test_an_owner_that_never_answers_fails_the_read_at_the_time_out(transport: str) -> None:
    owner = Worker(transport, "owner-0.7")
    reader = Worker(transport, "reader-0.1", read_timeout_s=0.2)
    session = LocalSession()  # nobody listens
    connection = reader.transport.connect(
        "owner-0.7", 7, owner.transport.endpoint(), session.reader
    )
    outcome = wait_ended(connection.read(LEASE, [0], [0]), 1.0)
    assert outcome.state is ReadState.FAILED
    assert "within kv.read_timeout_s, 0.2 s (the owner did not answer)" in outcome.error
    session.close()
    owner.close()
    reader.close()


class CutSession(PipeSession):
    """A channel that loses every message from the n-th on."""

    def __init__(self, whole: PipeSession, num_messages: int) -> None:
        super().__init__(whole.pipe)
        self._num_messages = num_messages

    def send(self, payload: bytes) -> None:
        if self.num_sent >= self._num_messages:
            return
        super().send(payload)


@pytest.mark.parametrize("num_messages", range(8))
@pytest.mark.parametrize("mute", ["owner", "reader"])
def test_whatever_message_is_lost_reads_end_and_close_frees_all(
    transport: str, num_messages: int, mute: str
) -> None:
    before = resources()
    owner = Worker(transport, "owner-0.7", read_timeout_s=0.3)
    reader = Worker(transport, "reader-0.1", read_timeout_s=0.3)
    session = LocalSession()
    if mute == "owner":
        session.owner = CutSession(session.owner, num_messages)
    else:
        session.reader = CutSession(session.reader, num_messages)
    peer = owner.transport.accept("reader-0.1", session.owner, lambda lease, blocks: True)
    connection = reader.transport.connect(
        "owner-0.7", 7, owner.transport.endpoint(), session.reader
    )
    session.start(connection, peer)
    handles = [connection.read(LEASE, [number], [number]) for number in range(3)]
    for handle in handles:
        outcome = wait_ended(handle, 3.0)
        assert outcome.ended_s - outcome.started_s < 1.0
    session.close()
    reader.close()
    owner.close()
    del peer, connection, handles
    assert resources().threads == before.threads


def test_a_no_in_the_middle_does_not_cost_the_others(workers: tuple[Worker, Worker]) -> None:
    pair = LocalPair(*workers)
    leases = [LEASE, NO_LEASE, LEASE, NO_LEASE, LEASE]
    handles = [
        pair.connection.read(lease, [number], [number]) for number, lease in enumerate(leases)
    ]
    states = [wait_ended(handle).state for handle in handles]
    assert states == [ReadState.DONE, ReadState.FAILED] * 2 + [ReadState.DONE]
    pair.close()


@pytest.mark.parametrize("host", ["203.0.113.7", "0.0.0.0", "no.such.host.invalid"])
def test_an_address_on_which_this_host_cannot_listen_is_refused_at_start(host: str) -> None:
    worker = Worker("shm", "owner-0.7")
    settings = KvSettings(transport="torch_distributed", listen_host=host)
    with pytest.raises(ConfigError, match=r"kv\.listen_host"):
        build_transport(settings, worker.pool, worker.memory)
    worker.close()


def test_pools_that_differ_in_block_size_are_refused() -> None:
    owner = Worker("torch_distributed", "owner-0.7", block_kib=8)
    reader = Worker("torch_distributed", "reader-0.1", block_kib=4)
    session = LocalSession()
    with pytest.raises(TransportError, match="differ in layout"):
        reader.transport.connect("owner-0.7", 7, owner.transport.endpoint(), session.reader)
    session.close()
    owner.close()
    reader.close()


@pytest.mark.parametrize("closer", ["reader", "owner"])
def test_a_transfer_cut_in_the_middle_frees_both_threads_at_once(
    transport: str, closer: str
) -> None:
    before = resources().threads
    owner = Worker(transport, "owner-0.7", 64, 512)
    reader = Worker(transport, "reader-0.1", 64, 512)
    owner.fill(7)
    everything = range(64)
    for _ in range(10):
        reader.blocks.zero_()
        pair = LocalPair(owner, reader)
        handles = [pair.connection.read(LEASE, everything, everything) for _ in range(12)]
        wait_until(lambda: bool(reader.blocks[0].any()))
        (pair.connection if closer == "reader" else pair.peer).close()
        pair.close()
        wait_until(lambda: resources().threads == before, 2.0)
        assert wait_ended(handles[-1]).state is ReadState.FAILED
    owner.close()
    reader.close()


def test_callbacks_may_start_the_next_read(workers: tuple[Worker, Worker]) -> None:
    pair = LocalPair(*workers)
    ended = threading.Event()
    pair.connection.read(LEASE, [0], [0]).add_done_callback(
        lambda _: pair.connection.read(LEASE, [1], [1]).add_done_callback(lambda _: ended.set())
    )
    assert ended.wait(5.0)
    assert torch.equal(workers[1].blocks[1], workers[0].blocks[1])
    pair.close()


@pytest.mark.parametrize(("transport_name", "needed"), [("shm", "CPU memory"), ("auto", "CUDA")])
def test_a_pool_in_memory_that_nothing_serves_is_refused(
    transport_name: TransportName, needed: str
) -> None:
    worker = Worker("shm", "owner-0.7")
    pool = replace(worker.pool, blocks=worker.pool.blocks.to("meta"))
    with pytest.raises(ConfigError, match=f"{needed}.* on meta"):
        build_transport(KvSettings(transport=transport_name), pool, None)
    del pool
    worker.close()


def test_pools_on_different_kinds_of_device_are_refused(workers: tuple[Worker, Worker]) -> None:
    _, reader = workers
    endpoint = base64.b64encode(json.dumps([64, 4096, "cuda"]).encode()).decode()
    session = LocalSession()
    with pytest.raises(TransportError, match=r"owner-0\.7 is in cuda memory, this one in cpu"):
        reader.transport.connect(
            "owner-0.7",
            7,
            json.dumps({"torch_distributed": endpoint}).encode(),
            session.reader,
        )
    session.close()
