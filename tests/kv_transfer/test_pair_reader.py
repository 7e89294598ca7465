"""What the reader's end says to its owner, and in what order, over communicators of the test's."""

import threading
import time
from collections.abc import Callable, Sequence

import pytest
import torch
from kv_peer import LEASE, wait_ended, wait_until

from paceline.errors import TransportError
from paceline.kv_layout import attention_layout
from paceline.kv_transfer.channel_store import ChannelStore
from paceline.kv_transfer.communicator import WriteGate
from paceline.kv_transfer.pair_messages import Ask, Drop, Go, No, PairMessage, decode, encode
from paceline.kv_transfer.pair_reader import PairReader
from paceline.kv_transfer.transport import LocalPool, ReadState


class FakeOwner:
    """Says Go to every ask, over communicators of its own; keeps a log of what came in order."""

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.log: list[PairMessage | str] = []
        self.connect_error: str | None = None
        self.num_connects = 0
        self.before_connect: Callable[[], object] = lambda: None
        self.is_stuck = False
        self.is_silent = False
        self.receive: Callable[[int, float], object] = lambda number, deadline: None
        """Called for each receive, numbered from 1."""
        self.num_receives = 0
        self.no: str | None = None
        """What it says right after each Go."""
        self._generation = 1
        layout = attention_layout(
            num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=16, dtype="float32"
        )
        blocks = torch.zeros((8, layout.block_bytes), dtype=torch.uint8)
        pool = LocalPool("reader-0", 1, layout, 8, blocks)
        self.reader = PairReader("owner-0.1", 8, pool, self, self, timeout_s)

    def send(self, payload: bytes) -> None:
        message = decode(payload)
        self.log.append(message)
        if isinstance(message, Drop):
            self._generation += 1
        elif isinstance(message, Ask) and not self.is_silent:
            # As the io thread: not within the reader's call.
            threading.Thread(target=self._answer, args=(message.seq,), daemon=True).start()

    def _answer(self, seq: int) -> None:
        self.reader.on_message(encode(Go(seq, self._generation)))
        if self.no is not None:
            self._generation += 1
            self.reader.on_message(encode(No(seq, self.no)))

    def connect(self, store: ChannelStore, rank: int, timeout_s: float) -> "FakeCommunicator":
        self.num_connects += 1
        self.before_connect()
        if self.no is not None:
            wait_until(lambda: store.is_closed)
        if self.connect_error is not None:
            raise TransportError(self.connect_error)
        return FakeCommunicator(self)

    def close(self) -> None:
        self.reader.close()
        assert self.reader.end.join(2.0)


class FakeCommunicator:
    def __init__(self, owner: FakeOwner) -> None:
        self._owner = owner
        self._aborted = threading.Event()

    def scratch(self, num_blocks: int) -> torch.Tensor:
        return torch.empty((num_blocks, 8), dtype=torch.uint8)

    def send_blocks(self, blocks: torch.Tensor, ids: Sequence[int], deadline: float) -> None:
        raise AssertionError

    def receive_blocks(
        self, blocks: torch.Tensor, ids: Sequence[int], gate: WriteGate, deadline: float
    ) -> None:
        self._owner.num_receives += 1
        self._owner.receive(self._owner.num_receives, deadline)
        if not self._owner.is_stuck:
            return
        self._owner.log.append("stuck")
        if not self._aborted.wait(0.1):
            raise TransportError("a transfer has not ended")
        raise TransportError("the communicator was aborted")

    def abort(self) -> None:
        self._aborted.set()
        self._owner.log.append("abort")


@pytest.mark.parametrize("end", ["give up", "close"])
def test_the_owner_is_told_before_the_communicator_is_aborted(end: str) -> None:
    owner = FakeOwner()
    owner.is_stuck = True
    read = owner.reader.read(LEASE, [1], [2])
    wait_until(lambda: "stuck" in owner.log)
    if end == "close":
        owner.reader.close()
    assert wait_ended(read).state is ReadState.FAILED
    wait_until(lambda: "abort" in owner.log)
    assert owner.log[1:4] == ["stuck", Drop(1), "abort"]
    owner.close()


def test_connects_that_fail_three_times_are_held_back(caplog: pytest.LogCaptureFixture) -> None:
    owner = FakeOwner()
    owner.connect_error = "Duplicate GPU detected"
    outcomes = [wait_ended(owner.reader.read(LEASE, [1], [2])) for _ in range(20)]
    assert owner.num_connects == 3
    assert {outcome.state for outcome in outcomes} == {ReadState.FAILED}
    assert all("Duplicate GPU detected" in outcome.error for outcome in outcomes)
    assert "the last 3 connects to owner-0.1 failed" in outcomes[-1].error
    assert caplog.text.count("event=kv_pair_cannot_connect") == 1
    owner.close()


def test_reads_come_again_after_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.kv_transfer.connect_backoff.MIN_PAUSE_S", 0.05)
    owner = FakeOwner()
    owner.connect_error = "Duplicate GPU detected"
    for _ in range(3):
        wait_ended(owner.reader.read(LEASE, [1], [2]))
    owner.connect_error = None
    wait_until(lambda: wait_ended(owner.reader.read(LEASE, [1], [2])).state is ReadState.DONE)
    assert owner.num_connects == 4
    owner.close()


def test_reads_in_line_behind_a_failed_connect_fail_with_it() -> None:
    owner = FakeOwner()
    owner.connect_error = "Duplicate GPU detected"
    for _ in range(2):
        wait_ended(owner.reader.read(LEASE, [1], [2]))
    connecting = threading.Event()
    owner.before_connect = connecting.wait
    reads = [owner.reader.read(LEASE, [1], [2]) for _ in range(5)]
    connecting.set()
    assert {wait_ended(read).state for read in reads} == {ReadState.FAILED}
    assert owner.num_connects == 3
    assert owner.log[-1] == Drop(7)
    owner.close()


def test_connects_that_fail_on_the_owner_are_held_back_too() -> None:
    owner = FakeOwner()
    owner.no = "8 connects to peers hang"
    owner.connect_error = "the owner has given up"
    outcomes = [wait_ended(owner.reader.read(LEASE, [1], [2])) for _ in range(20)]
    assert len([message for message in owner.log if isinstance(message, Ask)]) == 3
    assert all("8 connects to peers hang" in outcome.error for outcome in outcomes[2:])
    owner.close()


def test_transfers_that_fail_are_not_taken_for_failed_connects() -> None:
    owner = FakeOwner()
    owner.is_stuck = True
    outcomes = [wait_ended(owner.reader.read(LEASE, [1], [2])) for _ in range(5)]
    assert {outcome.state for outcome in outcomes} == {ReadState.FAILED}
    assert owner.num_connects == 5
    owner.close()


def fail_first(number: int, deadline: float) -> None:
    if number == 1:
        raise TransportError("connection reset by peer")


def late_first(number: int, deadline: float) -> None:
    if number == 1:
        threading.Event().wait(deadline - time.monotonic())
        raise TransportError("a transfer has not ended")


def receive_slowly(number: int, deadline: float) -> None:
    threading.Event().wait(0.15)
    if time.monotonic() > deadline:
        raise TransportError("a transfer has not ended")


@pytest.mark.parametrize("receive", [fail_first, late_first])
def test_a_read_that_breaks_the_communicator_does_not_cost_those_behind_it(
    receive: Callable[[int, float], None],
) -> None:
    owner = FakeOwner(timeout_s=0.3)
    owner.receive = receive
    connecting = threading.Event()
    owner.before_connect = connecting.wait
    reads = [owner.reader.read(LEASE, [1], [2]) for _ in range(4)]
    connecting.set()
    states = [wait_ended(read).state for read in reads]
    assert states == [ReadState.FAILED] + [ReadState.DONE] * 3
    assert owner.num_connects == 2
    asked = [m.seq for m in owner.log if isinstance(m, Ask)]
    assert asked == [1, 2, 3, 4, 5, 6, 7], "those behind it are asked for again after the drop"
    assert owner.log.index(Drop(4)) == 4 + owner.log[:4].count("abort")
    owner.close()


def test_the_time_that_a_read_waits_for_those_before_it_does_not_count() -> None:
    owner = FakeOwner(timeout_s=0.3)
    owner.receive = receive_slowly
    reads = [owner.reader.read(LEASE, [1], [2]) for _ in range(5)]
    outcomes = [wait_ended(read) for read in reads]
    assert {outcome.state for outcome in outcomes} == {ReadState.DONE}
    assert outcomes[-1].ended_s - outcomes[-1].started_s > 2 * 0.3
    owner.close()


def test_an_owner_that_says_nothing_fails_every_read_within_two_tries() -> None:
    owner = FakeOwner(timeout_s=0.2)
    owner.is_silent = True
    reads = [owner.reader.read(LEASE, [1], [2]) for _ in range(20)]
    outcomes = [wait_ended(read) for read in reads]
    times_s = [outcome.ended_s - outcome.started_s for outcome in outcomes]
    assert 0.15 < times_s[0] < 0.35
    assert max(times_s) < 0.6
    assert all("kv.read_timeout_s" in outcome.error for outcome in outcomes)
    owner.close()
