"""Typed access to a GGUF file's keys."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paceline.engine.gguf.reader import GgufFile
from paceline.errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True, slots=True, eq=False)
class Metadata:
    """The keys of one file. The methods take names that follow the architecture's own."""

    path: Path
    architecture: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, file: GgufFile) -> "Metadata":
        return cls(file.path, file.architecture, file.metadata)

    def key(self, name: str) -> str:
        """Return the key as the file has it, such as llama.block_count."""
        return f"{self.architecture}.{name}"

    def count(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """Return a whole number of the architecture.

        A list with a number for each layer counts as that number if all are the same. Raises
        ConfigError if there is none and no default, or if it is too small.
        """
        key = self.key(name)
        value = self._uniform(key)
        if value is None:
            if default is None:
                raise ConfigError(
                    f"{self.path} has no key {key}, without which the model's shape is unknown. "
                    "Convert the model again."
                )
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.wrong(key, value, f"a whole number of at least {minimum}")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        """Return a finite number of the architecture; raises ConfigError as `count` does."""
        key = self.key(name)
        value = self.values.get(key, default)
        if value is None:
            raise ConfigError(f"{self.path} has no key {key}. Convert the model again.")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise self.wrong(key, value, "a finite number")
        return float(value)

    def text(self, name: str, default: str) -> str:
        key = self.key(name)
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, value, "a text")
        return value

    def texts(self, key: str) -> list[str] | None:
        """Return a list of texts, None if there is none; `key` is the whole key."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, list):
            raise self.wrong(key, value, "a list of texts")
        return value

    def wrong(self, key: str, value: object, wanted: str) -> ConfigError:
        return ConfigError(
            f"{self.path} says {key} = {short(value)}, and it must be {wanted}. Convert the model "
            "again."
        )

    def refused(self, key: str, why: str) -> UnsupportedModelError:
        """Return the error for a key whose value would change the output."""
        return UnsupportedModelError(
            f"{self.path} says {key} = {short(self.values[key])}: {why}. Choose another model."
        )

    def _uniform(self, key: str) -> Any:
        value = self.values.get(key)
        if not isinstance(value, np.ndarray):
            return value
        distinct = sorted(set(value.tolist()))
        if len(distinct) != 1:
            raise self.refused(key, "values that differ from layer to layer are not implemented")
        return distinct[0]


def short(value: object) -> str:
    """Format a value for a message, without the whole of a long list."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
