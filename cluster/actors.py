"""What Ray runs: an actor class for workers and routers, one for the controller. They translate."""

import asyncio
import faulthandler
import logging
import os
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import psutil

from paceline.cluster.control_service import ControlServer, ControlServicer
from paceline.cluster.controller import Controller
from paceline.cluster.devices import prepare_environment
from paceline.cluster.hosted import BuildHosted, HostContext, Hosted, HostedLoad
from paceline.cluster.launcher import (
    LoadProgress,
    Membership,
    ProcessDiedError,
    ProcessReport,
    Started,
    StartupStep,
)
from paceline.cluster.process_state import ProcessName, ProcessState
from paceline.cluster.ray_launcher import RayLauncher, this_host
from paceline.cluster.resources import pool_settings
from paceline.cluster.settings import DeploymentSettings
from paceline.errors import PacelineError, cause_of, clip

logger = logging.getLogger(__name__)

CONTROLLER_NAME = "controller"
SHUT_DOWN_TIMEOUT_S = 60.0
MAX_LOG_CHARS = 16_384
"""Of one log line; room for a long traceback."""


class ProcessActor:
    """Hosts one worker or router. Ray calls it on one event loop; `start` may be called again."""

    def __init__(
        self,
        name: ProcessName,
        settings: DeploymentSettings,
        build: BuildHosted,
        router_port: int = 0,
    ) -> None:
        faulthandler.enable()
        _log_to_stderr()
        self._name = name
        self._settings = settings
        self._build = build
        self._router_port = router_port
        self._log_path = str(Path("/proc/self/fd/2").readlink())
        self._hosted: Hosted | None = None
        self._starting: asyncio.Task[Started] | None = None
        self._is_started = False
        self._steps: list[StartupStep] = []
        self._loading: LoadProgress | None = None
        self._failure: BaseException | None = None
        self._ended = asyncio.Event()

    async def start(self) -> Started:
        """Start, or wait for the start under way. Raises ProcessDiedError with the cause."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start(asyncio.get_running_loop()))
        return await asyncio.shield(self._starting)

    async def wait(self) -> None:
        """Return when `stop` has ended it; raise ProcessDiedError when it failed."""
        await self._ended.wait()
        if self._failure is not None:
            raise ProcessDiedError(cause_of(self._failure))

    async def report(self) -> ProcessReport:
        load = (
            self._hosted.load() if self._hosted is not None and self._is_started else HostedLoad()
        )
        return ProcessReport(
            steps=tuple(self._steps),
            loading=None if self._is_started else self._loading,
            pid=os.getpid(),
            log_path=self._log_path,
            memory_bytes=psutil.Process().memory_info().rss,
            host=this_host(),
            **load._asdict(),
        )

    async def update_membership(self, membership: Membership) -> None:
        await self._running().update_membership(membership)

    async def drain(self) -> None:
        await self._running().drain()

    async def stop(self) -> None:
        if self._hosted is not None:
            await self._hosted.stop()
        self._ended.set()

    async def check_integrity(self) -> None:
        """Raise IntegrityError if an invariant does not hold."""
        await self._running().check_integrity()

    async def arm_failpoint(self, specification: str) -> None:
        """Arm faults, for tests."""
        self._running().arm_failpoint(specification)

    async def _start(self, loop: asyncio.AbstractEventLoop) -> Started:
        def failed(error: BaseException) -> None:
            loop.call_soon_threadsafe(self._failed, error)

        context = HostContext(
            name=self._name,
            settings=self._settings,
            host=this_host(),
            router_port=self._router_port,
            on_step=self._stepped,
            on_progress=self._progressed,
            on_failure=failed,
        )
        try:
            role = self._name.role
            pool = pool_settings(self._settings, role) if role.is_worker else None
            prepare_environment(pool, os.environ)
            self._hosted = self._build(context)
            address = await self._hosted.start()
        except Exception as error:
            logger.exception("event=start_failed worker_id=%s", self._name)
            raise ProcessDiedError(cause_of(error)) from None
        self._is_started = True
        return Started(address, os.getpid())

    def _stepped(self, name: str, seconds: float) -> None:
        self._steps.append(StartupStep(name, seconds))
        self._loading = None

    def _progressed(self, what: str, share: float) -> None:
        self._loading = LoadProgress(what, share)

    def _failed(self, error: BaseException) -> None:
        self._failure = error
        self._ended.set()

    def _running(self) -> Hosted:
        if self._hosted is None or not self._is_started:
            raise ProcessDiedError(f"{self._name} has not been started")
        return self._hosted


class ProcessSnapshot(NamedTuple):
    """A process during start-up, for the checklist."""

    worker_id: str
    state: ProcessState
    steps: tuple[StartupStep, ...]
    loading: LoadProgress | None
    failure: str
    """Why it, or the one before it, died; empty when all is well."""
    elapsed_s: float


class ControllerActor:
    """Hosts the controller and its gRPC server on a thread of their own.

    Ray restarts it when it dies; it then finds its processes by their names, its sizes and port in
    Ray's store, and starts nothing that lives.
    """

    def __init__(self, settings: DeploymentSettings, namespace: str, build: BuildHosted) -> None:
        faulthandler.enable()
        _log_to_stderr()
        self._settings = settings
        self._launcher = RayLauncher(settings, namespace, build, ProcessActor)
        self._address: Future[str] = Future()
        self._controller: Controller | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, name="controller", daemon=True).start()

    def address(self) -> str:
        """Return host:port of the control API once it listens. Raises ConfigError."""
        return self._address.result(timeout=30.0)

    def pid(self) -> int:
        return os.getpid()

    def snapshot(self) -> list[ProcessSnapshot]:
        """Describe every process."""
        return asyncio.run_coroutine_threadsafe(self._snapshot(), self._loop).result(timeout=10.0)

    def shut_down(self) -> None:
        """End every process; what still runs gets router.drain_timeout_s."""
        if self._controller is not None:
            work = asyncio.run_coroutine_threadsafe(self._controller.shut_down(), self._loop)
            work.result(timeout=SHUT_DOWN_TIMEOUT_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except PacelineError as error:
            self._address.set_exception(error)
        except BaseException:
            logger.exception("event=controller_failed")
            os._exit(1)  # Ray starts it again, and it adopts what lives

    async def _serve(self) -> None:
        controller = Controller(self._settings, self._launcher)
        await controller.adopt()
        server = ControlServer(ControlServicer(controller))
        wanted_port = self._settings.controller.grpc_port or self._launcher.load_port()
        port = await server.start(self._settings.controller.host, wanted_port)
        self._launcher.save_port(port)
        self._controller = controller
        self._address.set_result(f"{self._settings.controller.host}:{port}")
        failed: asyncio.Future[None] = self._loop.create_future()

        def fail(loop: asyncio.AbstractEventLoop, details: dict[str, object]) -> None:
            loop.default_exception_handler(details)
            error = details.get("exception")
            if isinstance(error, BaseException) and not failed.done():
                failed.set_exception(error)

        self._loop.set_exception_handler(fail)
        await asyncio.gather(controller.run(), failed)

    async def _snapshot(self) -> list[ProcessSnapshot]:
        if self._controller is None:
            return []
        now = time.monotonic()
        return [
            ProcessSnapshot(
                p.name.worker_id,
                p.state,
                p.steps,
                p.report.loading if p.report is not None else None,
                p.message,
                (p.ready_s or now) - p.started_s,
            )
            for p in self._controller.processes
        ]


class BoundedLines(logging.Formatter):
    """Cut what is too long, whoever logs it: nobody may fill the disk with one line."""

    def format(self, record: logging.LogRecord) -> str:
        return clip(super().format(record), MAX_LOG_CHARS)


def _log_to_stderr() -> None:
    """Ray keeps each process's stderr in a file of its own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(BoundedLines("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
