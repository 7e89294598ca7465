"""Every key of tokenizer_config.json: used, harmless, or refused.

tokenizer.json is the tokenizer. These keys can add tokens to it or contradict it. A key that could
change a token and is not used is refused; docs/model-folder.md shows this table.
"""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from paceline.errors import ConfigError, UnsupportedModelError

ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
"""The names of special tokens that every tokenizer can have."""


class Use(Enum):
    """What becomes of a key."""

    USED = "used"
    HARMLESS = "harmless"
    REFUSED = "refused"


class Key(NamedTuple):
    """One key and the reason for its use."""

    name: str
    use: Use
    why: str
    harmless_values: tuple[object, ...] = ()
    """Of a refused key: values that change nothing."""


_USED = {
    **dict.fromkeys(ROLES, "a special token, also a name in the chat template"),
    "additional_special_tokens": "more special tokens",
    "extra_special_tokens": "more special tokens; as a mapping, also names in the chat template",
    "added_tokens_decoder": "tokens with their ids, which must be those of tokenizer.json",
    "add_bos_token": "text begins with the bos token, or does not; absent: tokenizer.json decides",
    "add_eos_token": "text ends with the eos token, or does not; absent: tokenizer.json decides",
    "add_prefix_space": "compared with tokenizer.json, and refused if they disagree",
    "split_special_tokens": "special tokens in a prompt are split like other text",
    "chat_template": "the chat template, unless chat_template.jinja is there",
    "tokenizer_class": "LlamaTokenizer and Qwen2Tokenizer have special tokens by default",
    "bos_token_id": "compared with the id of the token",
    "eos_token_id": "compared with the id of the token",
    "pad_token_id": "compared with the id of the token",
    "unk_token_id": "compared with the id of the token",
}
_HARMLESS = {
    "model_max_length": "config.json and max_model_len limit the length",
    "max_len": "an older name of model_max_length",
    **dict.fromkeys(
        ("max_length", "stride", "truncation", "truncation_side", "truncation_strategy"),
        "prompts are never truncated",
    ),
    **dict.fromkeys(
        ("padding", "padding_side", "pad_to_multiple_of", "pad_token_type_id"),
        "prompts are never padded",
    ),
    **dict.fromkeys(
        ("model_input_names", "return_token_type_ids", "return_tensors"),
        "names what transformers returns beside the tokens",
    ),
    **dict.fromkeys(
        (
            "clean_up_tokenization_spaces",
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
            "spaces_between_special_tokens",
            "errors",
        ),
        "changes text that transformers decodes; paceline returns what the tokens spell",
    ),
    **dict.fromkeys(
        ("legacy", "sp_model_kwargs", "use_fast"),
        "about making tokenizer.json from a SentencePiece model, which is done",
    ),
    "use_default_system_prompt": "no template is built in",
    **dict.fromkeys(
        ("response_template", "response_schema", "chat_control_tokens"),
        "about parsing answers and cleaning messages in transformers",
    ),
    **dict.fromkeys(
        ("name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file"),
        "where the file came from",
    ),
    **dict.fromkeys(
        ("init_inputs", "processor_class", "backend", "files_loaded", "is_local"),
        "how transformers loaded it",
    ),
    **dict.fromkeys(
        ("local_files_only", "trust_remote_code", "device_map", "verbose", "transformers_version"),
        "how transformers loaded it",
    ),
}
_REFUSED: tuple[tuple[str, str, tuple[object, ...]], ...] = (
    ("auto_map", "the model brings code that makes the tokens, which is never run", ()),
    ("fast_tokenizer_files", "names other files for other versions", (["tokenizer.json"],)),
    ("fix_mistral_regex", "splits text differently from tokenizer.json", (False,)),
    ("from_slow", "makes the tokens from a SentencePiece model", (False,)),
    ("do_lower_case", "changes text before it is split", (False,)),
    ("do_basic_tokenize", "changes text before it is split", (True, False)),
    ("never_split", "changes how text is split", ([],)),
    ("strip_accents", "changes text before it is split", (False,)),
    ("tokenize_chinese_chars", "changes how text is split", (False,)),
    ("do_normalize", "changes text before it is split", (False,)),
    ("remove_space", "changes text before it is split", (False,)),
    ("keep_accents", "changes text before it is split", (True,)),
    ("dropout", "makes tokens at random", (0, 0.0)),
)

TOKENIZER_CONFIG_KEYS: tuple[Key, ...] = (
    *(Key(name, Use.USED, why) for name, why in _USED.items()),
    *(Key(name, Use.HARMLESS, why) for name, why in _HARMLESS.items()),
    *(Key(name, Use.REFUSED, why, values) for name, why, values in _REFUSED),
)
_BY_NAME: Mapping[str, Key] = {key.name: key for key in TOKENIZER_CONFIG_KEYS}


def check_tokenizer_keys(config: Mapping[str, Any], path: Path) -> None:
    """Raise UnsupportedModelError for keys that could change tokens and are not implemented.

    A key that is not in the table is accepted if it names a special token (`…_token`, as
    transformers takes it) or if its value says nothing.
    """
    for name, value in config.items():
        key = _BY_NAME.get(name)
        if key is None:
            if not says_nothing(value) and not is_token(name, value):
                raise UnsupportedModelError(
                    f"{path} has {name}, which is not known here: ignoring it could change "
                    "tokens. Remove the key if it is known to change nothing."
                )
        elif key.use is Use.REFUSED and value is not None and value not in key.harmless_values:
            raise UnsupportedModelError(
                f"{path} sets {name} to {value!r}, which is not implemented ({key.why}). Choose "
                "another model, or save its tokenizer again without the key."
            )


def is_token(name: str, value: object) -> bool:
    """Whether a key names a special token."""
    if name not in ROLES and not name.endswith("_token"):
        return False
    return isinstance(value, str) or (isinstance(value, dict) and "content" in value)


def optional_flag(config: Mapping[str, Any], name: str, path: Path) -> bool | None:
    """Return a key that must be true, false, or not there."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{path} sets {name} to {value!r}; it must be true or false.")
    return value


def says_nothing(value: object) -> bool:
    """Whether a key with this value is as good as absent: null, false, or empty."""
    return value is None or value is False or value in ("", [], {})
