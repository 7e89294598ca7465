"""The few values at the start of a GGUF file that say whether it can be served.

The gguf package's reader takes seconds: it makes an object of every token of the vocabulary.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from paceline.engine.model_config import MODEL_TYPES
from paceline.errors import ConfigError, UnsupportedModelError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = dict(
    zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), (f"<{code}" for code in "BbHhIif?Qqd"), strict=True)
)
"""Formats of `struct` by GGUF's number of the type."""
_STRING, _ARRAY = 8, 9


class GgufHeader(NamedTuple):
    """What a GGUF file says of its model."""

    architecture: str
    """One of MODEL_TYPES."""
    context_length: int


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header as far as needed.

    Raises ConfigError if the file is no GGUF or is damaged, UnsupportedModelError naming the
    architecture if it is not implemented.
    """
    with path.open("rb") as file:
        keys = _Keys(path, file)
        architecture = keys.find("general.architecture")
        if architecture not in MODEL_TYPES:
            raise UnsupportedModelError(
                f"{path} holds a model of the architecture {architecture!r}, which is not "
                f"implemented. Choose a model with one of: {', '.join(MODEL_TYPES)}."
            )
        length = keys.find(f"{architecture}.context_length")
        if not isinstance(length, int) or length < 1:
            raise ConfigError(
                f"{path} says {architecture}.context_length = {length!r}, and it must be a whole "
                "number of at least 1. Choose another file."
            )
        return GgufHeader(architecture, length)


class _Keys:
    """The keys and values of a file, read in their order and only as far as asked for."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._size = path.stat().st_size
        if self._take(4) != _MAGIC:
            raise ConfigError(f"{path} is no GGUF file, whatever its name says. Download it again.")
        version = self._number("<I")
        if version not in _VERSIONS:
            raise ConfigError(
                f"{path} has version {version} of GGUF (or another byte order), and versions "
                f"{' and '.join(map(str, _VERSIONS))} can be read. Convert the model again."
            )
        self._number("<Q")  # tensors
        self._num_left = self._number("<Q")
        self._values: dict[str, Any] = {}

    def find(self, key: str) -> Any:
        while key not in self._values:
            if not self._num_left:
                raise ConfigError(
                    f"{self._path} has no {key}, without which its model is unknown. Convert the "
                    "model again."
                )
            self._num_left -= 1
            name = self._text()
            self._values[name] = self._value(self._number("<I"))
        return self._values[key]

    def _value(self, kind: int) -> Any:
        """Read a value; of an array, only go past it."""
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(self._format(kind))
        inner, length = self._number("<I"), self._number("<Q")
        if inner in (_STRING, _ARRAY):
            for _ in range(length):
                self._value(inner)
        else:
            self._take(length * struct.calcsize(self._format(inner)))
        return None

    def _format(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise self._damaged(f"a value has the unknown type {kind}")
        return _SCALARS[kind]

    def _text(self) -> str:
        return self._take(self._number("<Q")).decode("utf-8", "replace")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, num_bytes: int) -> bytes:
        taken = self._file.read(num_bytes) if num_bytes <= self._size else b""
        if len(taken) < num_bytes:
            raise self._damaged(f"its header needs {num_bytes} more bytes and the file ends")
        return taken

    def _damaged(self, why: str) -> ConfigError:
        return ConfigError(
            f"{self._path} cannot be read as GGUF: {why}. It may be cut short: download it again."
        )
