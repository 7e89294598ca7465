"""Blocks and buffers of a wire between devices, on CPUs."""

import gc
import time
import weakref

import pytest
import torch
from held_wire import Call
from kv_peer import wait_until
from silent_group import make_silent_wire

from paceline.errors import TransportError
from paceline.kv_transfer.channel_store import ChannelStore
from paceline.kv_transfer.communicator import READER_RANK, WriteGate
from paceline.kv_transfer.device_wire import DeviceWire
from paceline.kv_transfer.staged_communicator import StagedCommunicator
from paceline.kv_transfer.staged_connect import StagedCommunicators


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


class StuckWork:
    def __init__(self, is_done: bool) -> None:
        self._is_done = is_done

    def is_completed(self) -> bool:
        return self._is_done

    def wait(self) -> bool:
        return True


class StuckGroup:
    """Nothing but the greeting ever ends, and its abort may fail."""

    def __init__(self, abort_error: str | None) -> None:
        self._abort_error = abort_error
        self._num_launched = 0
        self.num_aborts = 0

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> StuckWork:
        self._num_launched += 1
        return StuckWork(self._num_launched == 1)

    def abort(self) -> None:
        self.num_aborts += 1
        if self._abort_error is not None:
            raise RuntimeError(self._abort_error)


@pytest.mark.parametrize("abort_error", [None, "ProcessGroup abort timed out"])
def test_buffers_to_which_a_receive_may_still_write_are_kept_for_ever(
    abort_error: str | None,
) -> None:
    group = StuckGroup(abort_error)
    buffers: list[weakref.ref[torch.UntypedStorage]] = []

    def make(store: ChannelStore, rank: int) -> DeviceWire:
        wire = DeviceWire(group, None, rank, torch.device("cpu"), 4096)
        buffers.extend(weakref.ref(staging.untyped_storage()) for staging in wire._staging)
        return wire

    factory = StagedCommunicators(make)
    communicator = factory.connect(ChannelStore(lambda key, value: None), READER_RANK, 5.0)
    blocks = torch.zeros((2, 4096), dtype=torch.uint8)
    with pytest.raises(TransportError, match="has not ended"):
        communicator.receive_blocks(blocks, range(2), WriteGate(), time.monotonic() + 0.1)
    communicator.abort()
    wait_until(lambda: group.num_aborts == 1)
    factory.close()
    del communicator
    gc.collect()
    assert all((buffer() is not None) == (abort_error is not None) for buffer in buffers)
