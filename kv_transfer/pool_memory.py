"""Memory of a CPU pool: written by its owner, mapped read-only by other processes of the host.

It is anonymous (`memfd_create`), so that it goes with the last process that holds it, however that
process ends; named shared memory would outlive a kill -9. A reader reaches it through the owner's
`/proc/<pid>/fd/<fd>`. The kernel holds the single-writer rule: the file is sealed against new
writable mappings, and against shrinking, which would crash whoever has it mapped.
"""

import fcntl
import json
import mmap
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from paceline.errors import TransportError

# Linux 5.1; Python's fcntl does not have it before 3.13.
F_SEAL_FUTURE_WRITE = 0x10
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
MAX_NAME_BYTES = 249 - len("paceline-")

ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class MemoryAddress:
    """Where processes of the host find a pool's memory, and how they know that it is right."""

    host: str
    pid: int
    fd: int
    inode: int
    num_bytes: int
    name: str

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, encoded: bytes) -> "MemoryAddress":
        """Raise TransportError when the bytes are not an encoded address."""
        try:
            fields = json.loads(encoded)
            address = cls(**fields)
        except (ValueError, TypeError) as error:
            raise TransportError(
                f"the endpoint {encoded[:80]!r} is not the address of a pool's memory ({error}); "
                "the owner runs another version of paceline or another transport"
            ) from error
        numbers = (address.pid, address.fd, address.inode, address.num_bytes)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise TransportError(f"the address of a pool's memory has a wrong number: {address}")
        return address


def host_identity() -> str:
    """Name the boot and the process namespace: where these are equal, process ids mean the same."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"


class PoolMemory:
    """The owner's side. Built by `create`; the caller closes it."""

    def __init__(self, fd: int, mapping: mmap.mmap, name: str) -> None:
        self.fd = fd
        self.name = name
        self.num_bytes = len(mapping)
        self._mapping = mapping
        self._tensor: torch.Tensor | None = torch.from_numpy(np.frombuffer(mapping, np.uint8))

    @classmethod
    def create(cls, num_bytes: int, name: str) -> "PoolMemory":
        """Reserve zeroed memory; pages are taken from the host when they are first touched.

        `name` is `worker_id.incarnation`: readers check it, so that a process id that was used
        again never passes for the owner.
        """
        if num_bytes < 1 or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise ValueError(f"a pool of {num_bytes} bytes named {name!r} is not possible")
        fd = os.memfd_create(f"paceline-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_bytes)
            mapping = mmap.mmap(fd, num_bytes)
            # After our own mapping, which stays writable.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SIZE_SEALS | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, mapping, name)

    @property
    def tensor(self) -> torch.Tensor:
        """The memory as uint8 [num_bytes]."""
        if self._tensor is None:
            raise ValueError(f"the memory of pool {self.name} is closed")
        return self._tensor

    def address(self) -> MemoryAddress:
        """Say where readers find this memory while it is open."""
        if self._tensor is None:
            raise ValueError(f"the memory of pool {self.name} is closed")
        return MemoryAddress(
            host=host_identity(),
            pid=os.getpid(),
            fd=self.fd,
            inode=os.fstat(self.fd).st_ino,
            num_bytes=self.num_bytes,
            name=self.name,
        )

    def close(self) -> None:
        """Admit no new reader, and unmap; while tensors on the memory live, their end unmaps it."""
        if self._tensor is None:
            return
        self._tensor = None
        os.close(self.fd)
        try:
            self._mapping.close()
        except BufferError:
            # Tensors of the engine still view it. Each of them holds the mapping.
            del self._mapping


class PeerMemory:
    """The reader's side: another process's pool, mapped read-only. Outlives that process."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self._array: ByteArray | None = np.frombuffer(mapping, np.uint8)

    @classmethod
    def open(cls, address: MemoryAddress) -> "PeerMemory":
        """Map it, or raise TransportError saying why this process cannot."""
        here = host_identity()
        if address.host != here:
            raise TransportError(
                f"pool {address.name} is on another host or in another process namespace "
                f"({address.host}, here {here}), and shared memory does not reach there. Set "
                "kv.transport to auto or torch_distributed, or give both containers one process "
                "namespace"
            )
        path = Path(f"/proc/{address.pid}/fd/{address.fd}")
        link = f"/memfd:paceline-{address.name} (deleted)"
        try:
            # Looked at before it is opened: opening a stranger's file could have effects.
            _expect_link(path, link)
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise TransportError(
                f"cannot open the memory of pool {address.name} at {path}: {error.strerror}. "
                "Its process has ended, or runs as another user than this one"
            ) from error
        try:
            _expect_link(Path(f"/proc/self/fd/{fd}"), link)
            _expect_same_file(fd, address)
            return cls(mmap.mmap(fd, address.num_bytes, prot=mmap.PROT_READ))
        except (OSError, ValueError) as error:
            raise TransportError(
                f"cannot map the memory of pool {address.name}: {error}"
            ) from error
        finally:
            os.close(fd)

    @property
    def array(self) -> ByteArray:
        """The memory as read-only uint8 [num_bytes]. Views of it must be gone before `close`."""
        if self._array is None:
            raise ValueError("the mapping of a peer's memory is closed")
        return self._array

    def close(self) -> None:
        """Unmap. Raises BufferError when a view of `array` still lives."""
        if self._array is None:
            return
        self._array = None
        self._mapping.close()


def _expect_link(path: Path, expected: str) -> None:
    found = os.readlink(path)  # noqa: PTH115 - a Path would drop parts of such a name
    if found != expected:
        raise TransportError(
            f"{path} is {found!r}, expected {expected!r}: the owner of that memory has ended and "
            "its process id or descriptor is in use again"
        )


def _expect_same_file(fd: int, address: MemoryAddress) -> None:
    status = os.fstat(fd)
    found = (status.st_ino, status.st_size)
    if found != (address.inode, address.num_bytes):
        raise TransportError(
            f"the memory named {address.name} has (inode, bytes) {found}, expected "
            f"{(address.inode, address.num_bytes)}: it belongs to another process of that name"
        )
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if seals & SIZE_SEALS != SIZE_SEALS:
        raise TransportError(
            f"the memory of pool {address.name} is not sealed (seals {seals:#x}): its owner could "
            "shrink it under this reader"
        )
