"""The tokens of a GGUF file, with their kinds and scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from paceline.engine.gguf.metadata import short
from paceline.errors import ConfigError, UnsupportedModelError


class TokenKind(IntEnum):
    """The values of tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Tokens by id. A text belongs to one token."""

    tokens: tuple[str, ...]
    kinds: tuple[TokenKind, ...]
    scores: tuple[float, ...] | None
    ids: Mapping[str, int]
    """The id of each text."""

    def of_kind(self, *kinds: TokenKind) -> set[int]:
        """Return the ids of all tokens of these kinds."""
        return {token_id for token_id, kind in enumerate(self.kinds) if kind in kinds}

    def text(self, token_id: int | None) -> str | None:
        """Return a token's text; None for no token."""
        return None if token_id is None else self.tokens[token_id]


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Read the tokens.

    Raises ConfigError for lists that do not fit together, UnsupportedModelError for kinds that
    llama.cpp does not know.
    """
    texts = metadata.get("tokenizer.ggml.tokens", ())
    if len(texts) == 0:
        raise ConfigError(
            "the GGUF file has no tokenizer.ggml.tokens, so it cannot turn text into tokens. "
            "Convert the model again, with its tokenizer."
        )
    # llama.cpp's name for a token without text.
    tokens = tuple(text or f"[EMPTY_{token_id}]" for token_id, text in enumerate(texts))
    ids: dict[str, int] = {}
    for token_id, text in enumerate(tokens):
        if (first := ids.setdefault(text, token_id)) != token_id:
            raise ConfigError(
                f"the GGUF file has the token {short(text)} twice, as {first} and {token_id}, and "
                "llama.cpp refuses that. Convert the model again."
            )
    kinds = _list(metadata, "tokenizer.ggml.token_type", len(tokens))
    scores = _list(metadata, "tokenizer.ggml.scores", len(tokens))
    return Vocabulary(
        tokens=tokens,
        kinds=(TokenKind.NORMAL,) * len(tokens)
        if kinds is None
        else tuple(_kind(kind, token_id) for token_id, kind in enumerate(kinds)),
        scores=None if scores is None else tuple(float(score) for score in scores),
        ids=ids,
    )


def _list(metadata: Mapping[str, Any], key: str, num_tokens: int) -> Sequence[Any] | None:
    values: Sequence[Any] | None = metadata.get(key)
    if values is not None and len(values) != num_tokens:
        raise ConfigError(
            f"the GGUF file has {num_tokens} tokens and {len(values)} values in {key}. "
            "Convert the model again."
        )
    return values


def _kind(value: Any, token_id: int) -> TokenKind:
    try:
        return TokenKind(int(value))
    except (ValueError, OverflowError) as error:
        raise UnsupportedModelError(
            f"tokenizer.ggml.token_type of token {token_id} is {value}, and the types are 1 to "
            f"{len(TokenKind)}. Convert the model again."
        ) from error
