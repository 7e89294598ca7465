"""The header of a GGUF file is read as gguf's own reader reads it, and damage is named."""

import contextlib
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.gguf.config import describe_model
from paceline.engine.gguf.reader import read_architecture, read_gguf
from paceline.errors import ConfigError, UnsupportedModelError

KEYS: dict[str, Any] = {
    "llama.block_count": 3,
    "llama.rope.freq_base": 5e5,
    "general.name": "Größe 世界",
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["a", "", "ü"],
    "tokenizer.ggml.scores": [0.5, -1.0, 2.0],
    "llama.attention.head_count_kv": [1, 2, 3],
}
TENSORS = {
    "token_embd.weight": np.arange(40, dtype=np.float32).reshape(10, 4),
    "output_norm.weight": np.ones(4, np.float16),
}
MAGIC = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)


def write(path: Path, keys: dict[str, Any] | None = None) -> Path:
    return write_gguf(path / "model.gguf", KEYS | (keys or {}), TENSORS)


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def write_bytes(path: Path, data: bytes) -> Path:
    file = path / "model.gguf"
    file.write_bytes(data)
    return file


def test_keys_and_tensors_are_those_that_the_package_gguf_reads(tmp_path: Path) -> None:
    path = write(tmp_path)
    file, reference = read_gguf(path), gguf.GGUFReader(path)
    for key, field in reference.fields.items():
        if key.startswith("GGUF."):
            continue
        value = file.metadata[key]
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
    assert file.metadata.keys() >= KEYS.keys()
    assert file.architecture == "llama"
    for theirs in reference.tensors:
        ours = file.tensors[theirs.name]
        assert ours.shape == tuple(theirs.shape[::-1])
        assert ours.type_id == theirs.tensor_type
        assert ours.data.tobytes() == theirs.data.tobytes()
    assert len(file.tensors) == len(reference.tensors)


@pytest.mark.parametrize("alignment", [8, 256])
def test_alignment_of_the_file_is_followed(alignment: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_custom_alignment(alignment)
    for name, tensor in TENSORS.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = {name: tensor.data.tobytes() for name, tensor in read_gguf(path).tensors.items()}
    assert data == {name: tensor.tobytes() for name, tensor in TENSORS.items()}


def test_a_large_vocabulary_is_read_within_a_second_or_two(tmp_path: Path) -> None:
    tokens = [f"token{number}" for number in range(150_000)]
    path = write(tmp_path, {"tokenizer.ggml.tokens": tokens})
    started = time.process_time()
    assert read_gguf(path).metadata["tokenizer.ggml.tokens"] == tokens
    assert time.process_time() - started < 2.0


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    whole = path.read_bytes()
    read_gguf(path)
    end = len(whole.rstrip(b"\0"))
    for length in {1, 3, 4, 7, 20, *range(24, end, 37)}:
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"cut short|is not GGUF"):
            read_gguf(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "git lfs pull"),
        (b"tjgg" + bytes(40), "older than GGUF"),
        (b"PK\3\4" + bytes(40), "not GGUF"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), "version 1 of GGUF"),
        (b"GGUF" + struct.pack("<I", 4) + bytes(40), "version 4 of GGUF"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
        (MAGIC + text("general.name") + struct.pack("<I", 99), "of the unknown type 99"),
        (MAGIC + text("x") + struct.pack("<IIQ", 9, 9, 1), "of the unknown type 9"),
        (MAGIC + text("x") + struct.pack("<IIQ", 9, 4, 1 << 62), "cut short"),
        (MAGIC + struct.pack("<Q", 2) + b"\xff\xfe", "not UTF-8"),
        (MAGIC + struct.pack("<Q", 1 << 63), "cut short"),
    ],
)
def test_what_is_no_readable_gguf_file_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    path = write_bytes(tmp_path, data)
    for read in (read_architecture, read_gguf):
        with pytest.raises(ConfigError, match=message):
            read(path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.gguf cannot be read: .*No such file"):
        read_gguf(tmp_path / "model.gguf")


def test_architecture_that_is_not_implemented_is_refused_with_the_list(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", {}, {}, "falcon")
    with pytest.raises(UnsupportedModelError, match=r"falcon.*llama, qwen2, qwen3"):
        read_gguf(path)
    without = write_bytes(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(UnsupportedModelError, match="names no architecture"):
        read_gguf(without)


def test_architecture_is_read_though_the_rest_of_the_file_is_missing(tmp_path: Path) -> None:
    key = text("general.architecture") + struct.pack("<I", 8) + text("qwen3")
    path = write_bytes(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 10**6, 10**6) + key)
    assert read_architecture(path) == "qwen3"


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_changed_byte_is_harmless_or_named(
    tmp_path_factory: pytest.TempPathFactory, place: int, value: int
) -> None:
    path = write(tmp_path_factory.mktemp("changed"))
    data = bytearray(path.read_bytes())
    data[place % len(data)] = value
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        describe_model(read_gguf(path))


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("llama")


def tensor_entry(name: str, shape: tuple[int, ...], type_id: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", type_id, offset)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([tensor_entry("a", (8,)), tensor_entry("a", (8,), offset=32)], "a is there twice"),
        ([tensor_entry("a", (8,)), tensor_entry("b", (8,))], "b begins at 0 instead of 32"),
        ([tensor_entry("a", (8,), offset=64)], "a begins at 64 instead of 0"),
        ([tensor_entry("a", ())], "a has 0 dimensions"),
        ([tensor_entry("a", (1, 1, 1, 1, 1))], "a has 5 dimensions"),
        ([tensor_entry("a", (33,), type_id=8)], "rows of 33 elements"),
        ([tensor_entry("a", (8,), type_id=4)], "ggml type 4"),
        ([tensor_entry("a", (8,), type_id=999)], "ggml type 999"),
        ([tensor_entry("a", (1 << 40, 1 << 40))], "cut short"),
    ],
)
def test_tensors_that_cannot_be_are_named(
    entries: list[bytes], message: str, tmp_path: Path
) -> None:
    header = b"GGUF" + struct.pack("<IQQ", 3, len(entries), 1)
    path = write_bytes(tmp_path, header + ARCHITECTURE + b"".join(entries) + bytes(256))
    with pytest.raises(ConfigError, match=message):
        read_gguf(path)


def test_a_key_that_is_there_twice_is_named(tmp_path: Path) -> None:
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * ARCHITECTURE
    with pytest.raises(ConfigError, match=r"general\.architecture is there twice"):
        read_gguf(write_bytes(tmp_path, data))


@pytest.mark.parametrize("alignment", [0, 24])
def test_alignment_that_is_no_power_of_two_is_named(alignment: int, tmp_path: Path) -> None:
    key = text("general.alignment") + struct.pack("<II", 4, alignment)
    data = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + ARCHITECTURE + key
    with pytest.raises(ConfigError, match="power of two"):
        read_gguf(write_bytes(tmp_path, data))


def test_an_architecture_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    value = struct.pack("<IIQ", 9, 4, 2) + struct.pack("<II", 1, 2)  # an array of two numbers
    header = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
    path.write_bytes(header + text("general.architecture") + value)
    with pytest.raises(UnsupportedModelError, match="not implemented"):
        read_architecture(path)
