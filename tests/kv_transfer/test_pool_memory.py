"""The memory of a CPU pool: who may map it, and when it goes."""

import mmap
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kv_peer import resources

from paceline.errors import TransportError
from paceline.kv_transfer.pool_memory import MemoryAddress, PeerMemory, PoolMemory

PAGE = mmap.PAGESIZE


def test_a_reader_sees_what_the_owner_writes() -> None:
    memory = PoolMemory.create(2 * PAGE, "owner-0.7")
    peer = PeerMemory.open(memory.address())
    memory.tensor[5] = 42
    assert peer.array[5] == 42
    peer.close()
    memory.close()


def test_nothing_is_left_after_both_have_closed() -> None:
    before = resources()
    memory = PoolMemory.create(PAGE, "owner-0.7")
    peer = PeerMemory.open(memory.address())
    assert resources().mappings == before.mappings + 2
    peer.close()
    memory.close()
    memory.close()
    peer.close()
    assert resources() == before


def test_the_mapping_lives_as_long_as_a_tensor_on_it() -> None:
    before = resources()
    memory = PoolMemory.create(PAGE, "owner-0.7")
    view = memory.tensor[10:20].view(2, 5)
    memory.close()
    view.fill_(3)
    assert int(view.sum()) == 30
    del view
    assert resources() == before


def test_a_reader_cannot_write() -> None:
    memory = PoolMemory.create(PAGE, "owner-0.7")
    peer = PeerMemory.open(memory.address())
    with pytest.raises(ValueError, match="read-only"):
        peer.array[0] = 1
    # Not even one that does not keep to the rules: the kernel refuses.
    fd = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDWR)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, PAGE)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)
    peer.close()
    memory.close()


def test_a_descriptor_that_is_in_use_again_is_refused() -> None:
    memory = PoolMemory.create(PAGE, "owner-0.7")
    address = memory.address()
    memory.close()
    with pytest.raises(TransportError, match=r"cannot open the memory of pool owner-0\.7"):
        PeerMemory.open(address)
    successor = PoolMemory.create(PAGE, "owner-0.8")
    with pytest.raises(TransportError, match="in use again"):
        PeerMemory.open(replace(address, fd=successor.fd))
    namesake = PoolMemory.create(PAGE, "owner-0.7")
    with pytest.raises(TransportError, match="belongs to another process"):
        PeerMemory.open(replace(address, fd=namesake.fd, inode=address.inode + 10**6))
    with pytest.raises(TransportError, match="belongs to another process"):
        PeerMemory.open(replace(namesake.address(), num_bytes=2 * PAGE))
    successor.close()
    namesake.close()


def test_memory_that_could_shrink_is_refused() -> None:
    fd = os.memfd_create("paceline-owner-0.7", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGE)
    memory = PoolMemory.create(PAGE, "owner-0.7")
    address = replace(memory.address(), fd=fd, inode=os.fstat(fd).st_ino)
    with pytest.raises(TransportError, match="not sealed"):
        PeerMemory.open(address)
    os.close(fd)
    memory.close()


def test_another_host_is_refused_with_what_to_change() -> None:
    memory = PoolMemory.create(PAGE, "owner-0.7")
    with pytest.raises(TransportError, match=r"another host.*kv\.transport"):
        PeerMemory.open(replace(memory.address(), host="elsewhere/pid:[1]"))
    memory.close()


def test_a_dead_owner_is_refused_and_a_mapping_outlives_its_owner() -> None:
    program = (
        "import sys; from paceline.kv_transfer.pool_memory import PoolMemory\n"
        "memory = PoolMemory.create(4096, 'owner-0.7'); memory.tensor.fill_(9)\n"
        "print(memory.address().encode().decode(), flush=True); sys.stdin.read()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        address = MemoryAddress.decode(owner.stdout.readline().encode())
        peer = PeerMemory.open(address)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert np.array_equal(peer.array, np.full(4096, 9, np.uint8))
        peer.close()
        with pytest.raises(TransportError, match="process has ended"):
            PeerMemory.open(address)


@pytest.mark.parametrize(
    "encoded", [b"", b"\xff", b"[]", b"7", b'{"pid": 1}', b'{"pid": "x"}', b"x" * 1000]
)
def test_a_damaged_address_is_refused(encoded: bytes) -> None:
    with pytest.raises(TransportError, match="not the address"):
        MemoryAddress.decode(encoded)


def test_an_address_with_a_wrong_number_is_refused() -> None:
    memory = PoolMemory.create(PAGE, "owner-0.7")
    with pytest.raises(TransportError, match="wrong number"):
        MemoryAddress.decode(replace(memory.address(), num_bytes=-1).encode())
    memory.close()


@pytest.mark.parametrize(("num_bytes", "name"), [(0, "a.1"), (PAGE, ""), (PAGE, "n" * 300)])
def test_impossible_memory_is_refused(num_bytes: int, name: str) -> None:
    with pytest.raises(ValueError, match="not possible"):
        PoolMemory.create(num_bytes, name)


def test_memory_starts_zeroed_and_has_its_owners_name() -> None:
    memory = PoolMemory.create(3 * PAGE, "prefill-0.7")
    assert memory.tensor.dtype is torch.uint8
    assert not memory.tensor.any()
    assert "paceline-prefill-0.7" in str(Path(f"/proc/self/fd/{memory.fd}").readlink())
    memory.close()
    with pytest.raises(ValueError, match="closed"):
        _ = memory.tensor
