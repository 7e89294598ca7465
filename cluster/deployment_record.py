"""What this machine remembers of its deployments, so that commands find them without Ray."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from paceline.errors import ConfigError

VARIABLE = "PACELINE_RUNTIME_DIR"


@dataclass(frozen=True, slots=True)
class DeploymentRecord:
    """One deployment that `up` has begun and `down` has not ended."""

    deployment: str
    up_pid: int
    """The process that starts it; means nothing once it is up."""
    started_s: float
    """Unix seconds."""
    settings_file: str
    ray_folder: str | None
    """Of a Ray that was started for it; None: it joined another one."""
    ray_address: str = ""
    """Empty until Ray is up."""
    controller_address: str = ""
    """host:port of the control API; empty until it is up."""

    @property
    def is_up(self) -> bool:
        return bool(self.controller_address)

    @property
    def namespace(self) -> str:
        """Ray's name space of the deployment's actors."""
        return namespace_of(self.deployment)


_TYPES: dict[str, tuple[type, ...]] = {
    "deployment": (str,),
    "up_pid": (int,),
    "started_s": (int, float),
    "settings_file": (str,),
    "ray_folder": (str, type(None)),
    "ray_address": (str,),
    "controller_address": (str,),
}


def namespace_of(deployment: str) -> str:
    return f"paceline-{deployment}"


def runtime_dir() -> Path:
    """Name this user's folder of records: $PACELINE_RUNTIME_DIR or /tmp/paceline-UID."""
    given = os.environ.get(VARIABLE)
    return Path(given).absolute() if given else Path(f"/tmp/paceline-{os.getuid()}")


def claim(record: DeploymentRecord) -> None:
    """Write the first record. Raises ConfigError if the deployment is up or being started."""
    folder = runtime_dir()
    with _usable(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise ConfigError(
                f"{folder} belongs to another user; set {VARIABLE} to a folder of your own"
            )
        path = _path(record.deployment)
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            # Whole or not at all: nobody may read half a record.
            partial.write_text(json.dumps(asdict(record)), encoding="utf-8")
            path.hardlink_to(partial)
        except FileExistsError:
            raise ConfigError(_why_taken(find(record.deployment))) from None
        finally:
            partial.unlink(missing_ok=True)


def update(record: DeploymentRecord, **changes: str) -> DeploymentRecord:
    """Write a record again, whole or not at all."""
    changed = replace(record, **changes)  # type: ignore[arg-type]
    path = _path(record.deployment)
    partial = path.with_suffix(".partial")
    with _usable(runtime_dir()):
        partial.write_text(json.dumps(asdict(changed)), encoding="utf-8")
        partial.replace(path)
    return changed


def remove(deployment: str) -> None:
    """Forget a deployment; and the folder, if it was the last one."""
    folder = runtime_dir()
    with _usable(folder):
        _path(deployment).unlink(missing_ok=True)
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def records() -> Iterator[DeploymentRecord]:
    """Yield every deployment of this user on this machine."""
    folder = runtime_dir()
    paths: list[Path] = []
    with _usable(folder), contextlib.suppress(FileNotFoundError):
        paths += [path for path in folder.iterdir() if path.suffix == ".json"]
    for path in sorted(paths):
        record = _read(path)
        if record is not None:
            yield record


def find(deployment: str | None) -> DeploymentRecord:
    """Return a deployment's record; without a name, the only one. Raises ConfigError."""
    found = list(records())
    names = ", ".join(record.deployment for record in found)
    if deployment is not None:
        record = _read(_path(deployment))
        if record is not None:
            return record
        there_are = f"those that are: {names}" if found else "none is"
        raise ConfigError(
            f"the deployment {deployment} is not up on this machine ({there_are}). Start one: "
            "paceline up"
        )
    if not found:
        raise ConfigError("no deployment is up on this machine. Start one: paceline up")
    if len(found) > 1:
        raise ConfigError(
            f"{len(found)} deployments are up on this machine: {names}. Name one: --deployment NAME"
        )
    return found[0]


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    """Raise ConfigError if the block cannot read or write in the folder."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the runtime folder {folder} cannot be used: {error}. Set {VARIABLE} to a short path "
            "that you can write to"
        ) from None


def _path(deployment: str) -> Path:
    return runtime_dir() / f"{deployment}.json"


def _read(path: Path) -> DeploymentRecord | None:
    try:
        with _usable(runtime_dir()), contextlib.suppress(FileNotFoundError):
            record = DeploymentRecord(**json.loads(path.read_text(encoding="utf-8")))
            for name, kinds in _TYPES.items():
                if not isinstance(value := getattr(record, name), kinds):
                    raise TypeError(f"{name} is {value!r}")
            return record
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); remove it") from None


def _why_taken(record: DeploymentRecord) -> str:
    age_s = time.time() - record.started_s
    name = record.deployment
    if record.is_up:
        return (
            f"the deployment {name} is up already, since {age_s:.0f} s, with its control API at "
            f"{record.controller_address}. End it with paceline down --deployment {name}, or start "
            "another one beside it: --set deployment=NAME --set router.grpc_port=0"
        )
    if psutil.pid_exists(record.up_pid):
        return (
            f"the deployment {name} is being started by process {record.up_pid}, since "
            f"{age_s:.0f} s"
        )
    return (
        f"an earlier start of the deployment {name} ended before it was up. Clean up with paceline "
        f"down --deployment {name}, and try again"
    )
