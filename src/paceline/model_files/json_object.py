"""Read a JSON file that must hold an object."""

import json
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the file; raises ConfigError if it cannot be read or holds no object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_doubles)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} cannot be read as JSON: {error}. Download the model again."
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no JSON object. Download the model again.")
    return values


def read_json_object_if_there(path: Path) -> dict[str, Any]:
    """Read the file; an absent one says nothing."""
    return read_json_object(path) if path.exists() else {}


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; of a key that is there twice, Python would take the last in silence."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {double!r} is there twice")
    return values
