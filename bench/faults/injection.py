"""The faults: which process is hurt, when, and how."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from paceline.bench.faults.watch import LOOK_S, READY, STARTING, Watch, wait_until
from paceline.v1 import control_pb2

CAN_SERVE_WAIT_S = 30.0
"""For a worker in each pool, between two faults. Then the next comes anyway."""
START_WAIT_S = 15.0
"""For a replacement's process to be seen, to be killed while it starts."""


@dataclass(slots=True)
class Fault:
    """One fault that was injected."""

    kind: str
    at_s: float
    """Monotonic."""
    victims: tuple[control_pb2.Process, ...]
    seconds: float = 0.0
    """How long it lasted, if it ended by itself."""


class Injector:
    """Hurts processes at random moments. All methods return when the fault has happened."""

    def __init__(self, watch: Watch, random: Random) -> None:
        self._watch = watch
        self._random = random
        self.faults: list[Fault] = []

    async def kills(self, count: int, mean_s: float) -> None:
        """Kill workers: mostly one, sometimes a pair, sometimes one that is starting."""
        num_kills = 0
        while num_kills < count:
            await self._pause(mean_s)
            draw = self._random.random()
            if draw < 0.7:
                fault = self._kill("kill", self._one(READY))
            elif draw < 0.85:
                fault = self._kill("kill of a pair", self._pair())
            else:
                fault = self._kill("kill while starting", await self._starting())
            num_kills += len(fault.victims)

    async def stops(self, count: int, mean_s: float, longest_s: float) -> None:
        """Stop workers for a random time, most of them for a short one."""
        for _ in range(count):
            await self._pause(mean_s)
            victims = self._one(READY)
            seconds = longest_s * self._random.random() ** 2
            fault = Fault("stop", time.monotonic(), victims, seconds)
            for victim in victims:
                _signal(victim, signal.SIGSTOP)
            await asyncio.sleep(seconds)
            for victim in victims:
                _signal(victim, signal.SIGCONT)
            self._note(fault)

    async def failpoints(self, count: int) -> None:
        """Wait until workers have killed themselves this often at named moments."""
        alive: dict[int, control_pb2.Process] = {}
        seen: set[int] = set()
        while len(self.faults) < count:
            await asyncio.sleep(LOOK_S)
            for process in self._watch.workers(READY):
                if process.pid not in seen:
                    seen.add(process.pid)
                    alive[process.pid] = process
            for pid in [pid for pid in alive if not _is_alive(pid)]:
                self._note(Fault("failpoint", time.monotonic(), (alive.pop(pid),)))

    async def _pause(self, mean_s: float) -> None:
        await wait_until(self._watch.can_serve, CAN_SERVE_WAIT_S)
        await asyncio.sleep(self._random.expovariate(1 / mean_s))

    def _one(self, state: "control_pb2.ProcessState.ValueType") -> tuple[control_pb2.Process, ...]:
        workers = [p for p in self._watch.workers(state) if _is_alive(p.pid)]
        return (self._random.choice(workers),) if workers else ()

    def _pair(self) -> tuple[control_pb2.Process, ...]:
        workers = [p for p in self._watch.workers(READY) if _is_alive(p.pid)]
        pools = [[p for p in workers if p.role == role] for role in ("prefill", "decode")]
        return tuple(self._random.choice(pool) for pool in pools if pool)

    async def _starting(self) -> tuple[control_pb2.Process, ...]:
        """Kill a worker, and give the replacement once its process is seen."""
        self._kill("kill", self._one(READY))
        await wait_until(lambda: self._one(STARTING), START_WAIT_S)
        await asyncio.sleep(self._random.random())
        return self._one(STARTING)

    def _kill(self, kind: str, victims: Sequence[control_pb2.Process]) -> Fault:
        fault = Fault(kind, time.monotonic(), tuple(victims))
        for victim in victims:
            _signal(victim, signal.SIGKILL)
        self._note(fault)
        return fault

    def _note(self, fault: Fault) -> None:
        if fault.victims:
            self.faults.append(fault)


def _signal(process: control_pb2.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, number)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
