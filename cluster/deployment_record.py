"""What this machine remembers of its deployments, so that commands find them without Ray."""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from paceline.cluster.runtime_folder import ray_folder, runtime_dir, usable
from paceline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DeploymentRecord:
    """One deployment that `up` has begun and `down` has not ended."""

    deployment: str
    up_pid: int
    """The process that starts it; means nothing once it is up."""
    started_s: float
    """Unix seconds."""
    settings_file: str
    has_own_ray: bool
    """Whether a Ray was started for it; otherwise it joined another one."""
    ray_address: str = ""
    """Empty until Ray is up."""
    controller_address: str = ""
    """host:port of the control API; empty until it is up."""

    @property
    def is_up(self) -> bool:
        return bool(self.controller_address)

    @property
    def ray_folder(self) -> Path | None:
        """Of its own Ray. Derived, so that no record can name another folder to be removed."""
        return ray_folder(self.deployment) if self.has_own_ray else None

    @property
    def namespace(self) -> str:
        """Ray's name space of the deployment's actors."""
        return namespace_of(self.deployment)


_TYPES: dict[str, tuple[type, ...]] = {
    "deployment": (str,),
    "up_pid": (int,),
    "started_s": (int, float),
    "settings_file": (str,),
    "has_own_ray": (bool,),
    "ray_address": (str,),
    "controller_address": (str,),
}


def namespace_of(deployment: str) -> str:
    return f"paceline-{deployment}"


def claim(record: DeploymentRecord) -> None:
    """Write the first record. Raises ConfigError if the deployment is up or being started."""
    with usable(create=True):
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
    with usable():
        partial.write_text(json.dumps(asdict(changed)), encoding="utf-8")
        partial.replace(path)
    return changed


def remove(deployment: str) -> None:
    """Forget a deployment; and the folder, if it was the last one."""
    with usable() as folder:
        _path(deployment).unlink(missing_ok=True)
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


def records() -> Iterator[DeploymentRecord]:
    """Yield every deployment of this user on this machine."""
    paths: list[Path] = []
    with usable() as folder, contextlib.suppress(FileNotFoundError):
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


def _path(deployment: str) -> Path:
    return runtime_dir() / f"{deployment}.json"


def _read(path: Path) -> DeploymentRecord | None:
    try:
        with usable(), contextlib.suppress(FileNotFoundError):
            record = DeploymentRecord(**json.loads(path.read_text(encoding="utf-8")))
            for name, kinds in _TYPES.items():
                if not isinstance(value := getattr(record, name), kinds):
                    raise TypeError(f"{name} is {value!r}")
            if path.stem != record.deployment:
                raise ValueError(f"it is of the deployment {record.deployment!r}")
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
