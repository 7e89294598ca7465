"""Tokens that end a sequence: all that config.json, generation_config.json and the tokenizer name.

Files often name different ones: config.json that of the base model, the tokenizer the one that ends
a turn of chat. vLLM likewise adds those of generation_config.json to the tokenizer's.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from paceline.errors import ConfigError
from paceline.model_files.tokenizer import TOKENIZER, read_tokenizer

EOS = "eos_token"


class EndSource(NamedTuple):
    """What one file says: an id, a list of ids, or nothing."""

    path: Path
    value: object


class EndToken(NamedTuple):
    """A token that ends sequences, and the names of the files that say so."""

    token_id: int
    files: tuple[str, ...]


def merge_end_tokens(sources: Iterable[EndSource], vocab_size: int) -> tuple[EndToken, ...]:
    """Return the union, in the order of the files.

    Raises ConfigError with the file that names something else than tokens of the model.
    """
    files: dict[int, list[str]] = {}
    for path, value in sources:
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise ConfigError(
                    f"{path} names the end-of-sequence token {token_id!r}, which is no token id. "
                    "Correct the file."
                )
            if not 0 <= token_id < vocab_size:
                raise ConfigError(
                    f"{path} names the end-of-sequence token {token_id}, and the model's "
                    f"vocabulary has {vocab_size} tokens. Correct the file."
                )
            names = files.setdefault(token_id, [])
            if path.name not in names:
                names.append(path.name)
    return tuple(EndToken(token_id, tuple(names)) for token_id, names in files.items())


def tokenizer_end(folder: Path) -> EndSource:
    """Return what the tokenizer of a folder says; a folder without a tokenizer says nothing."""
    if not (folder / TOKENIZER).is_file():
        return EndSource(folder / TOKENIZER, None)
    token = read_tokenizer(folder).roles.get(EOS)
    if token is None:
        return EndSource(folder / TOKENIZER, None)
    return EndSource(folder / token.file, token.token_id)
