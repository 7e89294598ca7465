"""Read settings: defaults, then the YAML file, then flags; remember where each value came from."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from paceline.cluster.setting_errors import describe, value_problems
from paceline.cluster.settings import DeploymentSettings, known_keys, walk
from paceline.errors import ConfigError

DEFAULT_FILE = Path(__file__).with_name("local.yaml")
_MODEL_PATH = "model.path"
_SECTIONS = frozenset(key.rpartition(".")[0] for key in known_keys())


class Source(Enum):
    """What set a value; later ones beat earlier ones."""

    DEFAULT = "default"
    FILE = "file"
    FLAG = "flag"


class Origin(NamedTuple):
    """Where a value came from."""

    source: Source
    where: str = ""
    """Such as `local.yaml line 7` or `--set decode.replicas=2`."""


class SettingOrigin(NamedTuple):
    """One setting with its value and origin."""

    key: str
    value: object
    origin: Origin


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings that can work, and where each came from."""

    settings: DeploymentSettings
    origins: Mapping[str, Origin]
    """By key path; what is missing is a default."""

    def explain(self) -> list[SettingOrigin]:
        """List every setting with its origin, in the order of declaration."""
        default = Origin(Source.DEFAULT)
        return [
            SettingOrigin(key, value, self._origin_of(key, default))
            for key, value in walk(self.settings)
        ]

    def changed(self) -> list[SettingOrigin]:
        """List the settings that the file or a flag set."""
        return [entry for entry in self.explain() if entry.origin.source is not Source.DEFAULT]

    def _origin_of(self, key: str, default: Origin) -> Origin:
        # A setting may hold a mapping (prefill.resources.CPU): then its own keys have the origin.
        inner = (at for name, at in self.origins.items() if name.startswith(f"{key}."))
        return self.origins.get(key) or next(inner, default)


def load_settings(path: Path, overrides: Sequence[str] = ()) -> LoadedSettings:
    """Read a file and `--set` flags. Raises ConfigError: keys, lines, and what is allowed."""
    tree, origins = _read_file(path)
    for override in overrides:
        _apply_override(override, tree, origins)
    places = {key: origin.where for key, origin in origins.items()}
    try:
        settings = DeploymentSettings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(describe(error, places, path.name)) from None
    if problems := value_problems(walk(settings), places, path.name):
        raise ConfigError("\n".join(problems))
    return LoadedSettings(settings, origins)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Origin]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"the settings file {path} does not exist; name another one, or leave it out to use "
            f"{DEFAULT_FILE}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the settings file {path} cannot be read: {error}") from None
    with _yaml_of(path.name):
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{path.name} holds a {type(tree).__name__}; it must be a mapping with keys such as "
            "model, prefill and decode"
        )
    with _yaml_of(path.name):
        origins = {
            key: Origin(Source.FILE, f"{path.name} line {line}")
            for key, line in _lines(node, "", path.name)
        }
    model = tree.get("model")
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        model["path"] = _from_folder(model["path"], path.resolve().parent)
    return tree, origins


@contextlib.contextmanager
def _yaml_of(what: str) -> Iterator[None]:
    """Raise ConfigError for whatever is wrong with YAML.

    PyYAML has errors of its own, and lets others through: for a date that is none, a tag that does
    not fit, a number of too many digits, or an alias within itself.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{what} is not valid YAML: {error}") from None


def _lines(node: yaml.MappingNode, path: str, file_name: str) -> Iterator[tuple[str, int]]:
    first_lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key = f"{path}.{key_node.value}" if path else str(key_node.value)
        line = key_node.start_mark.line + 1
        if key in first_lines:
            raise ConfigError(
                f"{file_name} line {line}: {key} is set for the second time, after line "
                f"{first_lines[key]}; keep one of them"
            )
        first_lines[key] = line
        yield key, line
        if isinstance(value_node, yaml.MappingNode):
            yield from _lines(value_node, key, file_name)


def _apply_override(override: str, tree: dict[str, Any], origins: dict[str, Origin]) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"--set {override} must read --set section.key=value")
    with _yaml_of(f"--set {override}: the value"):
        value = yaml.safe_load(text)
    if key == _MODEL_PATH and isinstance(value, str):
        value = _from_folder(value, Path.cwd())
    *sections, name = key.split(".")
    inner = tree
    for section in sections:
        child = inner.setdefault(section, {})
        if child is None:  # the file has the section, with nothing in it
            child = inner[section] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
        inner = child
    if key in _SECTIONS and not isinstance(value, dict):
        raise ConfigError(
            f"--set {override}: {key} is a section; set one of its keys, such as "
            f"{next(k for k in known_keys() if k.startswith(f'{key}.'))}"
        )
    inner[name] = value
    origins[key] = Origin(Source.FLAG, f"--set {override}")


def _from_folder(model_path: str, folder: Path) -> str:
    """Make a relative path absolute: processes run in other folders. Names of other forms stay."""
    if ":" in model_path or Path(model_path).is_absolute():
        return model_path
    return str(folder / Path(model_path).expanduser())
