"""A worker's transport in a second process, and a session to it over a pipe.

The pipe stands for the KV session: when it breaks, the survivor closes its end, as the worker does.
"""

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from silent_group import make_silent_wire

from paceline.kv_layout import attention_layout
from paceline.kv_transfer.pool_memory import PoolMemory
from paceline.kv_transfer.select import SelectingTransport, build_transport
from paceline.kv_transfer.settings import KvSettings
from paceline.kv_transfer.staged_connect import StagedCommunicators
from paceline.kv_transfer.torch_distributed import TorchDistributedTransport
from paceline.kv_transfer.transport import (
    Connection,
    LocalPool,
    OwnerPeer,
    ReadHandle,
    ReadOutcome,
)

LEASE = 2**63 + 5
NO_LEASE = 77
# The first NCCL communicator of a process takes seconds.
DEADLINE_S = 60.0 if torch.cuda.is_available() else 10.0
CLOSE_TIMEOUT_S = 10.0


class Kind(NamedTuple):
    """A transport, and where the pools of both ends are.

    `staged` is what pools on GPUs use, `torch_distributed` by staged communicators, but on CPUs and
    over a group that fails as NCCL does.
    """

    transport: str
    device: str = "cpu"
    peer_device: str = "cpu"

    @property
    def name(self) -> str:
        return self.transport if self.device == "cpu" else "nccl"


SHM, GLOO, AUTO, STAGED = map(Kind, ("shm", "torch_distributed", "auto", "staged"))


class Worker:
    """A pool of `num_blocks` of 4 KiB blocks or larger, with a transport."""

    def __init__(
        self,
        transport: str,
        name: str,
        num_blocks: int = 64,
        block_kib: int = 4,
        read_timeout_s: float = 10.0,
        min_gb_per_s: float = 0.0,
        device: str = "cpu",
    ) -> None:
        layout = attention_layout(
            num_layers=1, num_kv_heads=block_kib, head_dim=8, block_tokens=16, dtype="float32"
        )
        worker_id, _, incarnation = name.rpartition(".")
        self.memory: PoolMemory | None = None
        if device == "cpu":
            self.memory = PoolMemory.create(num_blocks * layout.block_bytes, name)
            blocks = self.memory.tensor.view(num_blocks, layout.block_bytes)
        else:
            blocks = torch.zeros((num_blocks, layout.block_bytes), dtype=torch.uint8, device=device)
        self.pool = LocalPool(worker_id, int(incarnation), layout, num_blocks, blocks)
        self.transport: SelectingTransport
        if transport == "staged":
            communicators = StagedCommunicators(make_silent_wire(layout.block_bytes))
            staged = TorchDistributedTransport(self.pool, read_timeout_s, communicators)
            self.transport = SelectingTransport("torch_distributed", [staged], min_gb_per_s)
            return
        settings = KvSettings(
            transport=transport,
            read_timeout_s=read_timeout_s,
            min_transport_gb_per_s=min_gb_per_s,
        )
        self.transport = build_transport(settings, self.pool, self.memory)

    @property
    def blocks(self) -> torch.Tensor:
        return self.pool.blocks

    def fill(self, salt: int) -> None:
        """Give every block bytes of its own."""
        self.blocks.copy_(expected_blocks(salt, self.pool.num_blocks, self.pool.layout.block_bytes))

    def paint(self, value: int) -> None:
        """Fill every block with one value; returns when it is there."""
        self.blocks.fill_(value)
        if self.blocks.is_cuda:
            torch.cuda.current_stream(self.blocks.device).synchronize()

    def read_back(self) -> torch.Tensor:
        """Return the blocks in CPU memory."""
        return self.blocks.cpu()

    def close(self) -> None:
        self.transport.close()
        del self.pool, self.transport
        if self.memory is not None:
            self.memory.close()


def expected_blocks(salt: int, num_blocks: int, block_bytes: int) -> torch.Tensor:
    row = np.arange(block_bytes, dtype=np.uint32) * 2654435761
    block = (np.arange(num_blocks, dtype=np.uint32) * 40503 + salt)[:, None]
    return torch.from_numpy((((row[None, :] >> 7) ^ block) & 0xFF).astype(np.uint8))


def wait_ended(handle: ReadHandle, timeout_s: float = DEADLINE_S) -> ReadOutcome:
    outcomes: list[ReadOutcome] = []
    ended = threading.Event()

    def take(outcome: ReadOutcome) -> None:
        outcomes.append(outcome)
        ended.set()

    handle.add_done_callback(take)
    assert ended.wait(timeout_s), f"the read has not ended within {timeout_s} s"
    assert len(outcomes) == 1
    return outcomes[0]


def wait_until(condition: Callable[[], bool], timeout_s: float = DEADLINE_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(0.002)


class PipeSession:
    """One end of the session: a channel, and a thread that delivers what comes."""

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self._lock = threading.Lock()
        self.num_sent = 0

    def send(self, payload: bytes) -> None:
        self.num_sent += 1
        try:
            with self._lock:
                self.pipe.send_bytes(payload)
        except OSError:
            return  # the session is gone

    def shut(self) -> None:
        """Break the pipe, so that both sides see its end; a close would not wake our own reader."""
        with suppress(OSError), socket.socket(fileno=os.dup(self.pipe.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)

    def deliver_to(self, end: Connection | OwnerPeer, is_deaf: bool = False) -> None:
        """Hand messages over until the pipe breaks, then close the end; not if it `is_deaf`."""
        try:
            while True:
                end.on_message(self.pipe.recv_bytes())
        except (EOFError, OSError):
            if not is_deaf:
                end.close()
        finally:
            self.pipe.close()


@dataclass
class OwnerSpec:
    """What the owner in the second process is like."""

    transport: str
    name: str
    salt: int
    num_blocks: int = 64
    block_kib: int = 4
    read_timeout_s: float = 10.0
    device: str = "cpu"


def _serve(spec: OwnerSpec, session_pipe: Pipe, control: Pipe) -> None:
    torch.set_num_threads(1)
    worker = Worker(
        spec.transport,
        spec.name,
        spec.num_blocks,
        spec.block_kib,
        spec.read_timeout_s,
        device=spec.device,
    )
    worker.fill(spec.salt)
    revoked = threading.Event()

    def is_readable(lease_id: int, block_ids: Sequence[int]) -> bool:
        return lease_id == LEASE and not revoked.is_set()

    session = PipeSession(session_pipe)
    peer = worker.transport.accept("reader-0.1", session, is_readable)
    threading.Thread(target=session.deliver_to, args=(peer,), daemon=True).start()
    control.send(worker.transport.endpoint())
    while (command := control.recv()) != "exit":
        if command == "revoke":
            revoked.set()
        control.send(resources() if command == "resources" else None)
    worker.close()


class OwnerProcess:
    """An owner in a process of its own."""

    def __init__(self, spec: OwnerSpec) -> None:
        self.spec = spec
        context = multiprocessing.get_context("spawn")
        self.session_pipe, child_session = context.Pipe()
        self._control, child_control = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(spec, child_session, child_control), daemon=True
        )
        self._process.start()
        child_session.close()
        child_control.close()
        assert self._control.poll(60), "the owner has not started"
        self.endpoint: bytes = self._control.recv()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    def ask(self, command: str) -> object:
        self._control.send(command)
        assert self._control.poll(DEADLINE_S)
        return self._control.recv()

    def kill(self) -> None:
        self._process.kill()
        self._process.join(DEADLINE_S)

    def close(self) -> None:
        self.session_pipe.close()
        if self._process.is_alive():
            self._control.send("exit")
        self._process.join(CLOSE_TIMEOUT_S)
        hangs = self._process.is_alive()
        if hangs:
            self._process.kill()
            self._process.join(CLOSE_TIMEOUT_S)
        self._process.close()
        self._control.close()
        assert not hangs, f"the owner has not ended within {CLOSE_TIMEOUT_S} s"


def _read_for_ever(
    kind: Kind, owner: str, endpoint: bytes, session_pipe: Pipe, started: Event
) -> None:
    torch.set_num_threads(1)
    worker = Worker(kind.transport, "reader-0.1", 64, 1024, DEADLINE_S, device=kind.peer_device)
    session = PipeSession(session_pipe)
    connection = worker.transport.connect(owner, 1, endpoint, session)
    threading.Thread(target=session.deliver_to, args=(connection,), daemon=True).start()
    while True:
        reads = [connection.read(LEASE, range(64), range(64)) for _ in range(4)]
        for read in reads:
            wait_ended(read)
            started.set()


class ReaderProcess:
    """A reader in a process of its own that reads until it is killed."""

    def __init__(self, kind: Kind, owner: Worker, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        session_pipe, child_session = context.Pipe()
        self.started = context.Event()
        self.session = PipeSession(session_pipe)
        self._process = context.Process(
            target=_read_for_ever,
            args=(kind, name, owner.transport.endpoint(), child_session, self.started),
            daemon=True,
        )
        self._process.start()
        child_session.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.join(DEADLINE_S)
        self._process.close()


class LocalSession:
    """Both ends of a session in this process; each message is delivered by a thread."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        owner_pipe, reader_pipe = context.Pipe()
        self.owner, self.reader = PipeSession(owner_pipe), PipeSession(reader_pipe)
        self._threads: list[threading.Thread] = []

    def start(self, connection: Connection, peer: OwnerPeer) -> None:
        for session, end in ((self.reader, connection), (self.owner, peer)):
            thread = threading.Thread(target=session.deliver_to, args=(end,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        for session in (self.owner, self.reader):
            session.shut()
            if not self._threads:
                session.pipe.close()
        while self._threads:
            thread = self._threads.pop()
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


class Link:
    """A reader's connection to an owner process, with the thread that delivers its messages."""

    def __init__(self, reader: Worker, owner: OwnerProcess, is_deaf: bool = False) -> None:
        self.session = PipeSession(owner.session_pipe)
        self.connection = reader.transport.connect(owner.spec.name, 1, owner.endpoint, self.session)
        self._thread = threading.Thread(
            target=self.session.deliver_to, args=(self.connection, is_deaf), daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self.connection.close()
        self.session.shut()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()


class Resources(NamedTuple):
    """What transports hold in this process."""

    files: list[str]
    threads: list[str]
    mappings: int


def resources() -> Resources:
    links = []
    for path in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(path))  # noqa: PTH115 - a Path would drop parts of it
        except FileNotFoundError:
            continue  # the listing's own
    kinds = ("memfd", "socket", "eventpoll", "eventfd")
    return Resources(
        files=sorted(link for link in links if any(kind in link for kind in kinds)),
        threads=sorted(t.name for t in threading.enumerate() if t.name.startswith("kv-")),
        mappings=Path("/proc/self/maps").read_text().count("memfd:paceline-"),
    )
