"""The controller's world in Ray: detached, named actors in the deployment's namespace."""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from paceline.cluster.devices import GPU, worker_resources
from paceline.cluster.hosted import BuildHosted
from paceline.cluster.launcher import (
    Capacity,
    Membership,
    ProcessDiedError,
    ProcessReport,
    Remembered,
    Started,
)
from paceline.cluster.process_state import ProcessName, Role
from paceline.cluster.ray_head import answers
from paceline.cluster.resources import pool_settings
from paceline.cluster.settings import DeploymentSettings
from paceline.engine.host_memory import host_memory
from paceline.errors import PacelineError

logger = logging.getLogger(__name__)

KEY_SPACE = "paceline"
"""Of Ray's key-value store, which outlives the controller."""
NUMBERS_A_CONTROLLER = 1 << 40
"""More than one can give: incarnations and versions of memberships."""
UNAVAILABLE_RETRY_S = 0.1
LOG_LINES = 5
Result = TypeVar("Result")


class RayProcess:
    """A `ProcessActor` seen from the controller."""

    def __init__(self, name: ProcessName, actor: "ActorHandle[Any]") -> None:
        self.name = name
        self._actor = actor
        self._pid: int | None = None
        self._here: psutil.Process | None = None
        """None if it runs on another machine, or has not said where."""
        self._log_path = ""

    async def start(self) -> Started:
        # First, so that its process and log are known if the start ends it.
        self._note(await self._patiently(self._actor.report.remote))
        started: Started = await self._patiently(self._actor.start.remote)
        return started

    async def wait(self) -> None:
        await self._patiently(self._actor.wait.remote)

    async def report(self) -> ProcessReport:
        report: ProcessReport = await self._call(self._actor.report.remote())
        self._note(report)
        return report

    def end(self) -> str | None:
        if self._here is None or _lives(self._here):
            return None
        return _why_it_ended(self._pid, self._log_path)

    async def update_membership(self, membership: Membership) -> None:
        await self._call(self._actor.update_membership.remote(membership))

    async def drain(self) -> None:
        await self._call(self._actor.drain.remote())

    async def stop(self) -> None:
        await self._call(self._actor.stop.remote())

    async def kill(self) -> None:
        if self._here is not None:
            # Ray asks; a process that was stopped by a signal, or that hangs in C, does not hear.
            with contextlib.suppress(psutil.Error):
                self._here.kill()
        if await _gcs_answers():
            await asyncio.to_thread(ray.kill, self._actor, no_restart=True)

    def _note(self, report: ProcessReport) -> None:
        self._log_path = report.log_path
        if self._pid != report.pid:
            self._pid = report.pid
            with contextlib.suppress(psutil.Error):
                self._here = psutil.Process(report.pid) if report.host == this_host() else None

    async def _patiently(self, call: "Callable[[], Awaitable[Result]]") -> Result:
        """Repeat a call while the actor is out of reach but not known to be dead."""
        while True:
            try:
                return await call()
            except ActorUnavailableError:
                await asyncio.sleep(UNAVAILABLE_RETRY_S)
            except RayError as error:
                raise self._died(error) from None

    async def _call(self, reference: "Awaitable[Result]") -> Result:
        try:
            return await reference
        except RayError as error:
            raise self._died(error) from None

    def _died(self, error: RayError) -> ProcessDiedError:
        if isinstance(error, RayTaskError):
            cause = error.cause
            text = (
                str(cause)
                if isinstance(cause, PacelineError)
                else f"{type(cause).__name__}: {cause}"
            )
            return ProcessDiedError(text)
        if isinstance(error, RayActorError):
            return ProcessDiedError(_why_it_ended(self._pid, self._log_path))
        return ProcessDiedError(f"Ray lost it: {error}")


class RayLauncher:
    """Starts and finds the actors of one deployment. Must be used inside a Ray process."""

    def __init__(
        self,
        settings: DeploymentSettings,
        namespace: str,
        build: BuildHosted,
        actor_class: type[object],
    ) -> None:
        self._settings = settings
        self._namespace = namespace
        self._build = build
        self._actor_class = actor_class

    async def launch(self, name: ProcessName, router_port: int) -> RayProcess:
        return await asyncio.to_thread(self._launch, name, router_port)

    def _launch(self, name: ProcessName, router_port: int) -> RayProcess:
        resources: dict[str, float] = {}
        if name.role.is_worker:
            resources = worker_resources(pool_settings(self._settings, name.role))
        actor: ActorHandle[Any] = (
            ray.remote(self._actor_class)  # type: ignore[assignment]
            .options(
                name=str(name),
                namespace=self._namespace,
                lifetime="detached",
                max_restarts=0,  # the controller replaces it, under a new incarnation
                max_concurrency=1000,
                num_cpus=resources.pop("CPU", 0.0),
                num_gpus=resources.pop(GPU, 0.0),
                resources=resources,
            )
            .remote(name, self._settings, self._build, router_port)
        )
        return RayProcess(name, actor)

    async def adopt(self) -> list[RayProcess]:
        return await asyncio.to_thread(self._find)

    async def problem(self) -> str:
        if await _gcs_answers():
            return ""
        return gcs_is_away(_gcs_address(), has_own_ray=self._settings.ray.address is None)

    async def capacity(self) -> Capacity:
        return await asyncio.to_thread(cluster_capacity)

    async def save(self, remembered: Remembered) -> None:
        await asyncio.to_thread(put_remembered, self._namespace, remembered)

    async def load(self) -> Remembered | None:
        value = _internal_kv_get(self._key("remembered"), namespace=KEY_SPACE.encode())
        if not value:
            return None
        wanted, router_ports = json.loads(value)
        return Remembered({Role(role): size for role, size in wanted.items()}, router_ports)

    async def first_number(self) -> int:
        # Of the clock, so that deployments one after the other have unlike numbers.
        key, space = self._key("numbers"), KEY_SPACE.encode()
        first = max(time.time_ns(), int(_internal_kv_get(key, namespace=space) or 0))
        _internal_kv_put(key, str(first + NUMBERS_A_CONTROLLER).encode(), namespace=space)
        return first

    def save_port(self, port: int) -> None:
        """Remember the control API's port: clients know it, so a new controller takes it again."""
        put_control_port(self._namespace, port)

    def load_port(self) -> int:
        """Return the remembered port, 0 if there is none."""
        return int(_internal_kv_get(self._key("port"), namespace=KEY_SPACE.encode()) or 0)

    def _find(self) -> list[RayProcess]:
        found: list[RayProcess] = []
        for name in actor_names(self._namespace):
            parsed = ProcessName.parse(name)
            if parsed is not None:
                with contextlib.suppress(ValueError):  # it died between the list and now
                    found.append(RayProcess(parsed, ray.get_actor(name, self._namespace)))
        return found

    def _key(self, name: str) -> bytes:
        return _key(self._namespace, name)


def put_remembered(namespace: str, remembered: Remembered) -> None:
    """Leave it in Ray's store to the controller of this namespace that starts next."""
    wanted = {role.value: size for role, size in remembered.wanted.items()}
    value = json.dumps([wanted, dict(remembered.router_ports)])
    key = _key(namespace, "remembered")
    _internal_kv_put(key, value.encode(), namespace=KEY_SPACE.encode())


def put_control_port(namespace: str, port: int) -> None:
    """Leave the control API's port to the controller of this namespace that starts next."""
    _internal_kv_put(_key(namespace, "port"), str(port).encode(), namespace=KEY_SPACE.encode())


def actor_names(namespace: str) -> list[str]:
    """List the names of all living actors of a namespace."""
    entries: list[dict[str, str]] = ray.util.list_named_actors(all_namespaces=True)
    return [entry["name"] for entry in entries if entry["namespace"] == namespace]


def forget_keys(namespace: str) -> None:
    """Remove what controllers of this namespace remembered."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(f"{namespace}/", del_by_prefix=True, namespace=KEY_SPACE.encode())


def cluster_capacity() -> Capacity:
    """Ask Ray and this machine what there is."""
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return Capacity(resources, len(nodes), *host_memory())


def _key(namespace: str, name: str) -> bytes:
    return f"{namespace}/{name}".encode()


def this_host() -> str:
    """Return this machine's address in the Ray cluster."""
    host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return host


def gcs_is_away(address: str, *, has_own_ray: bool) -> str:
    """Say that a Ray's GCS does not answer, what goes on without it, and what to do."""
    what_to_do = (
        "Ray and the deployment are started again as soon as no request runs"
        if has_own_ray
        else "Bring the head of that Ray cluster back, or end the deployment (paceline down) and "
        "start it on another one"
    )
    return (
        f"Ray's GCS at {address} does not answer: serving goes on, but what dies is not replaced. "
        f"{what_to_do}"
    )


async def _gcs_answers() -> bool:
    """Look before a call of Ray's that would wait for its GCS without end."""
    return await asyncio.to_thread(answers, _gcs_address())


def _gcs_address() -> str:
    address: str = ray.get_runtime_context().gcs_address
    return address


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _why_it_ended(pid: int | None, log_path: str) -> str:
    """Say what is known of a process that is gone: the last errors in its log."""
    if pid is None:
        return "its process ended before it said anything (Ray's log raylet.out says more)"
    what = f"its process {pid} ended: killed by a signal, out of memory, or crashed"
    try:
        lines = Path(log_path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # it ran on another machine
        return what
    errors = [line for line in lines if "Error" in line or "Fatal" in line][-LOG_LINES:]
    return f"{what}. Its log ends with: {' | '.join(errors)}" if errors else what
