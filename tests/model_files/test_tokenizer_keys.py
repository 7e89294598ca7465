"""The table of tokenizer keys is the one in the documentation, and says what happens."""

import json
import re
from pathlib import Path

import pytest
from tiny_tokenizer import byte_tokenizer

from paceline.errors import UnsupportedModelError
from paceline.model_files.tokenizer import read_tokenizer
from paceline.model_files.tokenizer_keys import TOKENIZER_CONFIG_KEYS, Key, Use

PAGE = Path(__file__).resolve().parents[2] / "docs" / "model-folder.md"


def row_of(key: Key) -> str:
    use = key.use.value
    if key.harmless_values:
        use += " unless " + " or ".join(f"`{json.dumps(value)}`" for value in key.harmless_values)
    return f"| `{key.name}` | {use} | {key.why} |"


def test_documentation_has_the_table_of_the_code() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("### Keys of `tokenizer_config.json`")[2]
    rows = re.findall(r"^\| `.*\|$", text, re.MULTILINE)
    assert rows == [row_of(key) for key in TOKENIZER_CONFIG_KEYS]


def test_no_key_has_two_uses() -> None:
    names = [key.name for key in TOKENIZER_CONFIG_KEYS]
    assert len(names) == len(set(names))


def write(folder: Path, name: str, value: object) -> Path:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({name: value}))
    return folder


@pytest.mark.parametrize(
    "key",
    [key for key in TOKENIZER_CONFIG_KEYS if key.use is Use.REFUSED],
    ids=lambda key: key.name,
)
def test_refused_key_is_refused_but_for_its_harmless_values(key: Key, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=key.name):
        read_tokenizer(write(tmp_path, key.name, "something"))
    for value in (None, *key.harmless_values):
        read_tokenizer(write(tmp_path, key.name, value))


@pytest.mark.parametrize(
    "key",
    [key for key in TOKENIZER_CONFIG_KEYS if key.use is Use.HARMLESS],
    ids=lambda key: key.name,
)
def test_harmless_key_changes_no_token(key: Key, tmp_path: Path) -> None:
    plain = byte_tokenizer().to_str()
    read = read_tokenizer(write(tmp_path, key.name, "something"))
    assert read.tokenizer.to_str() == plain
    assert not read.roles
