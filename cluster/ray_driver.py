"""Make this process a driver of a deployment's Ray for a while, and leave no trace of it.

`ray.init` and `ray.shutdown` change the environment, Ray's own settings and signal handlers.
"""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

from paceline.cluster import ray_head, signals
from paceline.cluster.deployment_record import DeploymentRecord
from paceline.cluster.runtime_folder import runtime_dir
from paceline.errors import ConfigError


@contextlib.contextmanager
def joined(record: DeploymentRecord, address: str) -> Iterator[None]:
    """Join a deployment's Ray for the block. Raises ConfigError with Ray's own words."""
    with _environment(record):
        import ray

        try:
            # Ray puts the driver's working directory on every process's import path: an empty one.
            with contextlib.chdir(runtime_dir()), _undisturbed():
                _init(address, record.namespace)
            # Ray writes each death on our stdout, `up --json` included; the controller reports it.
            with _replaced(ray._private.worker, "print_to_stdstream", _ignore):
                yield
        finally:
            with _undisturbed():
                ray.shutdown()


def _init(address: str, namespace: str) -> None:
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import RayError

    if not _token_can_be_read():
        raise ConfigError(f"{_token_advice(address)}. RAY_AUTH_MODE is token, and there is none")
    try:
        # It fails within seconds and says why; ray.init tries for minutes.
        GcsClient(address=ray._private.services.canonicalize_bootstrap_address(address))
        ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        if (
            type(error).__name__ == "AuthenticationError"
        ):  # older versions of Ray have no such class
            raise ConfigError(f"{_token_advice(address)}. Ray says: {error.args[0]}") from None
        raise ConfigError(f"Ray at {address} cannot be joined: {error}") from None


def _token_advice(address: str) -> str:
    return (
        f"Ray at {address} wants a token, and this process has none or another one. Set "
        "RAY_AUTH_MODE=token, and give the token in RAY_AUTH_TOKEN, in the file that "
        "RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
    )


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let signals wait while Ray starts or stops in this process: cut in half, Ray aborts it.

    Ray's C++ handler of SIGTERM prints a stack trace and sets an alarm that aborts the process 3 s
    later, in the middle of its cleanup: so there is none. In versions of Ray that have no setting
    for it, only the alarm is taken back.
    """
    import ray
    from ray._private import ray_constants

    with (
        signals.held(),
        _replaced(ray._private.utils, "set_sigterm_handler", _ignore),
        _replaced(ray_constants, "RAY_DISABLE_FAILURE_SIGNAL_HANDLER", True),
    ):
        try:
            yield
        finally:
            signal.alarm(0)


@contextlib.contextmanager
def _environment(record: DeploymentRecord) -> Iterator[None]:
    """Give this process the environment of a Ray that `up` started. For another Ray, keep it."""
    folder = record.ray_folder
    changes = {} if folder is None else ray_head.driver_environment(folder)
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        with signals.held():  # imported in part, Ray could not be imported again to clean up
            from ray._private import ray_constants

        # Ray reads the environment when it is imported, which can be long ago.
        is_loopback = os.environ.get(ray_head.LOOPBACK_VARIABLE) == "0"
        with _replaced(ray_constants, "ENABLE_RAY_CLUSTER", not is_loopback):
            _reread_token()
            yield
    finally:
        _set(before)
        _reread_token()


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _reread_token() -> None:
    from ray import _raylet

    # In token mode without a token, a thread that an earlier Ray left would end this process.
    if hasattr(_raylet, "AuthenticationTokenLoader") and _token_can_be_read():
        _raylet.Config.initialize("")  # type: ignore[attr-defined]
        _raylet.AuthenticationTokenLoader.instance().reset_cache()


def _token_can_be_read() -> bool:
    """Whether the token is where the environment says, if it says that Ray shall use one."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or "RAY_AUTH_TOKEN" in os.environ:
        return True
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return (Path(named) if named else Path.home() / ".ray" / "auth_token").is_file()


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _ignore(*args: object, **options: object) -> None:
    """Do nothing."""
