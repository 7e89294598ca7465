"""What the deployment says of its processes, and what the system says of them."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import psutil

from paceline.bench.faults.deployment import Control
from paceline.v1 import control_pb2

POLL_S = 0.2
"""Between two looks at the status, as the next between two looks at what is known of it."""
LOOK_S = 0.02
SAMPLE_S = 5.0
READY = control_pb2.PROCESS_STATE_READY
STARTING = control_pb2.PROCESS_STATE_STARTING


async def wait_until(condition: Callable[[], object], timeout_s: float) -> None:
    """Return when the condition holds, or when the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        if condition() or time.monotonic() >= deadline:
            return
        await asyncio.sleep(LOOK_S)


@dataclass(slots=True)
class Resources:
    """What a process used, at its first look, its last, and at most."""

    role: str
    first_s: float
    last_s: float = 0.0
    first: tuple[int, int, int] = (0, 0, 0)
    """Private bytes, descriptors, threads."""
    last: tuple[int, int, int] = (0, 0, 0)
    most: tuple[int, int, int] = (0, 0, 0)


class Watch:
    """Polls the status until it is cancelled."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self.processes: dict[str, control_pb2.Process] = {}
        """The newest of each worker_id."""
        self.ready_s: dict[tuple[str, int], float] = {}
        """When an incarnation was first seen READY."""
        self.resources: dict[int, Resources] = {}
        """By process id, also of those that have ended."""
        self.longest_silence_s = 0.0
        """Of the control API."""

    async def run(self) -> None:
        heard_s = time.monotonic()
        sampled_s = 0.0
        while True:
            try:
                response = await self._control.status()
            except grpc.aio.AioRpcError:
                self.longest_silence_s = max(self.longest_silence_s, time.monotonic() - heard_s)
            else:
                heard_s = time.monotonic()
                self._take(response, heard_s)
                if heard_s - sampled_s > SAMPLE_S:
                    sampled_s = heard_s
                    self._sample(heard_s)
            await asyncio.sleep(POLL_S)

    def workers(self, state: "control_pb2.ProcessState.ValueType") -> list[control_pb2.Process]:
        """Workers in a state, whose process id is known."""
        return [
            p for p in self.processes.values() if p.state == state and p.role != "router" and p.pid
        ]

    def can_serve(self) -> bool:
        return {p.role for p in self.workers(READY)} == {"prefill", "decode"}

    def replaced_s(self, process: control_pb2.Process) -> float | None:
        """Return when a later incarnation was READY; None: not yet."""
        times = [
            at_s
            for (worker_id, incarnation), at_s in self.ready_s.items()
            if worker_id == process.worker_id and incarnation > process.incarnation
        ]
        return min(times, default=None)

    def leaks(self) -> list[str]:
        """Say which workers hold something although nothing runs."""
        return [
            f"{p.worker_id}: {p.num_running} running, {p.num_free_blocks} of {p.num_blocks} blocks "
            f"free, {control_pb2.ProcessState.Name(p.state)}"
            for p in self.processes.values()
            if p.num_running
            or p.num_waiting
            or p.num_free_blocks != p.num_blocks
            or p.state != READY
        ]

    def _take(self, response: control_pb2.GetStatusResponse, now: float) -> None:
        newest: dict[str, control_pb2.Process] = {}
        for process in response.processes:
            known = newest.get(process.worker_id)
            if known is None or process.incarnation > known.incarnation:
                newest[process.worker_id] = process
            if process.state == READY:
                self.ready_s.setdefault((process.worker_id, process.incarnation), now)
        self.processes = newest

    def _sample(self, now: float) -> None:
        for process in self.processes.values():
            if process.state != READY or not process.pid:
                continue
            try:
                system = psutil.Process(process.pid)
                memory = system.memory_full_info()
                used = (memory.uss, system.num_fds(), system.num_threads())
            except psutil.Error:
                continue
            entry = self.resources.setdefault(process.pid, Resources(process.role, now, first=used))
            entry.last_s, entry.last = now, used
            entry.most = tuple(map(max, entry.most, used))  # type: ignore[assignment]
