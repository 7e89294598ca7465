"""Turn the tokenizer of a GGUF file into tokenizer.json and tokenizer_config.json.

The tokens of a text are those of llama.cpp, with special tokens recognised in the text. What could
give others is refused by name: docs/gguf-tokenizers.md.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from paceline.engine.gguf.byte_level import build_byte_level, find_pre_tokenizer
from paceline.engine.gguf.metadata import short
from paceline.engine.gguf.sentencepiece import build_sentencepiece
from paceline.engine.gguf.special_tokens import SpecialTokens, read_special_tokens
from paceline.engine.gguf.tokenizer_keys import chat_templates, check_keys
from paceline.engine.gguf.vocabulary import Vocabulary, read_vocabulary
from paceline.errors import ConfigError, UnsupportedModelError

TOKENIZER_MODELS = ("gpt2", "llama")

_LLAMA_IDS = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
"""What llama.cpp assumes where a file with the model `llama` says nothing."""


def write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Write the tokenizer that `metadata` describes, by GGUF key, into `folder`.

    Raises UnsupportedModelError or ConfigError naming what is not implemented or wrong.
    """
    parts = _read(metadata)
    tokenizer = _build(metadata, parts)
    config = json.dumps(_config(metadata, parts), indent=2, ensure_ascii=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")


def end_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the tokens that end a generation in llama.cpp, in ascending order.

    Raises UnsupportedModelError or ConfigError as `write_tokenizer` does.
    """
    return _read(metadata).special.ends


class _Parts(NamedTuple):
    vocabulary: Vocabulary
    special: SpecialTokens
    add_bos: bool
    add_eos: bool


def _read(metadata: Mapping[str, Any]) -> _Parts:
    check_keys(metadata)
    _check_model(metadata)
    _check_name(metadata)
    if len(metadata.get("tokenizer.ggml.suppress_tokens", ())) > 0:
        raise UnsupportedModelError(
            "tokenizer.ggml.suppress_tokens names tokens that must never be sampled, which is not "
            "implemented. Choose another model."
        )
    vocabulary = read_vocabulary(metadata)
    is_llama = metadata["tokenizer.ggml.model"] == "llama"
    if not is_llama and "tokenizer.ggml.eos_token_id" not in metadata:
        raise ConfigError(
            "the GGUF file has no tokenizer.ggml.eos_token_id, and llama.cpp would end at token "
            "11, whatever it is. Convert the model again."
        )
    special = read_special_tokens(metadata, vocabulary, _LLAMA_IDS if is_llama else {})
    pre_tokenizer = None if is_llama else find_pre_tokenizer(metadata)
    parts = _Parts(
        vocabulary,
        special,
        add_bos=metadata.get(
            "tokenizer.ggml.add_bos_token",
            is_llama if pre_tokenizer is None else pre_tokenizer.add_bos,
        ),
        add_eos=metadata.get("tokenizer.ggml.add_eos_token", False),
    )
    add_sep = metadata.get(
        "tokenizer.ggml.add_sep_token", pre_tokenizer is not None and pre_tokenizer.add_sep
    )
    for name, added, token_id in (
        ("bos", parts.add_bos, special.bos),
        ("eos", parts.add_eos, special.eos),
        ("seperator", add_sep, special.separator),
    ):
        if added and token_id is None:
            raise ConfigError(
                f"a text gets a token that the GGUF file does not name: tokenizer.ggml.{name}"
                "_token_id is absent. Convert the model again."
            )
    return parts


def _check_model(metadata: Mapping[str, Any]) -> None:
    model = metadata.get("tokenizer.ggml.model")
    if model not in TOKENIZER_MODELS:
        raise UnsupportedModelError(
            f"tokenizer.ggml.model is {model!r}, which is not implemented. Choose a model with one "
            f"of {', '.join(TOKENIZER_MODELS)}."
        )


def _check_name(metadata: Mapping[str, Any]) -> None:
    name = str(metadata.get("general.name", ""))
    if any(phi in name.lower() for phi in ("phi-3", "phi3")):
        raise UnsupportedModelError(
            f"general.name is {name!r}. llama.cpp drops blanks behind the special tokens of models "
            "with phi-3 in their names, which is not implemented. Choose another model."
        )


def _build(metadata: Mapping[str, Any], parts: _Parts) -> Tokenizer:
    vocabulary, special = parts.vocabulary, parts.special
    is_llama = metadata["tokenizer.ggml.model"] == "llama"
    build = build_sentencepiece if is_llama else build_byte_level
    tokenizer = build(metadata, vocabulary, special)
    tokenizer.add_special_tokens(_added(vocabulary, special.hidden, special=True))
    tokenizer.add_tokens(_added(vocabulary, special.shown, special=False))
    before = {"bos": special.bos} if parts.add_bos else {}
    behind = {"eos": special.eos} if parts.add_eos else {}
    if before or behind:
        tokenizer.post_processor = TemplateProcessing(
            single=[*before, "$A", *behind],
            special_tokens=[
                {"id": name, "ids": [token_id], "tokens": [vocabulary.text(token_id)]}
                for name, token_id in (before | behind).items()
            ],
        )
    return tokenizer


def _added(vocabulary: Vocabulary, token_ids: frozenset[int], *, special: bool) -> list[AddedToken]:
    return [
        AddedToken(vocabulary.tokens[token_id], normalized=False, special=special)
        for token_id in sorted(token_ids)
    ]


def _config(metadata: Mapping[str, Any], parts: _Parts) -> dict[str, Any]:
    special = parts.special
    texts = {
        "bos_token": special.bos,
        "eos_token": _end_for_config(metadata, parts),
        "unk_token": special.unknown,
        "pad_token": special.padding,
        "sep_token": special.separator,
        "mask_token": special.mask,
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is
        "add_bos_token": parts.add_bos,
        "add_eos_token": parts.add_eos,
        "clean_up_tokenization_spaces": False,
    }
    config |= {
        name: parts.vocabulary.tokens[token_id]
        for name, token_id in texts.items()
        if token_id is not None
    }
    templates = chat_templates(metadata)
    if templates.keys() == {"default"}:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [
            {"name": name, "template": template} for name, template in templates.items()
        ]
    return config


def _end_for_config(metadata: Mapping[str, Any], parts: _Parts) -> int | None:
    """Return the token to write as eos_token, which ends generations wherever it is written.

    In some vocabularies llama.cpp does not end at the file's own: then there is none to write.
    """
    eos = parts.special.eos
    if eos is None or eos in parts.special.ends:
        return eos
    if parts.add_eos or any("eos_token" in text for text in chat_templates(metadata).values()):
        raise UnsupportedModelError(
            f"llama.cpp does not end a generation at {short(parts.vocabulary.tokens[eos])}, which "
            "tokenizer.ggml.eos_token_id names, because of other tokens of this vocabulary. That "
            "is not implemented where a text or a chat template gets the token. Choose another "
            "model."
        )
    return None
