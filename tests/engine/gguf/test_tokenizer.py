"""The tokens of GGUF vocabularies are llama.cpp's.

llama_tokens.json holds what llama.cpp gave. With PACELINE_NODE_LLAMA_CPP set to a folder with
node_modules/node-llama-cpp in it, the tests ask llama.cpp again; with PACELINE_UPDATE_EXPECTED set
too, they write what it says.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from gguf_vocabularies import (
    TEXTS,
    VOCABULARIES,
    all_pairs,
    draw_texts,
    small_smollm2,
    smollm2_metadata,
    write_gguf,
)
from tokenizers import Tokenizer

from paceline.engine.gguf.pre_tokenizers import PRE_TOKENIZERS
from paceline.engine.gguf.tokenizer import end_token_ids, write_tokenizer

HERE = Path(__file__).parent
EXPECTED = HERE / "llama_tokens.json"

SMALL_TEXTS = (
    "",
    "Hello the abab ababa aababab",
    "  Hello   the     a       ab        x",
    "<s>Hello</s> the<|im_end|>\n",
    "<s> <s>a</s>  <pad>ab <unk>",
    "<|im_start|>He<|im_end|> 世界 é ñ\n\n\n\n\n",
    "xyz xyzxyz axyz xyz",
    "schön öÀ voilà ÷ñ",
    "axb ax b xab abxab a\nb aÃb",
    "\n\n\n\n  \n\n\n\n\n      a",
    "\U0009e4bbabab \x00\x04",
    "▁▁a ▁the",
    "<fim_prefix><|fim_pad|><|start|><|channel|><|end|><halt><|tool_response>[EMPTY_262]",
    "abababaabababab" * 4 + " " * 41 + "the",
    "aba" * 30,
)


CASES = (
    *(f"{kind}: {name}" for kind in ("pre", "pairs") for name in PRE_TOKENIZERS),
    "SmolLM2",
    *VOCABULARIES,
)


class Case(NamedTuple):
    metadata: Mapping[str, Any]
    texts: tuple[str, ...]


def read_case(name: str) -> Case:
    kind, _, pre_tokenizer = name.partition(": ")
    pre = {"tokenizer.ggml.pre": pre_tokenizer}
    match kind:
        case "pre":
            return Case(small_smollm2() | pre, TEXTS)
        case "pairs":
            return Case(all_pairs() | pre, draw_texts())
        case "SmolLM2":
            return Case(smollm2_metadata(), TEXTS)
        case _:
            return Case(VOCABULARIES[name], SMALL_TEXTS)


class Answer(NamedTuple):
    """What llama.cpp says: the tokens of each text, what goes around them, what ends."""

    tokens: list[list[int]]
    bos: int | None
    eos: int | None
    ends: list[int]


@cache
def read_expected() -> dict[str, Answer]:
    file = json.loads(EXPECTED.read_text(encoding="utf-8"))
    return {
        name: Answer(
            # Each list of tokens of a text is stored once.
            [
                file["tokens"][text][at]
                for text, at in zip(read_case(name).texts, which, strict=True)
            ],
            *rest,
        )
        for name, (which, *rest) in file["cases"].items()
    }


def write_expected(answers: Mapping[str, Answer]) -> None:
    tokens: dict[str, list[list[int]]] = {}
    rows = {}
    for name, answer in answers.items():
        which = []
        for text, found in zip(read_case(name).texts, answer.tokens, strict=True):
            known = tokens.setdefault(text, [])
            if found not in known:
                known.append(found)
            which.append(known.index(found))
        rows[name] = [which, *answer[1:]]
    text = json.dumps({"tokens": tokens, "cases": rows}, separators=(",", ":"))
    EXPECTED.write_text(text + "\n", encoding="utf-8")


def convert(metadata: Mapping[str, Any], folder: Path) -> Tokenizer:
    write_tokenizer(metadata, folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", CASES)
def test_a_text_has_the_tokens_that_llama_cpp_gives_it(name: str, tmp_path: Path) -> None:
    metadata, texts = read_case(name)
    answer = read_expected()[name]
    tokenizer = convert(metadata, tmp_path)
    for text, tokens in zip(texts, answer.tokens, strict=True):
        around = [[] if token is None else [token] for token in (answer.bos, answer.eos)]
        assert tokenizer.encode(text, add_special_tokens=False).ids == tokens, text
        assert tokenizer.encode(text).ids == [*around[0], *tokens, *around[1]], text
    assert list(end_token_ids(metadata)) == answer.ends


@pytest.mark.parametrize("name", ["SmolLM2", "pre: llama-bpe", "pre: deepseek-llm"])
def test_byte_level_tokens_give_the_text_back(name: str, tmp_path: Path) -> None:
    metadata, texts = read_case(name)
    tokenizer = convert(metadata, tmp_path)
    # SmolLM2 has no tokens for some bytes, and llama.cpp drops them.
    given = [text for text in texts if name != "SmolLM2" or text.isprintable()]
    assert len(given) > 20
    for text in given:
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokens, skip_special_tokens=False) == text


def test_user_defined_byte_characters_are_shown_as_they_are(tmp_path: Path) -> None:
    tokenizer = convert(VOCABULARIES["byte characters as tokens"], tmp_path)
    text = "schön öÀ voilà ñ"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("name", ["sentencepiece", "sentencepiece without space"])
def test_sentencepiece_tokens_give_the_text_back(name: str, tmp_path: Path) -> None:
    tokenizer = convert(VOCABULARIES[name], tmp_path)
    for text in TEXTS:
        if "▁" not in text and not any(token in text for token in ("<s>", "</s>", "<unk>")):
            assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_llama_cpp_still_gives_the_expected_tokens(tmp_path: Path) -> None:
    package = os.environ.get("PACELINE_NODE_LLAMA_CPP")
    node = shutil.which("node")
    if package is None or node is None:
        pytest.skip(
            "PACELINE_NODE_LLAMA_CPP names no folder with node-llama-cpp, or node is absent"
        )
    request = []
    for number, name in enumerate(CASES):
        metadata, texts = read_case(name)
        path = tmp_path / f"{number}.gguf"
        write_gguf(metadata, path)
        request.append({"path": str(path), "texts": texts})
    asked = tmp_path / "request.json"
    asked.write_text(json.dumps(request))
    done = subprocess.run(
        [node, str(HERE / "llama_tokens.mjs"), package, str(asked)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [Answer(**answer) for answer in json.loads(done.stdout)]
    answers = dict(zip(CASES, found, strict=True))
    if "PACELINE_UPDATE_EXPECTED" in os.environ:
        write_expected(answers)
    assert answers == read_expected()
