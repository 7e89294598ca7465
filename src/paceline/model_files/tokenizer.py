"""The tokenizer of a model's folder, with all the special tokens that its files name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, processors

from paceline.errors import ConfigError, UnsupportedModelError
from paceline.model_files.json_object import read_json_object_if_there
from paceline.model_files.special_tokens import (
    TOKENIZER_CONFIG,
    PlacedToken,
    SpecialTokens,
    default_roles,
    read_special_tokens,
)
from paceline.model_files.tokenizer_keys import ROLES, check_tokenizer_keys, optional_flag

TOKENIZER = "tokenizer.json"


class RoleToken(NamedTuple):
    """A special token with a role, such as eos_token."""

    text: str
    token_id: int
    file: str
    """Name of the file that names it."""


class FolderTokenizer(NamedTuple):
    """A tokenizer that is complete: nothing is left to add to it."""

    tokenizer: Tokenizer
    roles: Mapping[str, RoleToken]
    config: Mapping[str, Any]
    """tokenizer_config.json"""


def read_tokenizer(folder: Path) -> FolderTokenizer:
    """Read tokenizer.json and what other files add to it.

    Raises ConfigError for files that are missing or contradict each other, and
    UnsupportedModelError for keys that are not implemented.
    """
    tokenizer = _read_backend(folder)
    path = folder / TOKENIZER_CONFIG
    config = read_json_object_if_there(path)
    check_tokenizer_keys(config, path)
    tokens = read_special_tokens(folder, config)
    for role, named in default_roles(config).items():
        if tokenizer.token_to_id(named.token.content) is not None:
            tokens.roles.setdefault(role, named)
    _add(tokenizer, tokens, folder)
    roles = _roles(tokenizer, tokens)
    _check_role_ids(roles, config, path)
    _check_prefix_space(tokenizer, config, path)
    _set_post_processor(tokenizer, roles, config, path)
    tokenizer.encode_special_tokens = bool(optional_flag(config, "split_special_tokens", path))
    return FolderTokenizer(tokenizer, roles, config)


def _read_backend(folder: Path) -> Tokenizer:
    path = folder / TOKENIZER
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no tokenizer.json, which the router needs to turn text into tokens; "
            "save it with transformers' tokenizer.save_pretrained, or correct model.path"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower class
        raise ConfigError(f"{path} is not a tokenizer that can be read: {error}") from error
    if getattr(tokenizer.model, "dropout", None):
        raise UnsupportedModelError(
            f"{path} sets dropout, which makes other tokens of a text each time. It is for "
            "training: set it to null."
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _add(tokenizer: Tokenizer, tokens: SpecialTokens, folder: Path) -> None:
    """Add the tokens that tokenizer.json has not; those with an id must get that id."""
    tokenizer.add_tokens([placed.named.token for placed in tokens.placed])
    for placed in (*tokens.placed, *tokens.ids_to_check):
        _check_id(tokenizer, placed, folder)
    for named in tokens.passed_over:
        if tokenizer.token_to_id(named.token.content) is None:
            raise ConfigError(
                f"{folder / named.file} names the special token {named.token.content!r}, which is "
                f"neither in {TOKENIZER} nor in {TOKENIZER_CONFIG}. Add it there, or remove it."
            )
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    # If a new token is named twice with other flags, the last holds.
    named_tokens = (named.token for named in (*tokens.roles.values(), *tokens.extra))
    tokenizer.add_tokens([token for token in named_tokens if token.content not in added])


def _check_id(tokenizer: Tokenizer, placed: PlacedToken, folder: Path) -> None:
    text, found = placed.named.token.content, tokenizer.token_to_id(placed.named.token.content)
    if found != placed.token_id:
        says = "does not have it" if found is None else f"gives it {found}"
        raise ConfigError(
            f"{folder / placed.named.file} gives the token {text!r} the id {placed.token_id}, and "
            f"{TOKENIZER} {says}. Download the model again, or save its tokenizer again."
        )


def _roles(tokenizer: Tokenizer, tokens: SpecialTokens) -> dict[str, RoleToken]:
    roles = {}
    for role, named in tokens.roles.items():
        token_id = tokenizer.token_to_id(named.token.content)
        if token_id is not None:  # an empty text is no token
            roles[role] = RoleToken(named.token.content, token_id, named.file)
    return roles


def _check_role_ids(roles: Mapping[str, RoleToken], config: Mapping[str, Any], path: Path) -> None:
    for role in ROLES:
        given, token = config.get(f"{role}_id"), roles.get(role)
        if given is not None and (token is None or given != token.token_id):
            is_named = f"is {token.text!r} with id {token.token_id}" if token else "is not named"
            raise ConfigError(
                f"{path} sets {role}_id to {given!r}, and its {role} {is_named}. Correct the file."
            )


def _check_prefix_space(tokenizer: Tokenizer, config: Mapping[str, Any], path: Path) -> None:
    wanted = optional_flag(config, "add_prefix_space", path)
    if wanted is None:
        return
    adds = _adds_prefix_space(json.loads(tokenizer.to_str(pretty=False)))
    if adds is not None and wanted != adds:
        raise ConfigError(
            f"{path} sets add_prefix_space to {wanted}, and tokenizer.json does the opposite: "
            "versions of transformers disagree about which holds. Save the tokenizer again, or "
            "remove the key if tokenizer.json is right."
        )


def _adds_prefix_space(backend: Mapping[str, Any]) -> bool | None:
    """Whether tokenizer.json puts a space before text; None if nothing in it says so."""
    for name, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        stage = backend.get(name) or {}
        for step in stage.get(inner, [stage]):
            match step.get("type"):
                case "Prepend":
                    return True
                case "Metaspace":
                    return bool(step.get("prepend_scheme") != "never")
                case "ByteLevel":
                    return bool(step.get("add_prefix_space"))
    return None


def _set_post_processor(
    tokenizer: Tokenizer, roles: Mapping[str, RoleToken], config: Mapping[str, Any], path: Path
) -> None:
    """Let add_bos_token and add_eos_token hold where tokenizer.json does something else.

    The authors of a model wrote the key for the tokenizer they trained with. transformers 4 used it
    for Llama's tokenizers; transformers 5 takes tokenizer.json as it is.
    """
    adds = tokenizer.encode("", add_special_tokens=True).ids
    starts_with_bos = "bos_token" in roles and adds[:1] == [roles["bos_token"].token_id]
    rest = adds[1:] if starts_with_bos else adds
    ends_with_eos = "eos_token" in roles and rest == [roles["eos_token"].token_id]
    first = _end(roles, config, path, "bos_token", starts_with_bos)
    last = _end(roles, config, path, "eos_token", ends_with_eos)
    wanted = [token for token in (first, last) if token is not None]
    is_said = any(config.get(key) is not None for key in ("add_bos_token", "add_eos_token"))
    if not is_said or adds == [token.token_id for token in wanted]:
        return
    before, after = ([token.text] if token else [] for token in (first, last))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(token.text, token.token_id) for token in wanted],
    )


def _end(
    roles: Mapping[str, RoleToken],
    config: Mapping[str, Any],
    path: Path,
    role: str,
    is_added: bool,
) -> RoleToken | None:
    """Return the token at one end of a text: as the key says, else as tokenizer.json does."""
    wanted = optional_flag(config, f"add_{role}", path)
    if wanted and role not in roles:
        raise ConfigError(
            f"{path} sets add_{role}, and no file names the {role}. Name it there, or remove the "
            "key."
        )
    return roles.get(role) if (is_added if wanted is None else wanted) else None
