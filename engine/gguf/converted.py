"""The cache of converted GGUF files: each is converted once, into a folder that appears whole."""

import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from paceline.errors import ConfigError, UnsupportedModelError

CACHE_FORMAT = 2
"""Grows when what is written into a cached folder changes."""
CONVERSION_TIMEOUT_S = 1800.0
"""Far longer than converting the largest file takes; another process may be converting it."""
MAX_STEM_BYTES = 128
"""Of the file's name, in the names of the folder and its lock."""
PARTIAL = ".partial-"

OnProgress = Callable[[str, float], None]
"""Called with (what is being done, share of it that is done)."""


class Converted(NamedTuple):
    """A file's folder in the cache."""

    folder: Path
    digest: str
    """Of the file."""


class _FileState(NamedTuple):
    """What changes when a file does. A time of change cannot be set back, unlike the others."""

    device: int
    inode: int
    num_bytes: int
    written_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> "_FileState":
        stat = path.stat()
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def convert_once(source: Path, dtype: str, cache_dir: Path, on_progress: OnProgress) -> Converted:
    """Return the folder of a file, converted now if it is not in the cache.

    Safe to call from several processes at once. Raises ConfigError and UnsupportedModelError, and
    ConfigError for a file that changes meanwhile.
    """
    try:
        state = _FileState.of(source)
        with source.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        raise ConfigError(
            f"{source} cannot be read: {error}. Make it readable for this user."
        ) from None
    # A name may have 255 bytes, and must leave room for the rest of these.
    stem = source.stem.encode()[:MAX_STEM_BYTES].decode(errors="ignore")
    folder = cache_dir / f"{stem}-{digest[:16]}-{dtype}-v{CACHE_FORMAT}"
    if folder.exists():
        return Converted(folder, digest)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock", timeout=CONVERSION_TIMEOUT_S):
            if not folder.exists():
                _convert(source, state, dtype, folder, on_progress)
    except Timeout:
        raise ConfigError(
            f"Another process has held {folder}.lock for {CONVERSION_TIMEOUT_S:.0f} s, and "
            f"{source} cannot be converted meanwhile. Stop that process, or change the cache."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{source} is converted into {cache_dir}, which cannot be written: {error}. Make "
            "room there and let this user write, or name another folder in PACELINE_CACHE_DIR."
        ) from None
    return Converted(folder, digest)


def _convert(
    source: Path, state: _FileState, dtype: str, folder: Path, on_progress: OnProgress
) -> None:
    """Make the folder, whose lock is held."""
    for left in folder.parent.glob(f"{glob.escape(folder.name)}{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)  # its process was killed: it held this lock
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}{PARTIAL}", dir=folder.parent))
    try:
        _run_conversion(source, dtype, partial, on_progress)
        if _FileState.of(source) != state:
            raise ConfigError(
                f"{source} changed while it was being converted, so nothing says which model the "
                "result is. Start again when the file is complete."
            )
        partial.chmod(0o755)  # mkdtemp lets nobody else read
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run_conversion(source: Path, dtype: str, folder: Path, on_progress: OnProgress) -> None:
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "paceline.engine.gguf.conversion"]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints,
        subprocess.Popen(
            [*command, str(source), dtype, str(folder)],
            stdout=subprocess.PIPE,
            stderr=complaints,
            encoding="utf-8",
            env=os.environ | quiet,
        ) as process,
    ):
        deadline = threading.Timer(CONVERSION_TIMEOUT_S, process.kill)
        deadline.start()
        error: dict[str, str] = {}
        try:
            for line in process.stdout or ():
                message = json.loads(line)
                if "progress" in message:
                    on_progress(f"Converting {source.name}", float(message["progress"]))
                else:
                    error = message
            code = process.wait()
        finally:
            deadline.cancel()
            process.kill()
        if code == 0:
            return
        if "error" in error:
            kind = UnsupportedModelError if "Unsupported" in error["error"] else ConfigError
            raise kind(error["message"])
        complaints.seek(0)
        last = complaints.read().strip().splitlines()[-1:] or ["it said nothing"]
        raise ConfigError(
            f"Converting {source} to {dtype} ended with status {code}: {last[0]}. Make sure that "
            f"the disk of {folder.parent} and the memory hold the model, or set model.path to a "
            "safetensors folder."
        )
