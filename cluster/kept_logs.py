"""Logs of starts that failed, which stay when everything else of such a start is removed."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from paceline.cluster.runtime_folder import runtime_dir

MAX_STARTS = 5
"""Deployments with kept logs; of each, those of its last start."""
MAX_FILES = 200
MAX_FILE_BYTES = 1 << 20
"""The end of a log says why, so that is what is kept of a longer one."""


def keep(deployment: str, ray_folder: Path) -> Path | None:
    """Copy the logs below a Ray's folder, and return where they are now; None: there are none.

    A failure to copy is no error: the start has one already, which must be told.
    """
    logs = list(_newest(ray_folder.glob("session_latest/logs/**/*")))[:MAX_FILES]
    if not logs:
        return None
    forget(deployment)
    kept = _folder() / deployment
    with contextlib.suppress(OSError):
        kept.mkdir(mode=0o700, parents=True)
        for log in logs:
            _copy_end(log, kept / log.name)
        others = [folder for folder in _folder().iterdir() if folder != kept]
        for old in sorted(others, key=_changed_s, reverse=True)[MAX_STARTS - 1 :]:
            shutil.rmtree(old, ignore_errors=True)
        return kept
    return None


def forget(deployment: str) -> None:
    """Remove the kept logs of a deployment, if there are any."""
    shutil.rmtree(_folder() / deployment, ignore_errors=True)
    with contextlib.suppress(OSError):  # those of others are there, or nothing ever was
        _folder().rmdir()


def _folder() -> Path:
    return runtime_dir() / "logs"


def _newest(paths: Iterator[Path]) -> list[Path]:
    files = [path for path in paths if path.is_file() and path.stat().st_size > 0]
    return sorted(files, key=_changed_s, reverse=True)


def _changed_s(path: Path) -> float:
    return path.stat().st_mtime


def _copy_end(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        file.seek(max(0, source.stat().st_size - MAX_FILE_BYTES))
        target.write_bytes(file.read(MAX_FILE_BYTES))
