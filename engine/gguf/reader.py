"""Read the header of a GGUF file: its keys, and where its tensors lie.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the package
gguf is not used: it keeps NumPy arrays for every token of the vocabulary, which takes seconds, and
it says nothing about the architecture before that.
"""

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from paceline.errors import ConfigError, UnsupportedModelError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4

# The formats of struct, by the number of a value's type in the file.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_OTHER_FORMATS = {
    b"vers": "a pointer of git-lfs and not the model: fetch the file itself (git lfs pull)",
    b"lmgg": "in a format older than GGUF: convert the model again",
    b"fmgg": "in a format older than GGUF: convert the model again",
    b"tjgg": "in a format older than GGUF: convert the model again",
}


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor as the file holds it."""

    name: str
    shape: tuple[int, ...]
    """The order of PyTorch: the last dimension is contiguous."""
    type_id: int
    """Number of the ggml type, such as 0 for F32."""
    data: npt.NDArray[np.uint8]
    """The bytes, mapped from the file."""


@dataclass(frozen=True, slots=True, eq=False)
class GgufFile:
    """A file's header."""

    path: Path
    architecture: str
    metadata: Mapping[str, Any]
    """Every key: int, float, bool, str, list of str, or NumPy array of numbers."""
    tensors: Mapping[str, StoredTensor]


def read_architecture(path: Path) -> str:
    """Read the architecture only, which takes milliseconds for a file of any size.

    Raises UnsupportedModelError if it is not implemented, ConfigError if the file is damaged.
    """
    cursor = _open(path)
    _num_tensors, num_keys = cursor.scalar("Q"), cursor.scalar("Q")
    for key, value in _key_values(cursor, num_keys):
        if key == "general.architecture":
            return _check_architecture(path, value)
    return _check_architecture(path, None)


def read_gguf(path: Path) -> GgufFile:
    """Read all keys, and map all tensors.

    Raises UnsupportedModelError for an architecture or a ggml type that is not implemented,
    ConfigError if the file is damaged.
    """
    architecture = read_architecture(path)
    cursor = _open(path)
    num_tensors, num_keys = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for key, value in _key_values(cursor, num_keys):
        if key in metadata:
            raise cursor.damaged(f"the key {key} is there twice")
        metadata[key] = value
    tensors = _tensors(cursor, num_tensors, _alignment(cursor, metadata))
    return GgufFile(path, architecture, metadata, tensors)


class _Cursor:
    """Reads values one after the other, and never beyond the file's end."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.at = 0

    def damaged(self, what: str) -> ConfigError:
        return ConfigError(
            f"{self.path} cannot be read as GGUF: {what}. Download the file again, or convert the "
            "model again."
        )

    def take(self, num_bytes: int) -> int:
        """Step over bytes; return where they begin."""
        start, end = self.at, self.at + num_bytes
        if end > len(self.buffer):
            raise self.damaged(
                f"it has {len(self.buffer)} bytes and was cut short: byte {end} is missing"
            )
        self.at = end
        return start

    def scalar(self, code: str) -> Any:
        start = self.take(struct.calcsize(f"<{code}"))
        return struct.unpack_from(f"<{code}", self.buffer, start)[0]

    def string(self) -> str:
        start = self.take(self.scalar("Q"))
        try:
            return self.buffer[start : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"the text at byte {start} is not UTF-8 ({error.reason})") from error

    def value(self, key: str) -> Any:
        type_id = self.scalar("I")
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            return self._array(key)
        return self.scalar(self._code(key, type_id))

    def _array(self, key: str) -> Any:
        type_id, length = self.scalar("I"), self.scalar("Q")
        if type_id == _STRING:
            return [self.string() for _ in range(length)]
        dtype = np.dtype(self._code(key, type_id)).newbyteorder("<")
        start = self.take(length * dtype.itemsize)
        return np.frombuffer(self.buffer[start : self.at], dtype)

    def _code(self, key: str, type_id: int) -> str:
        if type_id not in _SCALARS:
            raise self.damaged(f"the key {key} has a value of the unknown type {type_id}")
        return _SCALARS[type_id]


def _open(path: Path) -> _Cursor:
    """Map the file, check what it starts with, and step to the number of tensors."""
    try:
        if path.stat().st_size == 0:
            raise ConfigError(f"{path} is empty. Download the file again.")
        with path.open("rb") as file:
            cursor = _Cursor(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error}. Make it readable for this user."
        ) from error
    magic = bytes(cursor.buffer[:4])
    if magic != b"GGUF":
        what = _OTHER_FORMATS.get(magic, f"not GGUF: it starts with {magic!r}. Choose another file")
        raise ConfigError(f"{path} is {what}, or set model.path to a safetensors folder.")
    cursor.take(4)
    version = cursor.scalar("I")
    if version & 0xFFFF == 0:
        raise UnsupportedModelError(
            f"{path} was written for big-endian machines. Convert the model again without "
            "--bigendian."
        )
    if version not in VERSIONS:
        raise UnsupportedModelError(
            f"{path} has version {version} of GGUF; implemented are {VERSIONS[0]} and "
            f"{VERSIONS[1]}. Convert the model again."
        )
    return cursor


def _key_values(cursor: _Cursor, num_keys: int) -> Iterator[tuple[str, Any]]:
    for _ in range(num_keys):
        key = cursor.string()
        yield key, cursor.value(key)


def _check_architecture(path: Path, architecture: Any) -> str:
    if isinstance(architecture, str) and architecture in ARCHITECTURES:
        return str(architecture)
    named = "no architecture" if architecture is None else f"the architecture {architecture!r}"
    raise UnsupportedModelError(
        f"{path} names {named}, which is not implemented for GGUF files. Choose a file of one of: "
        f"{', '.join(ARCHITECTURES)}."
    )


def _alignment(cursor: _Cursor, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {alignment!r}, and must be a power of two")
    return alignment


def _tensors(cursor: _Cursor, num_tensors: int, alignment: int) -> dict[str, StoredTensor]:
    """Read where the tensors lie, one behind the other, and map them."""
    entries = [_tensor_entry(cursor) for _ in range(num_tensors)]
    start = _aligned(cursor.at, alignment)
    data = np.memmap(cursor.path, np.uint8, mode="r")
    tensors: dict[str, StoredTensor] = {}
    expected = 0
    for name, shape, type_id, offset in entries:
        num_bytes = _num_bytes(cursor, name, shape, type_id)
        if name in tensors:
            raise cursor.damaged(f"the tensor {name} is there twice")
        if offset != expected:
            raise cursor.damaged(f"the tensor {name} begins at {offset} instead of {expected}")
        end = start + offset + num_bytes
        if end > len(data):
            raise cursor.damaged(
                f"it has {len(data)} bytes and was cut short: the tensor {name} ends at byte {end}"
            )
        tensors[name] = StoredTensor(name, shape, type_id, data[end - num_bytes : end])
        expected = _aligned(offset + num_bytes, alignment)
    return tensors


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    num_dimensions = cursor.scalar("I")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise cursor.damaged(f"the tensor {name} has {num_dimensions} dimensions, not 1 to 4")
    contiguous_first = tuple(cursor.scalar("Q") for _ in range(num_dimensions))
    return name, contiguous_first[::-1], cursor.scalar("I"), cursor.scalar("Q")


def _num_bytes(cursor: _Cursor, name: str, shape: tuple[int, ...], type_id: int) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_id)]
    except (ValueError, KeyError):
        raise UnsupportedModelError(
            f"{cursor.path} has the tensor {name} in the ggml type {type_id}, which the installed "
            "package gguf does not know. Update the package, or choose another quantisation."
        ) from None
    if shape[-1] % block_elements:
        raise cursor.damaged(
            f"the tensor {name} has rows of {shape[-1]} elements, no multiple of {block_elements}"
        )
    return math.prod(shape) // block_elements * block_bytes


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
