"""What is special to shared memory; the rest is in test_transport_contract."""

import pytest
import torch
from kv_peer import LEASE, LocalSession, Worker, resources, wait_ended

from paceline.errors import TransportError
from paceline.kv_transfer.shm import MAX_COPY_BYTES, ShmTransport
from paceline.kv_transfer.transport import LocalPool, ReadState


def test_two_workers_of_one_process_can_read_from_each_other() -> None:
    before = resources()
    first, second = Worker("shm", "first-0.1"), Worker("shm", "second-0.2")
    first.fill(1)
    session = LocalSession()
    connection = second.transport.connect(
        "first-0.1", 1, first.transport.endpoint(), session.reader
    )
    assert wait_ended(connection.read(LEASE, [3], [4])).state is ReadState.DONE
    assert torch.equal(second.blocks[4], first.blocks[3])
    # No message was needed.
    assert session.reader.num_sent == 0
    del connection
    session.close()
    first.close()
    second.close()
    assert resources() == before


def test_the_endpoint_of_another_incarnation_is_refused() -> None:
    owner, reader = Worker("shm", "owner-0.7"), Worker("shm", "reader-0.1")
    session = LocalSession()
    with pytest.raises(TransportError, match=r"names the memory of owner-0\.7"):
        reader.transport.connect("owner-0.8", 8, owner.transport.endpoint(), session.reader)
    session.close()
    owner.close()
    reader.close()


def test_blocks_outside_the_shared_memory_are_refused() -> None:
    worker = Worker("shm", "owner-0.7")
    pool = worker.pool
    private = LocalPool("owner-0", 7, pool.layout, pool.num_blocks, torch.zeros_like(pool.blocks))
    with pytest.raises(ValueError, match="do not start where"):
        ShmTransport(private, worker.memory, 1.0)
    del private, pool
    worker.close()


def test_a_block_larger_than_a_piece_is_copied_whole() -> None:
    block_kib = 2 * MAX_COPY_BYTES >> 10
    owner = Worker("shm", "owner-0.7", 2, block_kib)
    reader = Worker("shm", "reader-0.1", 2, block_kib)
    owner.fill(5)
    session = LocalSession()
    connection = reader.transport.connect(
        "owner-0.7", 7, owner.transport.endpoint(), session.reader
    )
    assert wait_ended(connection.read(LEASE, [0, 1], [1, 0])).state is ReadState.DONE
    assert torch.equal(reader.blocks.flip(0), owner.blocks)
    session.close()
    owner.close()
    reader.close()


def test_a_read_that_starts_too_late_fails_and_writes_nothing() -> None:
    owner = Worker("shm", "owner-0.7")
    reader = Worker("shm", "reader-0.1", read_timeout_s=1e-9)
    owner.fill(5)
    session = LocalSession()
    connection = reader.transport.connect(
        "owner-0.7", 7, owner.transport.endpoint(), session.reader
    )
    outcome = wait_ended(connection.read(LEASE, [0], [0]))
    assert outcome.state is ReadState.FAILED
    assert "kv.read_timeout_s" in outcome.error
    assert not reader.blocks.any()
    session.close()
    owner.close()
    reader.close()
