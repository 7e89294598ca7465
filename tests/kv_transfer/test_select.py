"""Which transport two workers end up with, and why."""

import logging
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
from kv_peer import LEASE, LocalSession, Worker, wait_ended

from paceline.errors import TransportError
from paceline.kv_transfer import pool_memory, selected
from paceline.kv_transfer.read_handle import PendingRead
from paceline.kv_transfer.selected import SelectedConnection
from paceline.kv_transfer.settings import KvSettings
from paceline.kv_transfer.transport import ReadState


class Connected:
    """An owner and a reader with these settings."""

    def __init__(self, owner: str, reader: str, min_gb_per_s: float = 0.0) -> None:
        self.owner = Worker(owner, "owner-0.7")
        self.reader = Worker(reader, "reader-0.1", min_gb_per_s=min_gb_per_s)
        self.owner.fill(7)
        self.session = LocalSession()

    def connect(self, endpoint: bytes | None = None) -> SelectedConnection:
        encoded = self.owner.transport.endpoint() if endpoint is None else endpoint
        connection = self.reader.transport.connect("owner-0.7", 7, encoded, self.session.reader)
        peer = self.owner.transport.accept(
            "reader-0.1", self.session.owner, lambda lease, blocks: True
        )
        self.session.start(connection, peer)
        return connection

    def close(self) -> None:
        self.session.close()
        self.reader.close()
        self.owner.close()


@pytest.fixture
def auto() -> Iterator[Connected]:
    connected = Connected("auto", "auto")
    yield connected
    connected.close()


def assert_reads(connected: Connected, connection: SelectedConnection) -> None:
    outcome = wait_ended(connection.read(LEASE, [1], [2]))
    assert outcome.state is ReadState.DONE, outcome.error
    assert torch.equal(connected.reader.blocks[2], connected.owner.blocks[1])


def test_auto_takes_shared_memory_on_one_host_and_says_how_fast_it_is(
    auto: Connected, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    connection = auto.connect()
    assert_reads(auto, connection)
    assert connection.transport == "shm"
    assert connection.gb_per_s is not None
    assert "transport=shm gb_per_s=" in caplog.text


def test_auto_takes_torch_distributed_between_hosts_and_says_why(
    auto: Connected, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    endpoint = auto.owner.transport.endpoint()
    monkeypatch.setattr(pool_memory, "host_identity", lambda: "another")
    connection = auto.connect(endpoint)
    assert_reads(auto, connection)
    assert connection.transport == "torch_distributed"
    assert "on another host" in caplog.text


def test_a_named_transport_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    connected = Connected("auto", "shm")
    endpoint = connected.owner.transport.endpoint()
    monkeypatch.setattr(pool_memory, "host_identity", lambda: "another")
    with pytest.raises(TransportError, match=r"no transport reaches owner-0\.7\. shm: .*host"):
        connected.connect(endpoint)
    monkeypatch.undo()
    connected.close()


def test_an_owner_that_does_not_serve_the_transport_is_named() -> None:
    connected = Connected("torch_distributed", "shm")
    with pytest.raises(TransportError, match=r"owner-0\.7 does not serve shm"):
        connected.connect()
    connected.close()


@pytest.mark.parametrize("transport", ["shm", "torch_distributed"])
def test_a_transport_that_is_slower_than_the_settings_allow_is_refused(transport: str) -> None:
    connected = Connected(transport, transport, min_gb_per_s=1e6)
    connection = connected.connect()
    # Behind the probes, and so after the verdict.
    wait_ended(connection.probe(1))
    outcome = wait_ended(connection.read(LEASE, [1], [2]))
    assert outcome.state is ReadState.FAILED
    assert "kv.min_transport_gb_per_s is 1000000.0" in outcome.error
    assert not connected.reader.blocks.any()
    connected.close()


@pytest.mark.parametrize("endpoint", [b"", b"[]", b"7", b'{"shm": 5}', b'{"shm": "x"}', b"\xff"])
def test_a_damaged_endpoint_is_refused(auto: Connected, endpoint: bytes) -> None:
    with pytest.raises(TransportError):
        auto.connect(endpoint)


@pytest.mark.parametrize("payload", [b"", b"no tag", b"nixl\0hello"])
def test_messages_for_an_unknown_transport_are_refused(auto: Connected, payload: bytes) -> None:
    connection = auto.connect()
    peer = auto.owner.transport.accept("reader-0.1", auto.session.owner, lambda *_: True)
    for end in (connection, peer):
        with pytest.raises(TransportError, match="transport"):
            end.on_message(payload)
    peer.close()


def test_a_lease_that_ends_before_its_second_renewal_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lease_ttl_s at least twice"):
        KvSettings(lease_ttl_s=1.0, heartbeat_s=0.6)


class ProbedConnection:
    """A connection whose probes the test ends; its reads are done at once."""

    def __init__(self) -> None:
        self.probes: list[PendingRead] = []

    def probe(self, num_bytes: int) -> PendingRead:
        self.probes.append(PendingRead(num_bytes))
        return self.probes[-1]

    def read(self, lease_id: int, sources: Sequence[int], targets: Sequence[int]) -> PendingRead:
        read = PendingRead(1)
        read.finish()
        return read

    def on_message(self, payload: bytes) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of probes, in its one element."""
    clock = [1000.0]
    monkeypatch.setattr(selected, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    return clock


def fail_probes(probed: ProbedConnection, error: str) -> None:
    for probe in probed.probes[-2:]:
        probe.fail(error)


def read_error(connection: SelectedConnection) -> str:
    return wait_ended(connection.read(LEASE, [0], [0])).error


def test_a_rate_is_measured_behind_a_good_probe_only(now: list[float]) -> None:
    probed = ProbedConnection()
    connection = SelectedConnection("torch_distributed", "owner-0.7", probed, 1.0, "")
    probed.probes[0].fail("the pairing took too long")
    probed.probes[1].finish()
    assert connection.gb_per_s is None
    assert read_error(connection) == ""
    assert len(probed.probes) == 2
    now[0] += selected.MIN_PAUSE_S
    assert read_error(connection) == ""
    assert len(probed.probes) == 4
    for probe in probed.probes[2:]:
        probe.finish()
    assert connection.gb_per_s is not None


def test_failed_probes_refuse_reads_only_after_some_and_until_one_is_good(
    now: list[float],
) -> None:
    probed = ProbedConnection()
    connection = SelectedConnection("torch_distributed", "owner-0.7", probed, 1e-6, "")
    for num_failed in range(selected.MAX_FAILED_PROBES):
        assert read_error(connection) == ""
        assert len(probed.probes) == 2 * (num_failed + 1)
        fail_probes(probed, "no route")
        now[0] += 100.0
    probed_again = read_error(connection)
    assert "a probe of torch_distributed from owner-0.7 failed: no route" in probed_again
    for probe in probed.probes[-2:]:
        probe.finish()
    assert read_error(connection) == ""
    now[0] += 100.0
    assert read_error(connection) == ""
    assert len(probed.probes) == 2 * (selected.MAX_FAILED_PROBES + 1)


def test_a_transport_that_is_too_slow_stays_refused(now: list[float]) -> None:
    probed = ProbedConnection()
    connection = SelectedConnection("torch_distributed", "owner-0.7", probed, 1e9, "")
    for probe in probed.probes:
        probe.finish()
    now[0] += 100.0
    assert "kv.min_transport_gb_per_s" in read_error(connection)
    assert len(probed.probes) == 2
