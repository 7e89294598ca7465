"""Bring a deployment up, and take it down so that nothing of it is left."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from paceline.cluster import deployment_record, kept_logs, ray_driver, ray_head, signals
from paceline.cluster.build_hosted import build_hosted
from paceline.cluster.deployment_record import DeploymentRecord
from paceline.cluster.early_checks import refuse_early
from paceline.cluster.hosted import BuildHosted
from paceline.cluster.process_state import ProcessState, Role
from paceline.cluster.resources import check_capacity
from paceline.cluster.settings import DeploymentSettings
from paceline.errors import ConfigError, PacelineError, UnavailableError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from paceline.cluster.actors import ProcessSnapshot

POLL_S = 0.05
ASK_POLL_S = 0.2
"""Longest time that a signal waits for Ray."""
CONTROLLER_TIMEOUT_S = 60.0
END_TIMEOUT_S = 30.0


class Watcher(Protocol):
    """Told of each step of the start-up, in order."""

    def began(self, step: str) -> None:
        """A step has begun."""

    def ended(self, step: str, seconds: float) -> None:
        """A step has ended well."""

    def processes(self, snapshots: "list[ProcessSnapshot]") -> None:
        """How the processes do; called many times while they start."""


class Deployment(NamedTuple):
    """A deployment that is up."""

    record: DeploymentRecord
    seconds: float
    """From the call of `up` to READY."""


def up(
    settings: DeploymentSettings,
    settings_file: str,
    watcher: Watcher,
    build: BuildHosted = build_hosted,
    check: Callable[[DeploymentSettings], None] = refuse_early,
) -> Deployment:
    """Start everything, and return when every process is READY.

    `check` raises what is wrong with the settings before anything is started. Raises ConfigError
    or UnavailableError with the cause, and leaves nothing behind then but the logs of a Ray that
    was started here; a note on the error says where they are.
    """
    started = time.monotonic()
    record = DeploymentRecord(
        deployment=settings.deployment,
        up_pid=os.getpid(),
        started_s=time.time(),
        settings_file=settings_file,
        has_own_ray=settings.ray.address is None,
    )
    is_claimed = False
    try:
        with signals.held():  # a signal in between would leave the record
            deployment_record.claim(record)
            is_claimed = True
        kept_logs.forget(record.deployment)
        with _step(watcher, "look at the model and the ports"):
            check(settings)
        with contextlib.ExitStack() as membership:
            with _step(watcher, "start Ray" if record.ray_folder else "reach Ray"):
                address = _prepare_ray(settings, record)
                membership.enter_context(ray_driver.joined(record, address))
                record = deployment_record.update(record, ray_address=address)
            with _step(watcher, "start the controller"):
                controller, control_address = _start_controller(settings, record, build)
            with _step(watcher, "start the processes"):
                _wait_until_ready(settings, controller, watcher)
        record = deployment_record.update(record, controller_address=control_address)
    except BaseException as error:
        if not is_claimed:
            raise  # the record, if there is one, is of another start
        # Whatever the reason, a signal included: nothing may stay but the logs of a failure.
        if record.ray_folder is not None and isinstance(error, Exception):
            logs = kept_logs.keep(record.deployment, record.ray_folder)
            if logs is not None:
                error.add_note(f"Logs of the start: {logs}, until the next one of this name")
        _end(record)
        raise
    return Deployment(record, time.monotonic() - started)


def down(deployment: str | None) -> DeploymentRecord:
    """Let routers end their streams for their drain_timeout_s, then end everything.

    A signal meanwhile means hurry: nothing is waited for any more, and still nothing is left.
    """
    record = deployment_record.find(deployment)
    _end(record)
    return record


def end_own(deployment: str) -> None:
    """End a deployment that this process has begun to start, if anything of it is there."""
    for record in deployment_record.records():
        if record.deployment == deployment and record.up_pid == os.getpid():
            _end(record)


@contextlib.contextmanager
def connected(record: DeploymentRecord) -> "Iterator[ActorHandle[Any]]":
    """Connect to the deployment's Ray, for tests and tools that need its actors."""
    with ray_driver.joined(record, record.ray_address):
        import ray

        yield ray.get_actor("controller", record.namespace)


def _prepare_ray(settings: DeploymentSettings, record: DeploymentRecord) -> str:
    """Start a Ray, or find the one to join; return its address."""
    if record.ray_folder is not None:
        return ray_head.start(record.ray_folder, settings.ray)
    address = settings.ray.address
    assert address is not None
    if not ray_head.answers(address, min(5.0, settings.ray.start_timeout_s)):
        raise ConfigError(
            f"no Ray answers at {address} (ray.address). Start one there, or leave ray.address "
            "out to have one started on this machine"
        )
    return address


def _start_controller(
    settings: DeploymentSettings, record: DeploymentRecord, build: BuildHosted
) -> "tuple[ActorHandle[Any], str]":
    import ray

    from paceline.cluster.actors import CONTROLLER_NAME, ControllerActor
    from paceline.cluster.ray_launcher import actor_names, cluster_capacity

    if actor_names(record.namespace):
        raise ConfigError(
            f"the Ray cluster at {record.ray_address} has a deployment {settings.deployment} "
            "already, started from another machine or user. Choose another name: --set "
            "deployment=NAME"
        )
    wanted = {
        Role.PREFILL: settings.prefill.replicas,
        Role.DECODE: settings.decode.replicas,
    }
    check_capacity(settings, wanted, wanted, cluster_capacity())
    controller: ActorHandle[Any] = (
        ray.remote(ControllerActor)  # type: ignore[assignment]
        .options(
            name=CONTROLLER_NAME,
            namespace=record.namespace,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=8,
            num_cpus=0,
        )
        .remote(settings, record.namespace, build)
    )
    return controller, _ask(controller.address.remote(), CONTROLLER_TIMEOUT_S)


def _wait_until_ready(
    settings: DeploymentSettings, controller: "ActorHandle[Any]", watcher: Watcher
) -> None:
    wanted = settings.router.replicas + settings.prefill.replicas + settings.decode.replicas
    deadline = time.monotonic() + settings.controller.start_timeout_s
    while True:
        snapshots: list[ProcessSnapshot] = _ask(controller.snapshot.remote(), CONTROLLER_TIMEOUT_S)
        watcher.processes(snapshots)
        for process in snapshots:
            if process.failure:
                raise UnavailableError(f"{process.worker_id} did not start: {process.failure}")
        if len(snapshots) == wanted and all(s.state is ProcessState.READY for s in snapshots):
            return
        if time.monotonic() > deadline:
            late = ", ".join(s.worker_id for s in snapshots if s.state is not ProcessState.READY)
            raise UnavailableError(
                f"{late} not READY after {settings.controller.start_timeout_s:g} s "
                "(controller.start_timeout_s)"
            )
        time.sleep(POLL_S)


def _end(record: DeploymentRecord) -> None:
    # Nothing of a start that failed is worth a word when its whole Ray goes with it.
    goes_with_ray = record.ray_folder is not None and not record.is_up
    with signals.held() as hold:
        if record.ray_address and not goes_with_ray and ray_head.answers(record.ray_address):
            try:
                _end_actors(record, hold)
            except PacelineError:
                if record.ray_folder is None:
                    raise
                # What did not end by itself is killed with its Ray.
        if record.ray_folder is not None:
            ray_head.stop(record.ray_folder)
        deployment_record.remove(record.deployment)


def _end_actors(record: DeploymentRecord, hold: signals.Hold) -> None:
    """End what the controller knows, then whatever actor of the deployment is still there."""
    with ray_driver.joined(record, record.ray_address):
        import ray
        from ray.exceptions import RayError

        from paceline.cluster.ray_launcher import actor_names, forget_keys

        with contextlib.suppress(ValueError, RayError, PacelineError):
            controller = ray.get_actor("controller", record.namespace)
            _ask(controller.shut_down.remote(), END_TIMEOUT_S + CONTROLLER_TIMEOUT_S, hold)
        deadline = time.monotonic() + END_TIMEOUT_S
        while (names := actor_names(record.namespace)) and time.monotonic() < deadline:
            for name in names:
                with contextlib.suppress(ValueError):
                    ray.kill(ray.get_actor(name, record.namespace), no_restart=True)
            time.sleep(POLL_S)
        if names:
            raise UnavailableError(f"actors {', '.join(names)} of {record.namespace} do not end")
        forget_keys(record.namespace)


def _ask(reference: Any, timeout_s: float, hold: signals.Hold | None = None) -> Any:
    """Wait for an actor's answer; its own error comes as it was raised.

    Signals come between Ray's calls: within one, Ray makes another exception of what they raise. A
    signal that the caller holds ends the wait.
    """
    import ray
    from ray.exceptions import RayTaskError

    deadline = time.monotonic() + timeout_s
    is_ready: list[Any] = []
    while not is_ready:
        if time.monotonic() > deadline:
            raise UnavailableError(f"the controller did not answer within {timeout_s:g} s")
        with signals.held():
            is_ready, _ = ray.wait([reference], timeout=ASK_POLL_S)
        if hold is not None and hold.has_signal:
            raise UnavailableError("a signal ended the wait for the controller")
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, PacelineError):
            raise error.cause from None
        raise


@contextlib.contextmanager
def _step(watcher: Watcher, name: str) -> "Iterator[None]":
    started = time.monotonic()
    watcher.began(name)
    yield
    watcher.ended(name, time.monotonic() - started)
