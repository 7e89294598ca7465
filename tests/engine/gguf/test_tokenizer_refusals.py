"""What could give other tokens than llama.cpp's is refused by name."""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_vocabularies import byte_level, sentencepiece
from tokenizers import Tokenizer, pre_tokenizers

from paceline.engine.gguf.pre_tokenizers import PRE_TOKENIZERS, REFUSED_PRE_TOKENIZERS
from paceline.engine.gguf.tokenizer import TOKENIZER_MODELS, end_token_ids, write_tokenizer
from paceline.engine.gguf.vocabulary import TokenKind
from paceline.errors import ConfigError
from paceline.model_files.end_tokens import tokenizer_end


def without(metadata: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name != key}


REFUSED = [
    (byte_level(model="bert"), "tokenizer.ggml.model is 'bert'"),
    (byte_level(model="gemma4"), ", ".join(TOKENIZER_MODELS)),
    (without(byte_level(), "tokenizer.ggml.model"), "tokenizer.ggml.model is None"),
    (byte_level(pre="new-and-unknown"), "'new-and-unknown', which is not implemented"),
    (byte_level(pre="new-and-unknown"), ", ".join(PRE_TOKENIZERS)),
    (without(byte_level(), "tokenizer.ggml.pre"), "has no tokenizer.ggml.pre"),
    *((byte_level(pre=name), why) for name, why in REFUSED_PRE_TOKENIZERS.items()),
    (byte_level(trim_offsets=True), "tokenizer.ggml.trim_offsets = True"),
    (byte_level(suppress_tokens=[5]), "tokenizer.ggml.suppress_tokens"),
    (byte_level(suppress_tokens=5), "suppress_tokens is 5, and it must be a list of numbers"),
    (byte_level(eos_token_id="</s>"), "eos_token_id is '</s>', and it must be the number"),
    (byte_level(bos_token_id=True), "bos_token_id is True, and it must be the number"),
    (byte_level(add_bos_token=1), "add_bos_token is 1, and it must be true or false"),
    (byte_level(tokens="abc"), "tokens is 'abc', and it must be a list of texts"),
    (byte_level() | {"tokenizer.ggml.merges": 3}, "merges is 3, and it must be a list of texts"),
    (byte_level(token_type="n"), "token_type is 'n', and it must be a list of numbers"),
    (byte_level(model=1), "tokenizer.ggml.model is 1, and it must be a text"),
    (byte_level() | {"tokenizer.chat_template.x": 1}, "template.x is 1, and it must be a text"),
    (byte_level() | {"general.name": "My Phi-3 Mini"}, "'My Phi-3 Mini'"),
    (byte_level() | {"tokenizer.chat_templates": ["tool"]}, "tokenizer.chat_template.tool"),
    (without(byte_level(), "tokenizer.ggml.tokens"), "has no tokenizer.ggml.tokens"),
    (byte_level(tokens=["a", "b", "a"]), "the token 'a' twice, as 0 and 2"),
    (byte_level(token_type=[1]), "262 tokens and 1 values in tokenizer.ggml.token_type"),
    (byte_level({"x1": 9}), "token 262 is 9"),
    (sentencepiece(scores=[0.0]), "1 values in tokenizer.ggml.scores"),
    (without(byte_level(), "tokenizer.ggml.merges"), "has no tokenizer.ggml.merges"),
    (byte_level(merges=("a b",)) | {"tokenizer.ggml.merges": ["a c"]}, "'ac' is not a token"),
    (byte_level(without="a", merges=()) | {"tokenizer.ggml.merges": ["a b"]}, "'a' is not"),
    (byte_level() | {"tokenizer.ggml.merges": ["ab"]}, "has 'ab', and '' is not a token"),
    (byte_level(without="x", pre="llama-bpe"), "1 bytes have no token"),
    (byte_level({"<0x0A>": TokenKind.BYTE}), "'<0x0A>' is of the type byte"),
    (byte_level({"<mask>": 3}, pre="jina-v2-de"), "the vocabulary has <mask>"),
    (byte_level({"\u0120a": TokenKind.USER_DEFINED}), "looks like bytes"),
    (without(byte_level(), "tokenizer.ggml.eos_token_id"), "has no tokenizer.ggml.eos_token_id"),
    (byte_level(eot_token_id=262), "tokenizer.ggml.eot_token_id is 262"),
    (byte_level(pre="roberta-bpe"), "tokenizer.ggml.seperator_token_id is absent"),
    (without(byte_level(pre="tekken"), "tokenizer.ggml.bos_token_id"), "bos_token_id is absent"),
    (byte_level({"<PAD>": 3, "[PAD]": 3}), "'<PAD>' and '[PAD]', which mean the same"),
    (byte_level({"<PRE>": 1, "<fim_prefix>": 1}), "tokenizer.ggml.fim_pre_token_id"),
    (byte_level({"<|x<|": 3, "<|y|>": 3}), "'<|x<|' and '<|y|>' can overlap"),
    (sentencepiece({"<0x>": (TokenKind.BYTE, 0.0)}), "Wrong or absent: <0x>"),
    (sentencepiece(token_type=[1] * 298), "Wrong or absent: <0x00>"),
    (without(sentencepiece(), "tokenizer.ggml.scores"), "has no tokenizer.ggml.scores"),
    (sentencepiece({"int": (1, -3.0)}), "have the same score, -3.0"),
    (sentencepiece({"ax": (1, -70.0)}), "'x' is not a token of its own"),
    (sentencepiece({"hell": (1, math.nan)}), "'hell', is not a number"),
    (byte_level(token_type=["1"] * 262), "token_type is ['1', "),
    (byte_level(token_type=[True] * 262), "it must be a list of numbers"),
    (byte_level(token_type=np.ones(262, bool)), "it must be a list of numbers"),
    (byte_level(token_type=[math.inf] * 262), "token_type of token 0 is inf"),
    (byte_level(tokens=["a" * 5000] * 2), "aaa... twice"),
    (
        byte_level({"<|tool_response>": 1}) | {"tokenizer.chat_template": "{{ eos_token }}"},
        "does not end a generation at '</s>'",
    ),
    (byte_level({"<|tool_response>": 1}, add_eos_token=True), "does not end a generation at"),
]  # fmt: skip


@pytest.mark.parametrize(("metadata", "message"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_could_give_other_tokens_is_refused_by_name(
    metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        write_tokenizer(metadata, tmp_path)
    assert message in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_keys_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    harmless = {
        "tokenizer.ggml.remove_extra_whitespaces": True,
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.huggingface.json": "{}",
        "tokenizer.ggml.suppress_tokens": [],
    }
    write_tokenizer(byte_level() | harmless, tmp_path)
    with_keys = (tmp_path / "tokenizer.json").read_text()
    write_tokenizer(byte_level(), tmp_path)
    assert with_keys == (tmp_path / "tokenizer.json").read_text()


def test_a_key_says_which_token_counts_where_two_texts_mean_the_same() -> None:
    vocabulary = byte_level({"<PAD>": 3, "[PAD]": 3}, fim_pad_token_id=263)
    assert end_token_ids(vocabulary) == (2, 263)


def test_tokenizer_config_has_special_tokens_and_every_chat_template(tmp_path: Path) -> None:
    metadata = byte_level(
        unknown_token_id=0, padding_token_id=0, seperator_token_id=1, mask_token_id=2
    ) | {
        "tokenizer.chat_template": "main",
        "tokenizer.chat_template.tool_use": "tools",
        "tokenizer.chat_templates": ["tool_use"],
    }
    write_tokenizer(metadata, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] is config["add_eos_token"] is False
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "mask_token")
    assert [config[name] for name in names] == ["<s>", "</s>", "<pad>", "<pad>", "<s>", "</s>"]
    named = {entry["name"]: entry["template"] for entry in config["chat_template"]}
    assert named == {"default": "main", "tool_use": "tools"}


def test_one_chat_template_is_written_as_a_string(tmp_path: Path) -> None:
    write_tokenizer(byte_level() | {"tokenizer.chat_template": "main"}, tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == "main"


def test_generated_text_shows_user_defined_tokens_and_no_control_tokens(tmp_path: Path) -> None:
    write_tokenizer(byte_level({"<｜think｜>": 4}), tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokens = tokenizer.encode("<s>a<｜think｜>é</s>").ids
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "a<｜think｜>é"


def test_bytes_that_never_occur_need_no_token(tmp_path: Path) -> None:
    never = "".join(map(chr, (0xC0, 0xC1, *range(0xF5, 0x100))))
    assert set(never) <= set(pre_tokenizers.ByteLevel.alphabet())
    write_tokenizer(byte_level(without=never, pre="llama-bpe"), tmp_path)


def test_a_token_that_does_not_end_generations_comes_back_through_no_file(tmp_path: Path) -> None:
    """A folder's end tokens are all that any of its files names."""
    vocabulary = byte_level({"<|tool_response>": 1})
    write_tokenizer(vocabulary, tmp_path)
    assert tokenizer_end(tmp_path).value is None
    assert vocabulary["tokenizer.ggml.eos_token_id"] not in end_token_ids(vocabulary)


def test_the_merges_of_a_very_long_token_are_found_in_little_time(tmp_path: Path) -> None:
    """Trying each place where it may be cut would take hours."""
    started_s = time.process_time()
    write_tokenizer(sentencepiece({"ab" * 500_000: (1, -70.0)}), tmp_path)
    assert time.process_time() - started_s < 2
