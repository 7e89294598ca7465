"""Make the deployment what is wanted, and keep it so.

An asyncio program without Ray or gRPC in it: `launcher` is its world. Each process has one task
here that starts it, waits for its end and buries it, and one that asks how it does; the main loop
plans.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Coroutine, Mapping
from typing import NamedTuple

from paceline.addresses import parse_address
from paceline.cluster.back_off import BackOff
from paceline.cluster.launcher import (
    Launcher,
    Membership,
    Process,
    ProcessDiedError,
    ProcessReport,
    Remembered,
    Started,
)
from paceline.cluster.plan import Action, Drain, Start, Stop, plan
from paceline.cluster.pool_sizes import checked_sizes
from paceline.cluster.process_state import ProcessName, ProcessState, Role
from paceline.cluster.resources import check_capacity
from paceline.cluster.settings import DeploymentSettings, prefill_size_problem
from paceline.cluster.supervised import Supervised, is_membership_known, members_of
from paceline.errors import ConfigError, InvalidRequestError, PacelineError, UnavailableError
from paceline.errors import FieldViolation as Violation
from paceline.silence import Silence

logger = logging.getLogger(__name__)

MEMBERSHIP_TIMEOUT_S = 2.0
"""For a process to take a membership; who does not answer gets the next one."""
STOP_TIMEOUT_S = 10.0
"""For a process to end by itself, beside a router's own drain_timeout_s."""
KILL_TIMEOUT_S = 5.0
"""For Ray to take the order. A process of this machine has had SIGKILL by then."""
SAVE_TIMEOUT_S = 5.0
"""For Ray's store to take what a later controller needs."""
NUM_EVENTS = 200


class Event(NamedTuple):
    """Something the controller did or saw."""

    time_s: float
    """Unix seconds."""
    message: str


class Controller:
    """Holds the wanted sizes. All methods run on one event loop."""

    def __init__(self, settings: DeploymentSettings, launcher: Launcher) -> None:
        self.settings = settings
        self.started_s = time.monotonic()
        self.events: deque[Event] = deque(maxlen=NUM_EVENTS)
        self.wanted: dict[Role, int] = {
            Role.ROUTER: settings.router.replicas,
            Role.PREFILL: settings.prefill.replicas,
            Role.DECODE: settings.decode.replicas,
        }
        self._launcher = launcher
        self._router_ports: dict[str, int] = {}
        self._processes: dict[ProcessName, Supervised] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._last_number = 0
        """Incarnation or version of a membership that was given last."""
        self._membership = Membership(0, ())
        self._shutting_down = False
        self.problem = ""
        """Why nothing can be started now; empty when all is well."""
        limits = settings.controller
        self._back_off = BackOff(
            limits.first_back_off_s,
            limits.max_back_off_s,
            limits.stable_after_s,
            limits.max_empty_back_off_s,
        )

    @property
    def processes(self) -> list[Supervised]:
        """Every process that lives, and the dead whose replacement has not been started yet."""
        order = list(Role)
        return sorted(
            self._processes.values(), key=lambda p: (order.index(p.name.role), p.name.number)
        )

    @property
    def model_name(self) -> str:
        """Name of the served model; empty until a router has said it."""
        reports = (p.report for p in self._processes.values() if p.report is not None)
        return next((report.model_name for report in reports if report.model_name), "")

    async def run(self) -> None:
        """Work until cancelled; `adopt` comes first."""
        while True:
            await self._spread_membership()
            if self._shutting_down:  # perhaps since then: what has ended is not to be replaced
                return
            await self._look_at_launcher()
            now = time.monotonic()
            seen = [p.seen() for p in self._processes.values()]
            for action in plan(self.wanted, seen, self._back_off, now):
                if not (self.problem and isinstance(action, Start)):
                    self._perform(action, now)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.controller.poll_interval_s):
                    await self._wake.wait()
            self._wake.clear()

    async def scale(self, sizes: Mapping[str, int]) -> dict[Role, int]:
        """Change the wanted sizes of pools; returns those of all. Raises without changing any."""
        self._check_problem()
        wanted = self.wanted | checked_sizes(sizes)
        problem = prefill_size_problem(self.settings, wanted[Role.PREFILL])
        if problem is not None:
            raise ConfigError(problem)
        num_more = {
            role: wanted[role] - self._num_live(role) for role in (Role.PREFILL, Role.DECODE)
        }
        check_capacity(self.settings, wanted, num_more, await self._launcher.capacity())
        self.wanted = wanted
        await self._save()
        for role in (Role.PREFILL, Role.DECODE):
            self._log(f"{role.value} workers wanted: {wanted[role]}")
        self._wake.set()
        return wanted

    async def drain(self, worker_id: str) -> None:
        """Drain one worker for good: its pool is wanted one smaller. Raises if it is not READY."""
        self._check_problem()
        found = [p for p in self._processes.values() if p.name.worker_id == worker_id]
        ready = next((p for p in found if p.state is ProcessState.READY), None)
        if ready is None or not ready.name.role.is_worker:
            known = ", ".join(
                p.name.worker_id
                for p in self.processes
                if p.name.role.is_worker and p.state is ProcessState.READY
            )
            raise InvalidRequestError(
                Violation("worker_id", f"{worker_id} is no worker that is READY; those are {known}")
            )
        role = ready.name.role
        sizes = checked_sizes({role.value: self.wanted[role] - 1})
        problem = prefill_size_problem(self.settings, (self.wanted | sizes)[Role.PREFILL])
        if problem is not None:
            raise ConfigError(problem)
        self.wanted |= sizes
        self._perform(Drain(ready.name), time.monotonic())
        await self._save()

    async def shut_down(self) -> None:
        """Let routers end their streams for their drain_timeout_s, then end every process."""
        self._shutting_down = True
        self._wake.set()
        for is_worker in (False, True):
            ending = [
                p
                for p in self._processes.values()
                if p.name.role.is_worker is is_worker and not _is_dead(p)
            ]
            for process in ending:
                if process.state is not ProcessState.STOPPING:
                    process.move(ProcessState.STOPPING)
            await asyncio.gather(*map(self._stop, ending))

    async def adopt(self) -> None:
        """Take over what an earlier controller left, before anybody may ask about it."""
        self._last_number = await self._launcher.first_number()
        self._membership = Membership(self._last_number, ())
        remembered = await self._launcher.load()
        if remembered is not None:
            self.wanted |= remembered.wanted
            self._router_ports |= remembered.router_ports
        now = time.monotonic()
        for process in await self._launcher.adopt():
            self._log(f"{process.name.worker_id} lives already and is kept")
            adopted = Supervised(process.name, started_s=now, process=process, is_adopted=True)
            self._supervise(adopted)

    def _perform(self, action: Action, now: float) -> None:
        match action:
            case Start(role, number):
                name = ProcessName(role, number, self._next_number())
                failure = self._forget_dead(name.worker_id)
                again = f" again after: {failure}" if failure else ""
                self._log(f"{name.worker_id} is started{again}")
                self._supervise(Supervised(name, started_s=now, message=failure))
            case Drain(name):
                process = self._processes[name]
                process.move(ProcessState.DRAINING)
                process.drain_deadline_s = now + self.settings.controller.drain_timeout_s
                self._log(f"{name.worker_id} drains")
                self._spawn(self._drain(process), f"drain {name}")
            case Stop(name):
                process = self._processes[name]
                process.move(ProcessState.STOPPING)  # now: the next plan may come before the task
                self._log(f"{name.worker_id} is stopped")
                self._spawn(self._stop(process), f"stop {name}")

    def _supervise(self, process: Supervised) -> None:
        self._processes[process.name] = process
        self._spawn(self._live_and_die(process), f"supervise {process.name}")

    async def _live_and_die(self, process: Supervised) -> None:
        cause = "it ended by itself"
        tasks: list[asyncio.Task[None]] = []
        try:
            if process.process is None:
                port = self._router_ports.get(process.name.worker_id, 0)
                process.process = await self._launcher.launch(process.name, port)
            if process.state is ProcessState.STARTING:
                # Ray tells of an end, unless its GCS is away; then the watch finds it.
                tasks = [
                    asyncio.create_task(work, name=f"{name} {process.name}")
                    for name, work in (
                        ("live", self._live(process, process.process)),
                        ("watch", self._watch(process, process.process)),
                    )
                ]
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            # Otherwise it was told to stop while it was launched, and its burial ends it.
        except PacelineError as error:
            cause = str(error)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._bury(process, cause)

    async def _live(self, process: Supervised, launched: Process) -> None:
        """Start a process and wait for its end. Raises ProcessDiedError unless it was stopped."""
        limit_s = self.settings.controller.start_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                self._ready(process, await launched.start(), await launched.report())
        except TimeoutError:
            raise ProcessDiedError(
                f"it was not READY {limit_s:g} s after its start (controller.start_timeout_s)"
            ) from None
        await self._keep_port(process)
        await launched.wait()

    def _ready(self, process: Supervised, started: Started, report: ProcessReport) -> None:
        now = time.monotonic()
        process.heard(report, now)
        if process.state is not ProcessState.STARTING:
            return  # it was told to stop meanwhile
        process.became_ready(started, now)
        took_s = now - process.started_s
        self._log(f"{process.name.worker_id} is ready at {started.address} after {took_s:.1f} s")
        if report.draining:  # an adopted one
            self._perform(Drain(process.name), now)
        self._wake.set()

    async def _keep_port(self, process: Supervised) -> None:
        """Remember where a router listens, for the one that replaces it."""
        if process.name.role is Role.ROUTER and process.address:
            _, port = parse_address(process.address)
            if self._router_ports.get(process.name.worker_id) != port:
                self._router_ports[process.name.worker_id] = port
                await self._save()

    async def _save(self) -> None:
        try:
            async with asyncio.timeout(SAVE_TIMEOUT_S):
                await self._launcher.save(Remembered(dict(self.wanted), dict(self._router_ports)))
        except TimeoutError:
            self._log(
                f"Ray's store did not take the sizes and ports within {SAVE_TIMEOUT_S:g} s: a "
                "controller that replaces this one would not know them"
            )

    async def _look_at_launcher(self) -> None:
        """Note whether anything can be started now."""
        problem = await self._launcher.problem()
        if problem != self.problem:
            self._log(problem or "what was in the way of starts is over")
        self.problem = problem

    def _check_problem(self) -> None:
        if self.problem:
            raise UnavailableError(f"sizes cannot change now: {self.problem}")

    async def _bury(self, process: Supervised, cause: str) -> None:
        if process.process is not None:
            await self._kill(process)
        was_told = process.state in (ProcessState.STOPPING, ProcessState.DRAINING)
        now = time.monotonic()
        process.move(ProcessState.DEAD)
        if was_told:
            self._back_off.forget(process.name.worker_id)
            del self._processes[process.name]
            self._log(f"{process.name.worker_id} has ended")
        else:
            process.message = cause
            self._back_off.failed(process.name.worker_id, process.ready_for_s(now), now)
            self._log(f"{process.name.worker_id} has died: {process.message}")
        # Peers drop what was its before a replacement starts.
        await self._spread_membership()
        self._wake.set()

    def _forget_dead(self, worker_id: str) -> str:
        """Drop the dead process of this id; returns why it died."""
        for name, process in list(self._processes.items()):
            if name.worker_id == worker_id and _is_dead(process):
                del self._processes[name]
                return process.message
        return ""

    async def _watch(self, process: Supervised, launched: Process) -> None:
        """Ask how a process does. Raises ProcessDiedError when it has ended, or hangs."""
        interval_s = self.settings.controller.poll_interval_s
        limit_s = self._limit_s(process.name.role)
        silence = Silence(limit_s, time.monotonic())
        while True:
            with contextlib.suppress(TimeoutError, ProcessDiedError):
                async with asyncio.timeout(max(1.0, interval_s)):
                    report = await launched.report()
                process.heard(report, time.monotonic())
                silence.heard()
                if process.num_idle_reports:
                    self._wake.set()
            # A controller that stood still itself blames nobody.
            is_silent = silence.is_too_long(time.monotonic())
            reason = launched.end()
            if reason is None and process.is_serving:
                silent = f"it has not answered for {limit_s:g} s"
                reason = silent if is_silent else process.stall(limit_s)
            if reason is not None:
                raise ProcessDiedError(reason)
            await asyncio.sleep(interval_s if process.ready_s is not None else interval_s / 5)

    def _limit_s(self, role: Role) -> float:
        limits = self.settings.controller
        return limits.worker_silence_limit_s if role.is_worker else limits.router_silence_limit_s

    async def _drain(self, process: Supervised) -> None:
        if process.process is not None:
            with contextlib.suppress(ProcessDiedError):
                await process.process.drain()

    async def _stop(self, process: Supervised) -> None:
        """End a process that is STOPPING."""
        if process.process is None:
            return  # its own task sees the state when it has been launched
        limit_s = STOP_TIMEOUT_S
        if process.name.role is Role.ROUTER:
            limit_s += self.settings.router.drain_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await process.process.stop()
        except TimeoutError:
            self._log(f"{process.name.worker_id} did not end within {limit_s:g} s and is killed")
        except ProcessDiedError as error:
            logger.debug("event=died_while_stopping worker_id=%s error=%s", process.name, error)
        await self._kill(process)

    async def _kill(self, process: Supervised) -> None:
        """Kill a process that has been launched; whoever waits for that goes on in time."""
        assert process.process is not None
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                await process.process.kill()
        except TimeoutError:
            self._log(
                f"{process.name.worker_id} may live still: Ray has not ended it within "
                f"{KILL_TIMEOUT_S:g} s"
            )

    async def _spread_membership(self) -> None:
        if not is_membership_known(self._processes.values(), time.monotonic()):
            return  # those who serve go on with what the earlier controller said
        members = members_of(self._processes.values())
        if members != self._membership.members:
            self._membership = Membership(self._next_number(), members)
        behind = [
            p
            for p in self._processes.values()
            if p.is_serving and p.acknowledged_version < self._membership.version
        ]
        await asyncio.gather(*(self._send_membership(p) for p in behind))

    async def _send_membership(self, process: Supervised) -> None:
        assert process.process is not None
        with contextlib.suppress(TimeoutError, ProcessDiedError):  # the next round tries again
            async with asyncio.timeout(MEMBERSHIP_TIMEOUT_S), process.taking_membership:
                membership = self._membership
                if process.acknowledged_version < membership.version:
                    await process.process.update_membership(membership)
                    process.acknowledged_version = membership.version

    def _next_number(self) -> int:
        self._last_number += 1
        return self._last_number

    def _num_live(self, role: Role) -> int:
        return sum(
            p.name.role is role and p.state in (ProcessState.STARTING, ProcessState.READY)
            for p in self._processes.values()
        )

    def _spawn(self, work: Coroutine[object, object, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # A bug here: the process that hosts the controller ends, and its successor adopts.
            logger.error("event=task_failed task=%s", task.get_name(), exc_info=task.exception())
            task.get_loop().call_exception_handler(
                {"message": f"{task.get_name()} failed", "exception": task.exception()}
            )

    def _log(self, message: str) -> None:
        self.events.append(Event(time.time(), message))
        logger.info("event=controller message=%r", message)


def _is_dead(process: Supervised) -> bool:
    return process.state is ProcessState.DEAD
