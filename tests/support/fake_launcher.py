"""A world without Ray for the controller: processes that do what a test tells them."""

import asyncio

from paceline.cluster.launcher import (
    Capacity,
    Membership,
    ProcessDiedError,
    ProcessReport,
    Remembered,
    Started,
    StartupStep,
)
from paceline.cluster.process_state import ProcessName

FIRST_PORT = 1000


class FakeProcess:
    """Becomes READY when `can_start` is set; dies, hangs and gets busy by order of the test."""

    def __init__(self, name: ProcessName, can_start: bool, port: int) -> None:
        self.name = name
        self.port = port
        self.started = asyncio.Event()
        if can_start:
            self.started.set()
        self.is_busy = False
        self.end_seen_by_launcher: str | None = None
        self.is_silent = False
        self.is_draining = False
        self.stalled_s = 0.0
        self.memberships: list[Membership] = []
        self.was_killed = False
        self.can_be_stopped = asyncio.Event()
        self.can_be_stopped.set()
        self.can_be_killed = asyncio.Event()
        self.can_be_killed.set()
        self.can_update = asyncio.Event()
        self.can_update.set()
        self._ended: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    @property
    def lives(self) -> bool:
        return not self._ended.done()

    def die(self, cause: str) -> None:
        if not self._ended.done():
            self._ended.set_result(cause)

    def _check(self) -> None:
        if self._ended.done():
            raise ProcessDiedError(self._ended.result() or "it was stopped")

    async def start(self) -> Started:
        waits = [asyncio.ensure_future(self.started.wait()), self._ended]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        self._check()
        return Started(f"127.0.0.1:{self.port}", 1)

    async def wait(self) -> None:
        cause = await asyncio.shield(self._ended)
        if cause is not None:
            raise ProcessDiedError(cause)

    async def report(self) -> ProcessReport:
        self._check()
        if self.is_silent:
            await asyncio.Event().wait()
        return ProcessReport(
            steps=(StartupStep("load the model", 0.1),),
            loading=None,
            pid=1,
            log_path="",
            memory_bytes=1,
            draining=self.is_draining,
            is_idle=not self.is_busy,
            stalled_s=self.stalled_s,
            num_running=int(self.is_busy),
        )

    def end(self) -> str | None:
        return self.end_seen_by_launcher

    async def update_membership(self, membership: Membership) -> None:
        await self.can_update.wait()
        self._check()
        self.memberships.append(membership)

    async def drain(self) -> None:
        self._check()
        self.is_draining = True

    async def stop(self) -> None:
        await self.can_be_stopped.wait()
        self._check()
        self._ended.set_result(None)

    async def kill(self) -> None:
        self.was_killed = True
        await self.can_be_killed.wait()
        self.die("it was killed")


class FakeLauncher:
    """Keeps every process it launched, by incarnation."""

    def __init__(self) -> None:
        self.launched: list[FakeProcess] = []
        self.can_start = True
        self.can_launch = asyncio.Event()
        self.can_launch.set()
        self.capacity_now = Capacity({"CPU": 2.0}, 1, 16 << 30, 8 << 30)
        self.problem_now = ""
        self.saved: Remembered | None = None
        self.numbers = 0

    async def launch(self, name: ProcessName, router_port: int) -> FakeProcess:
        await self.can_launch.wait()
        free_port = FIRST_PORT + len(self.launched)
        process = FakeProcess(name, self.can_start, router_port or free_port)
        self.launched.append(process)
        return process

    async def adopt(self) -> list[FakeProcess]:
        return [process for process in self.launched if process.lives]

    async def problem(self) -> str:
        return self.problem_now

    async def capacity(self) -> Capacity:
        return self.capacity_now

    async def save(self, remembered: Remembered) -> None:
        self.saved = remembered

    async def first_number(self) -> int:
        self.numbers += 1 << 40
        return self.numbers

    async def load(self) -> Remembered | None:
        return self.saved

    def living_ids(self) -> set[str]:
        return {process.name.worker_id for process in self.launched if process.lives}

    def living(self, worker_id: str) -> FakeProcess:
        """Return the one living process of this id."""
        (process,) = [p for p in self.launched if p.name.worker_id == worker_id and p.lives]
        return process
