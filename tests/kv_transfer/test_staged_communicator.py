"""Deadlines, aborts, the gate and the two buffers, over a wire that the test holds in its hands."""

import time
from collections.abc import Callable

import pytest
import torch
from held_wire import BLOCK_BYTES, Call, HeldTransfer, HeldWire, assert_failed, on_thread
from kv_peer import wait_until

from paceline.errors import TransportError
from paceline.kv_transfer.communicator import Communicator, WriteGate
from paceline.kv_transfer.staged_communicator import StagedCommunicator


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
    wait_until(lambda: wire.num_aborts > 0)
    wire.abort_may_return.set()
    time.sleep(0.01)
    assert wire.num_aborts == 1


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


@pytest.mark.parametrize("transfer", [send, receive])
def test_the_library_is_not_told_of_an_abort_while_a_launch_runs(
    transfer: Callable[..., Call],
) -> None:
    communicator, wire = make_communicator()
    wire.launch_may_return.clear()
    call = transfer(communicator, 5)
    wait_until(lambda: wire.num_launching == 1)
    communicator.abort()
    time.sleep(0.05)
    assert wire.num_aborts == 0
    wire.launch_may_return.set()
    call.join()
    wait_until(lambda: wire.num_aborts == 1)
    assert wire.num_launching_at_abort == 0
    assert len(wire.log) == 1


def test_a_launch_that_hangs_is_aborted_after_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("paceline.kv_transfer.staged_communicator.LAUNCH_TIMEOUT_S", 0.1)
    communicator, wire = make_communicator()
    wire.launch_may_return.clear()
    call = receive(communicator, 2)
    wait_until(lambda: wire.num_launching == 1)
    communicator.abort()
    wait_until(lambda: wire.num_aborts == 1)
    assert "event=kv_launch_hangs" in caplog.text
    wire.launch_may_return.set()
    call.join()


def test_blocks_are_not_given_back_while_a_scatter_may_still_write_to_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("paceline.kv_transfer.staged_communicator.LONG_COPY_S", 0.02)
    communicator, wire = make_communicator("scatter")
    call = receive(communicator, 2, timeout_s=0.1)
    wait_until(lambda: caplog.text.count("event=kv_copy_hangs") >= 10)
    assert call.is_running
    wire.let("scatter 0 to [0, 1]")
    call.join()
    assert call.error is None


def test_a_broken_device_ends_the_wait_for_a_scatter() -> None:
    communicator, wire = make_communicator("scatter")
    call = receive(communicator, 2)
    wait_until(lambda: "scatter 0 to [0, 1]" in wire.log)
    wire.launched["scatter 0 to [0, 1]"].error = RuntimeError("CUDA error: an illegal access")
    call.join()
    assert_failed(call, "illegal access")
