"""The folder in which this machine remembers a user's deployments. Nobody else may write there."""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from paceline.errors import ConfigError

VARIABLE = "PACELINE_RUNTIME_DIR"


def runtime_dir() -> Path:
    """Name this user's folder: $PACELINE_RUNTIME_DIR or /tmp/paceline-UID."""
    given = os.environ.get(VARIABLE)
    return Path(given).absolute() if given else Path(f"/tmp/paceline-{os.getuid()}")


def ray_folder(deployment: str) -> Path:
    """Name the folder of a deployment's own Ray."""
    digest = hashlib.blake2b(deployment.encode(), digest_size=4).hexdigest()
    return runtime_dir() / f"r-{digest}"


@contextlib.contextmanager
def usable(*, create: bool = False) -> Iterator[Path]:
    """Give the folder, which may be absent unless it is created, to a block that uses it.

    Raises ConfigError if the block cannot read or write there, or if others could have: what they
    leave in /tmp may be meant to be taken for ours.
    """
    folder = runtime_dir()
    try:
        if create:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            _check_owner(folder)
        yield folder
    except OSError as error:
        raise ConfigError(
            f"the runtime folder {folder} cannot be used: {error}. Set {VARIABLE} to a short path "
            "that you can write to"
        ) from None


def _check_owner(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        what = "a link" if stat.S_ISLNK(found.st_mode) else "no folder"
        problem = f"is {what}"
    elif found.st_uid != os.getuid():
        problem = f"belongs to user {found.st_uid}, and this process is of user {os.getuid()}"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        problem = f"has the mode {found.st_mode & 0o777:o}, with which other users can write there"
    else:
        return
    raise ConfigError(
        f"the runtime folder {folder} {problem}, so what it holds cannot be trusted. Remove it, "
        f"take others' right to write away (chmod go-w), or set {VARIABLE} to a folder of your own"
    )
