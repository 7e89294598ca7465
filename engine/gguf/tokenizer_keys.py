"""What each key `tokenizer.*` of a GGUF file does here.

Every key either is used, is known to change no token and no text, or is refused by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from paceline.engine.gguf.metadata import short
from paceline.errors import ConfigError, UnsupportedModelError

_TEMPLATE_PREFIX = "tokenizer.chat_template."
_TEXTS = frozenset({"tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"})
_LISTS_OF_TEXTS = frozenset(
    {"tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.chat_templates"}
)
_LISTS_OF_NUMBERS = frozenset(
    {
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.scores",
        "tokenizer.ggml.suppress_tokens",
    }
)


@dataclass(frozen=True, slots=True)
class KeyUse:
    """Whether a key is used, and for what; or why it changes nothing."""

    used: bool
    why: str


def _used(why: str) -> KeyUse:
    return KeyUse(used=True, why=why)


def _harmless(why: str) -> KeyUse:
    return KeyUse(used=False, why=why)


TOKENIZER_KEYS: Mapping[str, KeyUse] = MappingProxyType(
    {
        "tokenizer.ggml.model": _used("`gpt2` or `llama`; others are refused"),
        "tokenizer.ggml.pre": _used("the pre-tokenizer of `gpt2`; changes nothing for `llama`"),
        "tokenizer.ggml.tokens": _used("the vocabulary; a text that occurs twice is refused"),
        "tokenizer.ggml.token_type": _used("which tokens are special, user-defined or bytes"),
        "tokenizer.ggml.scores": _used("orders the merges of `llama`; changes nothing for `gpt2`"),
        "tokenizer.ggml.merges": _used("the merges of `gpt2`; changes nothing for `llama`"),
        "tokenizer.ggml.bos_token_id": _used("in front of a text, and in chat templates"),
        "tokenizer.ggml.eos_token_id": _used("ends a generation"),
        "tokenizer.ggml.eot_token_id": _used("ends a generation"),
        "tokenizer.ggml.eom_token_id": _used("ends a generation"),
        "tokenizer.ggml.unknown_token_id": _used("its text is written to tokenizer_config.json"),
        "tokenizer.ggml.padding_token_id": _used("its text is written to tokenizer_config.json"),
        "tokenizer.ggml.seperator_token_id": _used("its text is written to tokenizer_config.json"),
        "tokenizer.ggml.mask_token_id": _used("its text is written to tokenizer_config.json"),
        "tokenizer.ggml.fim_pad_token_id": _used("ends a generation"),
        "tokenizer.ggml.fim_rep_token_id": _used("ends a generation"),
        "tokenizer.ggml.fim_sep_token_id": _used("ends a generation"),
        "tokenizer.ggml.fim_pre_token_id": _used("instead of a token found by its text"),
        "tokenizer.ggml.fim_suf_token_id": _used("instead of a token found by its text"),
        "tokenizer.ggml.fim_mid_token_id": _used("instead of a token found by its text"),
        "tokenizer.ggml.prefix_token_id": _used("old name of `fim_pre_token_id`"),
        "tokenizer.ggml.suffix_token_id": _used("old name of `fim_suf_token_id`"),
        "tokenizer.ggml.middle_token_id": _used("old name of `fim_mid_token_id`"),
        "tokenizer.ggml.add_bos_token": _used(
            "default: true for `llama`, the pre-tokenizer's for `gpt2`"
        ),
        "tokenizer.ggml.add_eos_token": _used("default: false"),
        "tokenizer.ggml.add_sep_token": _used("refused when true without a separator token"),
        "tokenizer.ggml.add_space_prefix": _used(
            "a space before each text of `llama`, default true; changes nothing for `gpt2`"
        ),
        "tokenizer.ggml.suppress_tokens": _used("refused unless it is empty"),
        "tokenizer.chat_template": _used("the default chat template"),
        "tokenizer.chat_templates": _used("the names of further chat templates"),
        _TEMPLATE_PREFIX + "NAME": _used("a further chat template"),
        "tokenizer.ggml.cls_token_id": _harmless("llama.cpp does not read it"),
        "tokenizer.ggml.remove_extra_whitespaces": _harmless("for `t5` only"),
        "tokenizer.ggml.precompiled_charsmap": _harmless("for `t5` only"),
        "tokenizer.ggml.token_type_count": _harmless("for `bert` only"),
        "tokenizer.ggml.normalizer.lowercase": _harmless("for `bert` only"),
        "tokenizer.ggml.normalizer.strip_accents": _harmless("for `bert` only"),
        "tokenizer.huggingface.json": _harmless("llama.cpp does not read it"),
        "tokenizer.rwkv.world": _harmless("llama.cpp does not read it"),
    }
)


def check_keys(metadata: Mapping[str, Any]) -> None:
    """Refuse the keys `tokenizer.*` that nothing here knows, and values of a wrong type."""
    for key, value in metadata.items():
        if not key.startswith("tokenizer."):
            continue
        if key not in TOKENIZER_KEYS and not key.startswith(_TEMPLATE_PREFIX):
            raise UnsupportedModelError(
                f"the GGUF key {key} = {short(value)} is not implemented, and tokens could be "
                "wrong without it. Choose a file without the key, or set model.path to the model's "
                "safetensors folder."
            )
        is_good, wanted = _has_type(key, value)
        if not is_good:
            raise ConfigError(
                f"the GGUF key {key} is {short(value)}, and it must be {wanted}. Convert the model "
                "again."
            )


def _has_type(key: str, value: Any) -> tuple[bool, str]:
    """Tell whether a value has the type of its key, and which type that is."""
    if key.endswith("_token_id"):
        return isinstance(value, int) and not isinstance(value, bool), "the number of a token"
    if key.startswith("tokenizer.ggml.add_"):
        return isinstance(value, bool), "true or false"
    if key in _LISTS_OF_TEXTS:
        return isinstance(value, list) and all(
            isinstance(text, str) for text in value
        ), "a list of texts"
    if key in _LISTS_OF_NUMBERS:
        return _is_list_of_numbers(value), "a list of numbers"
    if key in _TEXTS or key.startswith(_TEMPLATE_PREFIX):
        return isinstance(value, str), "a text"
    return True, ""


def _is_list_of_numbers(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "iuf"
    # A list without elements may be one of texts or of numbers.
    return isinstance(value, list) and all(
        isinstance(number, int | float) and not isinstance(number, bool) for number in value
    )


def chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates by name; the file's main one is `default`.

    Raises UnsupportedModelError for a template that is named and not there.
    """
    templates = {
        key.removeprefix(_TEMPLATE_PREFIX): str(value)
        for key, value in metadata.items()
        if key.startswith(_TEMPLATE_PREFIX)
    }
    for name in metadata.get("tokenizer.chat_templates", ()):
        if name not in templates:
            raise UnsupportedModelError(
                f"the GGUF key tokenizer.chat_templates names {name!r}, and there is no key "
                f"{_TEMPLATE_PREFIX}{name}. Convert the model again."
            )
    if "tokenizer.chat_template" in metadata:
        templates["default"] = str(metadata["tokenizer.chat_template"])
    return templates
