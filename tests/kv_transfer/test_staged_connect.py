"""Connecting through a library that hangs, over a wire that the test holds in its hands."""

import threading
import time

import pytest
from held_wire import Call, HeldWire, assert_failed
from kv_peer import wait_until

from paceline.errors import TransportError
from paceline.kv_transfer.channel_store import ChannelStore
from paceline.kv_transfer.communicator import OWNER_RANK, READER_RANK
from paceline.kv_transfer.staged_communicator import StagedCommunicator
from paceline.kv_transfer.staged_connect import (
    MAX_HANGING_CONNECTS,
    READER_ABORTS_AFTER_S,
    StagedCommunicators,
)


def make_store() -> ChannelStore:
    return ChannelStore(lambda key, value: None)


def test_connecting_returns_once_the_greeting_has_arrived() -> None:
    wire = HeldWire(["greet"])
    factory = StagedCommunicators(lambda store, rank: wire)
    call = Call(lambda: factory.connect(make_store(), OWNER_RANK, 10.0))
    wait_until(lambda: wire.log == ["greet"])
    time.sleep(0.01)
    assert call.is_running
    wire.let("greet")
    call.join()
    assert isinstance(call.result, StagedCommunicator)
    assert wire.num_aborts == 0
    factory.close()


@pytest.mark.parametrize("end", ["deadline", "closed"])
@pytest.mark.parametrize("stuck", ["make", "greet", "greeting"])
def test_connecting_that_hangs_is_given_up_and_freed(stuck: str, end: str) -> None:
    wire = HeldWire([] if stuck != "greeting" else ["greet"])
    may_be_made = threading.Event()
    if stuck != "make":
        may_be_made.set()
    if stuck == "greet":
        wire.greet_may_return.clear()

    def make(store: ChannelStore, rank: int) -> HeldWire:
        assert may_be_made.wait(10.0)
        return wire

    factory, store = StagedCommunicators(make), make_store()
    timeout_s = 0.2 if end == "deadline" else 10.0
    call = Call(lambda: factory.connect(store, READER_RANK, timeout_s))
    time.sleep(0.05)
    assert call.is_running
    if end == "closed":
        store.close("the session has ended")
    call.join()
    assert_failed(call, "given up" if end == "closed" else "has not ended after")
    may_be_made.set()
    wait_until(lambda: wire.num_aborts == 1)
    wire.greet_may_return.set()
    factory.close()
    assert wire.num_aborts == 1


def test_an_error_while_connecting_reaches_the_caller() -> None:
    def make(store: ChannelStore, rank: int) -> HeldWire:
        raise TransportError("NCCL cannot connect: no such interface")

    factory = StagedCommunicators(make)
    with pytest.raises(TransportError, match="no such interface"):
        factory.connect(make_store(), OWNER_RANK, 5.0)
    factory.close()


def test_closing_waits_for_a_hanging_library_for_a_while_only(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.kv_transfer.staged_connect.CLOSE_TIMEOUT_S", 0.1)
    wire = HeldWire()
    wire.abort_may_return.clear()
    factory = StagedCommunicators(lambda store, rank: wire)
    factory.connect(make_store(), OWNER_RANK, 5.0).abort()
    wait_until(lambda: wire.num_aborts == 1)
    factory.close()
    assert "event=kv_thread_hangs thread=kv-abort" in caplog.text
    wire.abort_may_return.set()


def test_the_library_is_not_told_of_an_abort_while_the_greeting_is_launched() -> None:
    wire = HeldWire()
    wire.greet_may_return.clear()
    factory, store = StagedCommunicators(lambda store, rank: wire), make_store()
    call = Call(lambda: factory.connect(store, OWNER_RANK, 5.0))
    wait_until(lambda: wire.num_launching == 1)
    store.close("the session has ended")
    call.join()
    time.sleep(0.05)
    assert wire.num_aborts == 0
    wire.greet_may_return.set()
    wait_until(lambda: wire.num_aborts == 1)
    assert wire.num_launching_at_abort == 0
    factory.close()


def test_connects_that_hang_are_not_joined_by_more() -> None:
    may_return = threading.Event()

    def make(store: ChannelStore, rank: int) -> HeldWire:
        assert may_return.wait(10.0)
        raise TransportError("too late")

    factory = StagedCommunicators(make)
    for _ in range(MAX_HANGING_CONNECTS):
        with pytest.raises(TransportError, match="has not ended"):
            factory.connect(make_store(), OWNER_RANK, 0.01)
    for _ in range(3):
        with pytest.raises(TransportError, match=r"8 connects .* hang in NCCL.*kv\.listen_host"):
            factory.connect(make_store(), OWNER_RANK, 0.01)
    assert [t.name for t in threading.enumerate()].count("kv-connect") == MAX_HANGING_CONNECTS
    may_return.set()
    factory.close()
    with pytest.raises(TransportError, match="too late"):
        factory.connect(make_store(), OWNER_RANK, 1.0)
    factory.close()


@pytest.mark.parametrize(
    ("rank", "after_s"), [(OWNER_RANK, 0.0), (READER_RANK, READER_ABORTS_AFTER_S)]
)
def test_the_reader_leaves_the_owner_time_to_let_go(rank: int, after_s: float) -> None:
    wire = HeldWire()
    factory = StagedCommunicators(lambda store, rank: wire)
    communicator = factory.connect(make_store(), rank, 5.0)
    started_s = time.monotonic()
    communicator.abort()
    wait_until(lambda: wire.num_aborts == 1)
    assert time.monotonic() - started_s >= after_s
    factory.close()
