"""Every key of a GGUF file is used, is known to change nothing, or is refused by name."""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import gguf_keys, gguf_tensors, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_references import VOCAB_SIZE, make_model

from paceline.engine.gguf.config import describe_model
from paceline.engine.gguf.keys import HARMLESS, ONLY, USED, check_keys
from paceline.engine.gguf.metadata import Metadata
from paceline.engine.gguf.reader import GgufFile, read_gguf
from paceline.engine.model_config import parse_model_config
from paceline.errors import PacelineError, UnsupportedModelError

DOCUMENT = Path(__file__).parents[3] / "docs" / "gguf.md"
ARCHITECTURES = ["llama", "qwen2", "qwen3"]


def documented(section: str) -> dict[str, str]:
    """Return the rows of a section's table: key and what stands beside it."""
    text = DOCUMENT.read_text(encoding="utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", text, re.MULTILINE)
    assert len(dict(rows)) == len(rows), "a key is there twice"
    return dict(rows)


def keys_of_the_package(of: type = gguf.Keys) -> Iterator[str]:
    for name, value in vars(of).items():
        if isinstance(value, str) and not name.startswith("_"):
            yield value
        elif isinstance(value, type):
            yield from keys_of_the_package(value)


def metadata(architecture: str = "llama", **values: Any) -> Metadata:
    return Metadata(Path("model.gguf"), architecture, values)


def check(key: str, value: Any, architecture: str = "llama") -> None:
    check_keys(metadata(architecture, **{key: value}))


def test_the_documented_keys_are_those_of_the_code() -> None:
    assert documented("Keys that are used").keys() == set(USED)
    assert documented("Keys that change nothing").keys() == set(HARMLESS)
    values = {key: f"`{value!r}`" for key, value in ONLY.items()}
    assert documented("Keys with one value") == values


def test_every_key_that_the_format_defines_is_documented() -> None:
    """A new version of the package gguf may bring more: decide what each does."""
    accepted = [*USED, *HARMLESS, *ONLY]
    refused = documented("Keys that are refused")
    for key in keys_of_the_package():
        is_accepted = any(fnmatchcase(key, pattern) for pattern in accepted)
        is_refused = any(fnmatchcase(key, pattern) for pattern in refused)
        assert is_accepted or is_refused, key


@pytest.mark.parametrize("pattern", documented("Keys that are refused"))
def test_refused_keys_are_named_with_their_value(pattern: str) -> None:
    key = pattern.replace("{arch}", "llama").replace("*", "something")
    with pytest.raises(UnsupportedModelError, match=rf"{re.escape(key)} = 7"):
        check(key, 7)


@pytest.mark.parametrize(
    "key", ["llama.new_key", "qwen2.block_count", "generalx.name", "general.new_key", "block_count"]
)
def test_an_unknown_key_is_refused_by_name(key: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"{re.escape(key)} = 'x'"):
        check(key, "x")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pattern", ONLY)
def test_a_key_with_one_value_is_refused_with_another(pattern: str, architecture: str) -> None:
    wanted: Any = ONLY[pattern]
    key = pattern.replace("{arch}", architecture)
    check(key, wanted, architecture)
    others: list[Any] = [f"{wanted}x", np.array([1, 2]), ["x"]]
    others += [] if isinstance(wanted, str) else [3, 0.5]
    for other in others:
        with pytest.raises(UnsupportedModelError, match=rf"{re.escape(key)} = .*only {wanted!r}"):
            check(key, other, architecture)


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        check("llama.new_key", np.arange(100_000))
    assert len(str(refusal.value)) < 400


def test_a_part_of_a_split_file_is_refused_with_the_number_of_parts() -> None:
    with pytest.raises(UnsupportedModelError, match=r"one of the 3 files.*llama-gguf-split"):
        check_keys(metadata(**{"split.count": 3, "split.no": 1}))
    check_keys(metadata(**{"split.count": 1, "split.no": 0}))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> GgufFile:
    """Write a file in which every used key says something that another value would change."""
    model = make_model("LlamaForCausalLM", num_hidden_layers=1)
    tensors = gguf_tensors(model)
    keys = gguf_keys(model) | {
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.scale": 0.25,
        "llama.attention.sliding_window": 512,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5000.0,
        "llama.rope.scale_linear": 4.0,
        "llama.rope.scaling.attn_factor": 0.9,
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 128,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.yarn_beta_fast": 30.0,
        "llama.rope.scaling.yarn_beta_slow": 2.0,
        "llama.vocab_size": VOCAB_SIZE,
        "general.alignment": 32,
        "split.count": 1,
        "split.tensors.count": len(tensors),
        "tokenizer.ggml.tokens": [f"t{n}" for n in range(VOCAB_SIZE)],
        "tokenizer.ggml.eos_token_id": 3,
        "general.name": "small",
    }
    return read_gguf(write_gguf(tmp_path_factory.mktemp("keys") / "model.gguf", keys, tensors))


def describe(file: GgufFile, key: str, value: Any) -> dict[str, Any] | str:
    """Describe the file's model with another value of a key, None: without it; or the refusal."""
    values = {name: old for name, old in file.metadata.items() if name != key}
    if value is not None:
        values[key] = value
    try:
        model = describe_model(GgufFile(file.path, file.architecture, values, file.tensors))
        parse_model_config(model, {}, "config.json")
        return model
    except PacelineError as refusal:
        return str(refusal)


# Tests of the reader, the tensors and the tokenizer have these.
ELSEWHERE = {"general.architecture", "general.alignment", "split.tensors.count", "tokenizer.*"}


@pytest.mark.parametrize("pattern", sorted(set(USED) - ELSEWHERE))
def test_a_used_key_changes_what_is_served_or_is_refused(pattern: str, file: GgufFile) -> None:
    key = pattern.replace("{arch}", "llama")
    value = file.metadata[key]
    other = {"yarn": "linear", 512: 256}.get(value, value * 2)
    outcome = describe(file, key, other)
    if isinstance(outcome, str):
        assert any(name in outcome for name in file.metadata), outcome
    assert outcome != describe_model(file)


@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_a_key_without_which_the_shape_is_unknown_is_named(key: str, file: GgufFile) -> None:
    assert f"no key llama.{key}" in str(describe(file, f"llama.{key}", None))


KEYS_OF_A_FILE = [
    pattern.replace("{arch}", "llama").replace("*", "x")
    for pattern in (*USED, *HARMLESS, *ONLY, *documented("Keys that are refused"), "{arch}.unknown")
    if pattern not in ("general.architecture", "tokenizer.*")
]
VALUES = st.one_of(
    st.integers(-1, 5),
    st.integers(0, 2**64 - 1),
    st.floats(0, 4),
    st.floats(width=32),
    st.text(max_size=4),
    st.booleans(),
    st.lists(st.text(max_size=4), max_size=3),
    st.lists(st.integers(0, 5), max_size=3).map(np.array),
)


# Absent, or with another value, they may say what holds without them.
MAY_CHANGE_NOTHING = [
    *(pattern.replace("{arch}", "llama") for pattern in (*HARMLESS, *ONLY)),
    "general.alignment",
    "split.count",
    "split.tensors.count",
    "llama.vocab_size",
    "llama.attention.key_length",
    "llama.attention.value_length",
    "llama.attention.scale",
    "llama.attention.sliding_window",
    "llama.rope.dimension_count",
    "llama.rope.scale_linear",
    "llama.rope.scaling.factor",
]


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(key=st.sampled_from(KEYS_OF_A_FILE), value=st.one_of(st.none(), VALUES))
def test_any_value_of_any_key_changes_the_model_or_is_refused_or_is_known_to_change_nothing(
    file: GgufFile, key: str, value: Any
) -> None:
    outcome = describe(file, key, value)
    says_the_same = value is None and key not in file.metadata
    if isinstance(value, int | float | str | np.ndarray) and key in file.metadata:
        # A list counts as its number if all of them are the same.
        says_the_same = {file.metadata[key]} == set(np.atleast_1d(value).tolist())
    assert (
        outcome != describe_model(file)
        or says_the_same
        or any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE_NOTHING)
    )
