"""A process group of two over a socket that fails as NCCL does: by silence.

A transfer whose peer has died never ends. Only an abort ends it, and then as if it were done.
"""

import queue
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

import torch

from paceline.kv_transfer.channel_store import ChannelStore
from paceline.kv_transfer.communicator import OWNER_RANK
from paceline.kv_transfer.device_wire import DeviceWire


class SilentWork:
    """Stands for `torch.distributed.Work`."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def is_completed(self) -> bool:
        return self.ended.is_set()

    def wait(self) -> bool:
        assert self.ended.is_set(), "nobody may wait for a transfer"
        return True


class SilentGroup:
    """Stands for `ProcessGroupNCCL`; one thread does its transfers in order."""

    def __init__(self, store: ChannelStore, rank: int) -> None:
        self._socket = _meet(store, rank)
        self._jobs: queue.SimpleQueue[tuple[SilentWork, Callable[[], None]] | None] = (
            queue.SimpleQueue()
        )
        self._aborted = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-silent", daemon=True)
        self._thread.start()

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> SilentWork:
        view = memoryview(tensors[0].numpy()).cast("B")
        return self._launch(lambda: self._socket.sendall(view))

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> SilentWork:
        view = memoryview(tensors[0].numpy()).cast("B")
        return self._launch(lambda: self._receive(view))

    def abort(self) -> None:
        self._aborted.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._jobs.put(None)
        self._thread.join(5.0)
        self._socket.close()

    def _launch(self, job: Callable[[], None]) -> SilentWork:
        work = SilentWork()
        self._jobs.put((work, job))
        return work

    def _receive(self, view: memoryview) -> None:
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise ConnectionError
            view = view[count:]

    def _run(self) -> None:
        while (launched := self._jobs.get()) is not None:
            work, job = launched
            try:
                job()
            except OSError:
                self._aborted.wait()
            work.ended.set()


def make_silent_wire(block_bytes: int) -> Callable[[ChannelStore, int], DeviceWire]:
    def make(store: ChannelStore, rank: int) -> DeviceWire:
        group = SilentGroup(store, rank)
        return DeviceWire(group, store, rank, torch.device("cpu"), block_bytes)

    return make


def _meet(store: ChannelStore, rank: int) -> socket.socket:
    if rank != OWNER_RANK:
        return socket.create_connection(("127.0.0.1", int(store.get("port"))), timeout=None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        store.set("port", str(server.getsockname()[1]))
        while not store.is_closed:
            with suppress(TimeoutError):
                made, _ = server.accept()
                made.setblocking(True)
                return made
    raise ConnectionError("the reader did not come")
