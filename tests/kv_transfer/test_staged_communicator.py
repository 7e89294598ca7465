"""Deadlines, aborts, the gate and the two buffers, over a wire that the test holds in its hands."""

import threading
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from kv_peer import wait_until
from silent_group import make_silent_wire

from paceline.errors import TransportError
from paceline.kv_transfer.channel_store import ChannelStore
from paceline.kv_transfer.communicator import OWNER_RANK, READER_RANK, Communicator, WriteGate
from paceline.kv_transfer.staged_communicator import (
    NUM_STAGING,
    StagedCommunicator,
    StagedCommunicators,
)

BLOCK_BYTES = 24
PROMPTLY_S = 1.0


class HeldTransfer:
    """Ends when the test says so."""

    def __init__(self, is_held: bool) -> None:
        self.may_end = not is_held
        self.error: RuntimeError | None = None

    def is_done(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.may_end


class HeldWire:
    """Records what is launched. What is named in `held` ends when the test lets it."""

    num_blocks = 2

    def __init__(self, held: Sequence[str] = ()) -> None:
        self.held = held
        self.log: list[str] = []
        self.launched: dict[str, HeldTransfer] = {}
        self.num_aborts = 0
        self.abort_may_return = threading.Event()
        self.abort_may_return.set()
        self.greet_may_return = threading.Event()
        self.greet_may_return.set()

    def greet(self) -> HeldTransfer:
        assert self.greet_may_return.wait(10.0)
        return self._launch("greet")

    def allocate(self, num_blocks: int) -> torch.Tensor:
        return torch.empty((num_blocks, BLOCK_BYTES), dtype=torch.uint8)

    def upload(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(ids)

    def send(self, blocks: torch.Tensor, ids: torch.Tensor, buffer: int) -> HeldTransfer:
        return self._launch(f"send {ids.tolist()} from {buffer}")

    def receive(self, num_blocks: int, buffer: int) -> HeldTransfer:
        return self._launch(f"receive {num_blocks} into {buffer}")

    def scatter(self, buffer: int, blocks: torch.Tensor, ids: torch.Tensor) -> HeldTransfer:
        return self._launch(f"scatter {buffer} to {ids.tolist()}")

    def abort(self) -> None:
        self.num_aborts += 1
        assert self.abort_may_return.wait(10.0)
        for name, transfer in list(self.launched.items()):
            if not name.startswith("scatter"):  # it is this side's own work
                transfer.may_end = True

    def let(self, name: str) -> None:
        """Wait until this is launched and let it end."""
        wait_until(lambda: name in self.log)
        self.launched[name].may_end = True

    def _launch(self, name: str) -> HeldTransfer:
        assert len([n for n, t in self.launched.items() if not t.may_end]) < NUM_STAGING + 1
        transfer = self.launched[name] = HeldTransfer(
            any(name.startswith(held) for held in self.held)
        )
        self.log.append(name)
        return transfer


class Call:
    """A call on a thread of its own, and what it raised."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.error: Exception | None = None
        self.result: object = None
        self._run = run
        self._thread = threading.Thread(target=self._call, daemon=True)
        self._thread.start()

    def _call(self) -> None:
        try:
            self.result = self._run()
        except (TransportError, RuntimeError) as error:
            self.error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def join(self, timeout_s: float = PROMPTLY_S) -> None:
        self._thread.join(timeout_s)
        assert not self.is_running, f"not back within {timeout_s} s"


def on_thread(name: str, run: Callable[[], None]) -> None:
    threading.Thread(target=run, name=name, daemon=True).start()


def make_communicator(*held: str) -> tuple[StagedCommunicator, HeldWire]:
    wire = HeldWire(held)
    return StagedCommunicator(wire, on_thread), wire


def receive(
    communicator: Communicator, count: int, gate: WriteGate | None = None, timeout_s: float = 10.0
) -> Call:
    blocks = torch.zeros((count, BLOCK_BYTES), dtype=torch.uint8)
    deadline = time.monotonic() + timeout_s
    return Call(
        lambda: communicator.receive_blocks(blocks, range(count), gate or WriteGate(), deadline)
    )


def send(communicator: Communicator, count: int, timeout_s: float = 10.0) -> Call:
    blocks = torch.zeros((count, BLOCK_BYTES), dtype=torch.uint8)
    deadline = time.monotonic() + timeout_s
    return Call(lambda: communicator.send_blocks(blocks, range(count), deadline))


def assert_failed(call: Call, reason: str) -> None:
    assert isinstance(call.error, TransportError | RuntimeError)
    assert reason in str(call.error)


def test_a_buffer_receives_again_only_after_its_blocks_are_in_place() -> None:
    communicator, wire = make_communicator("receive", "scatter")
    call = receive(communicator, 7)
    wait_until(lambda: wire.log == ["receive 2 into 0", "receive 2 into 1"])
    wire.let("receive 2 into 0")
    wait_until(lambda: wire.log[2:] == ["scatter 0 to [0, 1]"])
    time.sleep(0.01)
    assert len(wire.log) == 3
    wire.let("scatter 0 to [0, 1]")
    wait_until(lambda: wire.log[3:] == ["receive 2 into 0"])
    wire.let("receive 2 into 1")
    wire.let("scatter 1 to [2, 3]")
    wire.let("receive 1 into 1")
    wire.let("receive 2 into 0")
    wire.let("scatter 0 to [4, 5]")
    assert call.is_running
    wire.let("scatter 1 to [6]")
    call.join()
    assert call.error is None


def test_a_buffer_is_filled_again_only_after_it_was_sent() -> None:
    communicator, wire = make_communicator("send")
    call = send(communicator, 5)
    wait_until(lambda: wire.log == ["send [0, 1] from 0", "send [2, 3] from 1"])
    time.sleep(0.01)
    assert len(wire.log) == 2
    wire.let("send [0, 1] from 0")
    wire.let("send [4] from 0")
    assert call.is_running
    wire.let("send [2, 3] from 1")
    call.join()
    assert call.error is None


@pytest.mark.parametrize("transfer", [send, receive])
def test_a_transfer_that_never_ends_fails_at_the_deadline(
    transfer: Callable[..., Call],
) -> None:
    communicator, _ = make_communicator("send", "receive")
    started_s = time.monotonic()
    call = transfer(communicator, 1, timeout_s=0.2)
    call.join(1.0)
    assert 0.2 <= time.monotonic() - started_s < 1.0
    assert_failed(call, "a transfer has not ended after")


@pytest.mark.parametrize("transfer", [send, receive])
def test_an_abort_ends_a_stuck_transfer_at_once_though_the_library_hangs_in_it(
    transfer: Callable[..., Call],
) -> None:
    communicator, wire = make_communicator("send", "receive")
    wire.abort_may_return.clear()
    call = transfer(communicator, 5)
    wait_until(lambda: len(wire.log) == 2)
    started_s = time.monotonic()
    communicator.abort()
    communicator.abort()
    call.join()
    assert time.monotonic() - started_s < 0.5
    assert_failed(call, "given up")
    assert wire.num_aborts == 1
    wire.abort_may_return.set()


def test_what_an_abort_ends_is_not_taken_for_data() -> None:
    communicator, wire = make_communicator("receive")
    call = receive(communicator, 2)
    wait_until(lambda: len(wire.log) == 1)
    # As if it ended between the look at the transfer and the look at the abort.
    transfer = wire.launched["receive 2 into 0"]
    communicator.wait(HeldTransfer(is_held=False), time.monotonic() + 1.0)
    communicator.abort()
    transfer.may_end = True
    with pytest.raises(TransportError, match="aborted"):
        communicator.wait(transfer, time.monotonic() + 1.0)
    call.join()
    assert call.error is not None
    assert not any(name.startswith("scatter") for name in wire.log)


def test_an_aborted_communicator_launches_nothing_more() -> None:
    communicator, wire = make_communicator()
    communicator.abort()
    call = send(communicator, 2)
    call.join()
    assert_failed(call, "aborted")
    assert wire.log == []


def test_shutting_the_gate_waits_for_the_scatter_that_runs_and_lets_none_begin() -> None:
    communicator, wire = make_communicator("scatter")
    gate = WriteGate()
    call = receive(communicator, 6, gate)
    wait_until(lambda: "scatter 0 to [0, 1]" in wire.log)
    communicator.abort()  # must not end the wait for the scatter: it still writes
    shutting = Call(gate.shut)
    time.sleep(0.05)
    assert shutting.is_running
    assert call.is_running
    wire.let("scatter 0 to [0, 1]")
    shutting.join()
    call.join()
    assert call.error is not None
    assert [name for name in wire.log if name.startswith("scatter")] == ["scatter 0 to [0, 1]"]


def test_a_shut_gate_lets_no_scatter_begin() -> None:
    communicator, wire = make_communicator()
    gate = WriteGate()
    gate.shut()
    call = receive(communicator, 6, gate)
    call.join()
    assert_failed(call, "the connection was closed")
    assert not any(name.startswith("scatter") for name in wire.log)


def test_an_error_of_a_transfer_reaches_the_caller() -> None:
    communicator, wire = make_communicator("receive")
    call = receive(communicator, 3)
    wait_until(lambda: len(wire.log) == 2)
    wire.launched["receive 2 into 0"].error = RuntimeError("CUDA error: the card fell off the bus")
    call.join()
    assert_failed(call, "fell off the bus")


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
    monkeypatch.setattr("paceline.kv_transfer.staged_communicator.CLOSE_TIMEOUT_S", 0.1)
    wire = HeldWire()
    wire.abort_may_return.clear()
    factory = StagedCommunicators(lambda store, rank: wire)
    factory.connect(make_store(), OWNER_RANK, 5.0).abort()
    wait_until(lambda: wire.num_aborts == 1)
    factory.close()
    assert "event=kv_thread_hangs thread=kv-abort" in caplog.text
    wire.abort_may_return.set()


def join_stores() -> list[ChannelStore]:
    stores: list[ChannelStore] = []

    def send_to_second(key: str, value: bytes) -> None:
        stores[1].receive(key, value)

    stores.append(ChannelStore(send_to_second))
    stores.append(ChannelStore(stores[0].receive))
    for store in stores:
        store.expire_after(5.0)
    return stores


# Not a number of 8-byte words; one word; more than a staging buffer holds.
@pytest.mark.parametrize("block_bytes", [20, 8, 5 << 20])
def test_blocks_cross_a_device_wire_whole(block_bytes: int) -> None:
    factory = StagedCommunicators(make_silent_wire(block_bytes))
    stores = join_stores()
    connecting = [
        Call(lambda rank=rank: factory.connect(stores[rank], rank, 5.0)) for rank in range(2)
    ]
    for call in connecting:
        call.join(5.0)
    owner, reader = (call.result for call in connecting)
    assert isinstance(owner, StagedCommunicator)
    assert isinstance(reader, StagedCommunicator)
    there = torch.randint(256, (9, block_bytes), dtype=torch.uint8)
    here = torch.full((12, block_bytes), 255, dtype=torch.uint8)
    sources, targets = [8, 0, 3, 1, 4, 5, 7], [11, 2, 3, 0, 5, 6, 1]
    deadline = time.monotonic() + 10.0
    sending = Call(lambda: owner.send_blocks(there, sources, deadline))
    reader.receive_blocks(here, targets, WriteGate(), deadline)
    sending.join(5.0)
    assert torch.equal(here[targets], there[sources])
    assert bool((here[[4, 7, 8, 9, 10]] == 255).all())
    owner.abort()
    reader.abort()
    factory.close()
