"""The special tokens that a model's folder names beside tokenizer.json.

The order of precedence is that of transformers. Where tokenizer_config.json has
added_tokens_decoder, it is the newer form, and special_tokens_map.json only fills roles that it
leaves out. Without it, special_tokens_map.json replaces the roles, and added_tokens.json has ids.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken

from paceline.errors import ConfigError, UnsupportedModelError
from paceline.model_files.json_object import read_json_object_if_there
from paceline.model_files.tokenizer_keys import ROLES, is_token, says_nothing

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"

_EXTRA = ("extra_special_tokens", "additional_special_tokens")
# Roles that transformers fills for a class of tokenizers when no file names them.
_DEFAULT_ROLES = {
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"),
}


class NamedToken(NamedTuple):
    """A token and the name of the file that names it."""

    token: AddedToken
    file: str


class PlacedToken(NamedTuple):
    """A token to which a file gives an id."""

    token_id: int
    named: NamedToken


@dataclass(slots=True)
class SpecialTokens:
    """What the files name; filled by read_special_tokens."""

    roles: dict[str, NamedToken] = field(default_factory=dict)
    """By role: bos_token and so on, and names of the model's own."""
    extra: list[NamedToken] = field(default_factory=list)
    placed: list[PlacedToken] = field(default_factory=list)
    """Tokens to add, in the order of their ids."""
    passed_over: list[NamedToken] = field(default_factory=list)
    """Named in an older file beside a newer one; they must be in the vocabulary already."""
    ids_to_check: list[PlacedToken] = field(default_factory=list)
    """Ids in an older file beside a newer one."""


def read_special_tokens(folder: Path, config: Mapping[str, Any]) -> SpecialTokens:
    """Collect the special tokens of all files; `config` is tokenizer_config.json."""
    tokens = SpecialTokens()
    _read_roles(tokens, config, folder / TOKENIZER_CONFIG)
    older = _older_map(folder)
    ids = _older_ids(folder)
    newer = config.get("added_tokens_decoder")
    if newer is not None:
        tokens.placed = _decoder(newer, folder / TOKENIZER_CONFIG)
        tokens.ids_to_check = ids
        tokens.passed_over = [*older.roles.values(), *older.extra]
        tokens.roles = _ordered(older.roles | tokens.roles)
        return tokens
    tokens.roles = _ordered(tokens.roles | older.roles)
    known = {named.token.content for named in tokens.extra}
    tokens.extra += [named for named in older.extra if named.token.content not in known]
    special = {named.token.content for named in (*tokens.roles.values(), *tokens.extra)}
    for token_id, named in ids:
        is_special = named.token.content in special
        token = AddedToken(named.token.content, special=is_special, normalized=not is_special)
        tokens.placed.append(PlacedToken(token_id, NamedToken(token, named.file)))
    return tokens


def _ordered(roles: Mapping[str, NamedToken]) -> dict[str, NamedToken]:
    """Sort roles as transformers adds their tokens, so that new ones get the same ids."""
    order = [*ROLES, *(role for role in roles if role not in ROLES)]
    return {role: roles[role] for role in order if role in roles}


def default_roles(config: Mapping[str, Any]) -> dict[str, NamedToken]:
    """Return the roles that the class in tokenizer_class has where tokenizer_config.json has no key
    for them."""
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    return {
        role: NamedToken(AddedToken(text, special=True, normalized=False), TOKENIZER_CONFIG)
        for role, text in _DEFAULT_ROLES.get(name, {}).items()
        if role not in config
    }


def _older_map(folder: Path) -> SpecialTokens:
    path = folder / SPECIAL_TOKENS_MAP
    values = read_json_object_if_there(path)
    for name, value in values.items():
        if name not in _EXTRA and not is_token(name, value) and not says_nothing(value):
            raise UnsupportedModelError(
                f"{path} has {name}, which names no special token. Remove the key if it is known "
                "to change nothing."
            )
    older = SpecialTokens()
    _read_roles(older, values, path)
    return older


def _older_ids(folder: Path) -> list[PlacedToken]:
    path = folder / ADDED_TOKENS
    values = read_json_object_if_there(path)
    placed = [
        PlacedToken(_token_id(token_id, text, path), NamedToken(AddedToken(text), path.name))
        for text, token_id in values.items()
    ]
    return sorted(placed, key=lambda entry: entry.token_id)


def _decoder(values: object, path: Path) -> list[PlacedToken]:
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} has added_tokens_decoder = {values!r}; it must map ids to tokens."
        )
    placed = [
        PlacedToken(
            _token_id(token_id, value, path),
            NamedToken(_token(value, "added_tokens_decoder", path, special=False), path.name),
        )
        for token_id, value in values.items()
    ]
    return sorted(placed, key=lambda entry: entry.token_id)


def _read_roles(tokens: SpecialTokens, values: Mapping[str, Any], path: Path) -> None:
    for name in ROLES:
        value = values.get(name)
        if not says_nothing(value) and not is_token(name, value):
            raise ConfigError(f"{path} sets {name} to {value!r}; it must be the text of a token.")
    named = {name: value for name, value in values.items() if is_token(name, value) and value}
    extra: list[Any] = []
    for key in _EXTRA:
        value = values.get(key) or []
        if isinstance(value, dict):
            named |= value
        elif isinstance(value, list):
            extra += value
        else:
            raise ConfigError(f"{path} sets {key} to {value!r}; it must be a list of tokens.")
    for name, value in named.items():
        tokens.roles[name] = NamedToken(_token(value, name, path), path.name)
    seen: set[str] = set()
    for value in extra:
        token = _token(value, _EXTRA[0], path)
        if token.content not in seen:
            tokens.extra.append(NamedToken(token, path.name))
        seen.add(token.content)


def _token(value: object, key: str, path: Path, *, special: bool = True) -> AddedToken:
    """Read a token: its text, or an object with its text and how it matches."""
    if isinstance(value, str):
        return AddedToken(value, special=special, normalized=not special)
    try:
        if not isinstance(value, dict):
            raise TypeError("it is neither a text nor an object")
        flags = {name: flag for name, flag in value.items() if name not in ("content", "__type")}
        return AddedToken(value["content"], **({"special": special} | flags))
    except (KeyError, TypeError, UnicodeError) as error:
        raise ConfigError(f"{path} names in {key} a token that cannot be read: {error}.") from error


def _token_id(value: object, token: object, path: Path) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ConfigError(f"{path} gives {token!r} the id {value!r}, not a number.") from None
