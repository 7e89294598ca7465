"""What every transport promises; the owner, or the reader, is a real second process."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kv_peer import (
    AUTO,
    DEADLINE_S,
    GLOO,
    LEASE,
    NO_LEASE,
    SHM,
    STAGED,
    Kind,
    Link,
    OwnerProcess,
    OwnerSpec,
    ReaderProcess,
    Resources,
    Worker,
    expected_blocks,
    resources,
    wait_ended,
    wait_until,
)

from paceline.kv_transfer.transport import ReadHandle, ReadOutcome, ReadState


def why_no_nccl() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if torch.cuda.device_count() == 1 and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        return "needs two GPUs, or NCCL 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1"
    return ""


NCCL = pytest.param(
    Kind("torch_distributed", "cuda:0", f"cuda:{int(torch.cuda.device_count() > 1)}"),
    marks=[pytest.mark.gpu, pytest.mark.skipif(bool(why_no_nccl()), reason=why_no_nccl())],
    id="nccl",
)
NUM_BLOCKS = 64
MIB_BLOCKS = 1024  # a block of 1 MiB, so that 64 of them take a while


def make_reader(kind: Kind, block_kib: int = 4, read_timeout_s: float = DEADLINE_S) -> Worker:
    return Worker(
        kind.transport, "reader-0.1", NUM_BLOCKS, block_kib, read_timeout_s, device=kind.device
    )


class Pair:
    """A reader here and an owner there."""

    def __init__(
        self,
        kind: Kind,
        *,
        reader: Worker,
        incarnation: int = 7,
        block_kib: int = 4,
        is_deaf: bool = False,
    ) -> None:
        self.kind = kind
        self.reader = reader
        self.spec = OwnerSpec(
            kind.transport,
            f"owner-0.{incarnation}",
            salt=incarnation,
            num_blocks=NUM_BLOCKS,
            block_kib=block_kib,
            read_timeout_s=DEADLINE_S,
            device=kind.peer_device,
        )
        self.owner = OwnerProcess(self.spec)
        self.link = Link(reader, self.owner, is_deaf)

    def read(self, sources: list[int], targets: list[int], lease: int = LEASE) -> ReadOutcome:
        return wait_ended(self.link.connection.read(lease, sources, targets))

    def expected(self) -> torch.Tensor:
        block_bytes = self.reader.pool.layout.block_bytes
        return expected_blocks(self.spec.salt, self.spec.num_blocks, block_bytes)

    def close(self) -> None:
        self.link.close()
        self.owner.close()


# The last one lives until the module ends: one whose reads have no thread of their own.
@pytest.fixture(scope="module", params=[GLOO, STAGED, NCCL, SHM, AUTO], ids=lambda kind: kind.name)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    reader = make_reader(request.param)
    made = Pair(request.param, reader=reader)
    yield made
    made.close()
    reader.close()


@pytest.fixture(params=[SHM, GLOO, STAGED, NCCL], ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    made: Kind = request.param
    return made


def wait_for_resources(kind: Kind, expected: Resources) -> None:
    end = time.monotonic() + DEADLINE_S
    while resources() != expected and time.monotonic() < end:
        if kind.device != "cpu" and resources().threads == expected.threads:
            return  # CUDA and NCCL keep files for the process
        time.sleep(0.002)
    assert resources() == expected


def test_every_block_arrives_with_its_own_bytes(pair: Pair) -> None:
    pair.reader.paint(0)
    outcome = pair.read(list(range(NUM_BLOCKS)), list(reversed(range(NUM_BLOCKS))))
    assert outcome.state is ReadState.DONE, outcome.error
    assert outcome.num_bytes == NUM_BLOCKS * pair.reader.pool.layout.block_bytes
    assert torch.equal(pair.reader.read_back().flip(0), pair.expected())


def test_a_scattered_read_touches_its_targets_only(pair: Pair) -> None:
    pair.reader.paint(255)
    sources, targets = [9, 10, 11, 3, 60, 0], [20, 21, 22, 63, 5, 6]
    assert pair.read(sources, targets).state is ReadState.DONE
    assert torch.equal(pair.reader.read_back()[targets], pair.expected()[sources])
    others = [block for block in range(NUM_BLOCKS) if block not in targets]
    assert bool((pair.reader.read_back()[others] == 255).all())


def test_many_reads_at_once_all_arrive(pair: Pair) -> None:
    pair.reader.paint(0)
    handles = [
        pair.link.connection.read(LEASE, [(5 * number) % NUM_BLOCKS], [number])
        for number in range(NUM_BLOCKS)
    ]
    assert {wait_ended(handle).state for handle in handles} == {ReadState.DONE}
    order = [(5 * number) % NUM_BLOCKS for number in range(NUM_BLOCKS)]
    assert torch.equal(pair.reader.read_back(), pair.expected()[order])


@pytest.mark.parametrize(
    ("sources", "targets", "reason"),
    [
        ([NUM_BLOCKS], [0], "source block 64"),
        ([-1], [0], "source block -1"),
        ([0], [NUM_BLOCKS], "target block 64"),
        ([0], [-1], "target block -1"),
        ([0, 1], [0], "2 source blocks"),
        ([0, 1], [4, 4], "named twice"),
    ],
)
def test_wrong_block_ids_fail_the_read_and_nothing_else(
    pair: Pair, sources: list[int], targets: list[int], reason: str
) -> None:
    pair.reader.paint(255)
    outcome = pair.read(sources, targets)
    assert outcome.state is ReadState.FAILED
    assert reason in outcome.error
    assert bool((pair.reader.read_back() == 255).all())
    assert pair.read([1], [1]).state is ReadState.DONE


def test_an_owner_that_says_no_fails_the_read_and_nothing_else(pair: Pair) -> None:
    if pair.kind.transport in {"shm", "auto"}:
        pytest.skip("shm is one-sided: the owner's only word is its verdict on the confirmation")
    handles = [
        pair.link.connection.read(lease, [2], [number])
        for number, lease in enumerate([LEASE, NO_LEASE, LEASE])
    ]
    outcomes = [wait_ended(handle) for handle in handles]
    assert [outcome.state is ReadState.DONE for outcome in outcomes] == [True, False, True]
    assert "lease 0x4d is over or does not cover" in outcomes[1].error


def test_a_late_callback_is_called_at_once_with_the_times(pair: Pair) -> None:
    before = time.time()
    handle = pair.link.connection.read(LEASE, [1, 2], [3, 4])
    outcome = wait_ended(handle)
    late: list[ReadOutcome] = []
    handle.add_done_callback(late.append)
    assert late == [outcome]
    assert handle.state is ReadState.DONE
    assert before <= outcome.started_s <= outcome.ended_s <= time.time()


def test_a_read_of_nothing_is_done(pair: Pair) -> None:
    assert pair.read([], []).state is ReadState.DONE


def test_a_probe_moves_bytes_and_leaves_the_pool_alone(pair: Pair) -> None:
    pair.reader.paint(255)
    outcome = wait_ended(pair.link.connection.probe(64 << 10))
    assert (outcome.state, outcome.num_bytes) == (ReadState.DONE, 64 << 10), outcome.error
    assert bool((pair.reader.read_back() == 255).all())


def test_reads_end_within_two_seconds_when_their_owner_is_killed(kind: Kind) -> None:
    before = resources()
    kill_owner_during_reads(kind)
    wait_for_resources(kind, before)


def receiving_threads() -> list[str]:
    return [name for name in resources().threads if "recv" in name]


def begin_reads(pair: Pair, minimum: int) -> list[ReadHandle]:
    """Start reads, of which the first has begun to arrive and the last has not; they wait in line.

    On GPUs they are so many because each is so quick.
    """
    assert pair.read([0], [0]).state is ReadState.DONE
    pair.reader.paint(0)
    everything = list(range(NUM_BLOCKS))
    handles = [
        pair.link.connection.read(LEASE, everything, everything)
        for _ in range(minimum if pair.kind.device == "cpu" else 100)
    ]
    wait_until(lambda: bool(pair.reader.blocks[0].any()))
    return handles


def kill_owner_during_reads(kind: Kind) -> None:
    others = receiving_threads()  # of the module's pair
    reader = make_reader(kind, MIB_BLOCKS)
    num_mappings = resources().mappings
    pair = Pair(kind, reader=reader, block_kib=MIB_BLOCKS)
    handles = begin_reads(pair, 2)
    pair.owner.kill()
    killed_s = time.monotonic()
    outcomes = [wait_ended(handle) for handle in handles]
    assert time.monotonic() - killed_s < 2.0
    for outcome in outcomes:
        assert outcome.state is ReadState.FAILED or torch.equal(reader.read_back(), pair.expected())
    pair.close()
    assert resources().mappings == num_mappings
    wait_until(lambda: receiving_threads() == others)
    reader.close()


def test_a_reader_meets_the_replacement_of_an_owner_that_was_killed(kind: Kind) -> None:
    reader = make_reader(kind)
    first = Pair(kind, reader=reader)
    assert first.read([1], [1]).state is ReadState.DONE
    first.owner.kill()
    second = Pair(kind, incarnation=8, reader=reader)
    first.close()
    assert second.read([1, 2], [3, 4]).state is ReadState.DONE
    assert torch.equal(reader.read_back()[[3, 4]], second.expected()[[1, 2]])
    second.close()
    reader.close()


def test_an_owner_frees_what_a_killed_reader_held(kind: Kind) -> None:
    owner = Worker(
        kind.transport, "owner-0.3", NUM_BLOCKS, MIB_BLOCKS, DEADLINE_S, device=kind.device
    )
    before = resources()
    reader = ReaderProcess(kind, owner, "owner-0.3")
    peer = owner.transport.accept("reader-0.1", reader.session, lambda lease, blocks: True)
    delivering = threading.Thread(target=reader.session.deliver_to, args=(peer,))
    delivering.start()
    assert reader.started.wait(60)
    reader.kill()
    delivering.join(2.0)
    assert not delivering.is_alive()
    wait_until(lambda: resources().threads == before.threads, 2.0)
    owner.transport.close()
    wait_for_resources(kind, before)
    owner.close()


def test_close_ends_running_reads_and_nothing_is_written_after_it(kind: Kind) -> None:
    others = receiving_threads()  # of the module's pair
    reader = make_reader(kind, MIB_BLOCKS)
    pair = Pair(kind, reader=reader, block_kib=MIB_BLOCKS)
    handles = begin_reads(pair, 3)
    started_s = time.monotonic()
    pair.link.connection.close()
    assert time.monotonic() - started_s < 0.5
    reader.paint(255)
    assert [handle.state for handle in handles].count(ReadState.RUNNING) == 0
    assert handles[-1].state is ReadState.FAILED
    late = pair.link.connection.read(LEASE, [0], [0])
    assert wait_ended(late).error == "the connection is closed"
    wait_until(lambda: receiving_threads() == others, 2.0)
    assert bool((reader.read_back() == 255).all())
    pair.close()
    reader.close()


def test_a_stopped_owner_fails_reads_at_the_time_out_and_serves_again_after(kind: Kind) -> None:
    # The first read makes the pair within this time.
    timeout_s = 0.6 if kind.device == "cpu" else 10.0
    reader = make_reader(kind, read_timeout_s=timeout_s)
    pair = Pair(kind, reader=reader)
    assert pair.read([0], [0]).state is ReadState.DONE
    os.kill(pair.owner.pid, signal.SIGSTOP)
    try:
        # The signal has not stopped every thread of a busy host's process when `kill` returns.
        wait_until(lambda: has_stopped(pair.owner.pid))
        handles = [pair.link.connection.read(LEASE, [1], [number]) for number in range(3)]
        outcomes = [wait_ended(handle, 2 * timeout_s + 1.4) for handle in handles]
    finally:
        os.kill(pair.owner.pid, signal.SIGCONT)
    expected = ReadState.DONE if kind is SHM else ReadState.FAILED
    assert {outcome.state for outcome in outcomes} == {expected}
    if expected is ReadState.FAILED:
        # The first takes the communicator with it; the others get one more try.
        for outcome, num_tries in zip(outcomes, (1, 2, 2), strict=True):
            time_s = outcome.ended_s - outcome.started_s
            assert num_tries * timeout_s - 0.1 < time_s < num_tries * timeout_s + 0.4
        assert "kv.read_timeout_s" in outcomes[0].error
    wait_until(lambda: pair.read([5], [6]).state is ReadState.DONE)
    assert torch.equal(reader.read_back()[6], pair.expected()[5])
    pair.close()
    reader.close()


def has_stopped(pid: int) -> bool:
    return all("\nState:\tT" in f.read_text() for f in Path(f"/proc/{pid}/task").glob("*/status"))


@pytest.mark.parametrize("kind", [STAGED, NCCL], ids=lambda kind: kind.name)
def test_a_death_that_no_session_tells_of_fails_the_read_at_the_time_out(kind: Kind) -> None:
    timeout_s = 1.0 if kind.device == "cpu" else 10.0
    reader = make_reader(kind, MIB_BLOCKS, timeout_s)
    pair = Pair(kind, reader=reader, block_kib=MIB_BLOCKS, is_deaf=True)
    handles = begin_reads(pair, 2)
    pair.owner.kill()
    outcomes = [wait_ended(handle, 2 * timeout_s + 1.0) for handle in handles]
    assert outcomes[-1].state is ReadState.FAILED
    assert "kv.read_timeout_s" in outcomes[-1].error
    pair.close()
    second = Pair(kind, incarnation=8, reader=reader, block_kib=MIB_BLOCKS)
    assert second.read([1, 2], [3, 4]).state is ReadState.DONE
    assert torch.equal(reader.read_back()[[3, 4]], second.expected()[[1, 2]])
    second.close()
    reader.close()


@pytest.mark.parametrize("kind", [NCCL])
def test_a_read_does_not_wait_for_the_stream_of_the_engine(kind: Kind) -> None:
    reader = make_reader(kind)
    pair = Pair(kind, reader=reader)
    assert pair.read([0], [0]).state is ReadState.DONE
    with torch.cuda.device(reader.blocks.device):
        torch.cuda._sleep(6_000_000_000)  # cycles, about 3 s
        busy = torch.cuda.Event()
        busy.record()
    assert pair.read([1, 2], [3, 4]).state is ReadState.DONE
    assert not busy.query()
    assert torch.equal(reader.read_back()[[3, 4]], pair.expected()[[1, 2]])
    pair.close()
    reader.close()
