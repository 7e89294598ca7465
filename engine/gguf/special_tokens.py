"""Which tokens of a GGUF file are special, and what for, as llama.cpp decides it.

A file gives the kinds of tokens and the ids of some special ones. llama.cpp also knows texts that
mean the end of a generation or a place to fill in, and makes those tokens special whatever their
kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paceline.engine.gguf.overlaps import check_overlaps
from paceline.engine.gguf.vocabulary import TokenKind, Vocabulary
from paceline.errors import ConfigError, UnsupportedModelError

END_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
)
"""Texts of tokens that end a generation."""

_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


@dataclass(frozen=True, slots=True)
class _Filler:
    """A special token for filling in the middle of a text: by id or, without one, by its text."""

    keys: tuple[str, ...]
    texts: tuple[str, ...]
    ends: bool


_FILLERS = (
    _Filler(
        ("fim_pre_token_id", "prefix_token_id"),
        (
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<｜fim▁begin｜>",
            "<PRE>",
            "▁<PRE>",
            "<|code_prefix|>",
            "<|prefix|>",
        ),
        ends=False,
    ),
    _Filler(
        ("fim_suf_token_id", "suffix_token_id"),
        (
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<｜fim▁hole｜>",
            "<SUF>",
            "▁<SUF>",
            "<|code_suffix|>",
            "<|suffix|>",
        ),
        ends=False,
    ),
    _Filler(
        ("fim_mid_token_id", "middle_token_id"),
        (
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<｜fim▁end｜>",
            "<MID>",
            "▁<MID>",
            "<|code_middle|>",
            "<|middle|>",
        ),
        ends=False,
    ),
    _Filler(
        ("fim_pad_token_id",),
        ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        ends=True,
    ),
    _Filler(
        ("fim_rep_token_id",),
        ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
        ends=True,
    ),
    _Filler(("fim_sep_token_id",), ("<|file_sep|>",), ends=True),
)


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the tokens that a text can name, and of those with a part to play."""

    hidden: frozenset[int]
    """Recognised in a text, and not shown in generated text."""
    shown: frozenset[int]
    """Recognised in a text, and shown."""
    ends: tuple[int, ...]
    """Any of them ends a generation."""
    bos: int | None
    eos: int | None
    unknown: int | None
    padding: int | None
    separator: int | None
    mask: int | None


def read_special_tokens(
    metadata: Mapping[str, Any], vocabulary: Vocabulary, defaults: Mapping[str, int]
) -> SpecialTokens:
    """Decide which tokens are special. `defaults` are ids of keys that the file may leave out.

    Raises UnsupportedModelError or ConfigError for ids outside the vocabulary, and for what
    llama.cpp decides by chance.
    """
    ids = _Ids(metadata, vocabulary, defaults)
    hidden = vocabulary.of_kind(TokenKind.CONTROL, TokenKind.UNKNOWN)
    shown = vocabulary.of_kind(TokenKind.USER_DEFINED)
    ends = set()
    for filler in _FILLERS:
        filler_id = ids.of(*filler.keys)
        if filler_id is None:
            filler_id = _find_filler(filler, vocabulary, hidden | shown)
            hidden |= _present(filler_id)
        if filler.ends:
            ends |= _present(filler_id)
    by_text = {vocabulary.ids[text] for text in END_TEXTS if text in vocabulary.ids}
    hidden |= by_text
    always_shown = {vocabulary.ids[text] for text in _ALWAYS_SHOWN if text in vocabulary.ids}
    eos = ids.of("eos_token_id")
    ends |= by_text | _present(eos, ids.of("eot_token_id"), ids.of("eom_token_id"))
    hidden, shown = hidden - always_shown, shown | always_shown
    # Two corrections, as in llama.cpp: in some vocabularies a text of END_TEXTS ends a part only.
    texts = {vocabulary.tokens[end] for end in ends}
    if _has_calls(texts):
        end = vocabulary.ids["<|end|>"]
        ends, hidden, shown = ends - {end}, hidden - {end}, shown | {end}
    if {"<|tool_response>", "</s>"} <= texts:
        end = vocabulary.ids["</s>"]
        ends, hidden, shown = ends - {end}, hidden - {end}, shown - {end}
    special = SpecialTokens(
        hidden=frozenset(hidden),
        shown=frozenset(shown - hidden),
        ends=tuple(sorted(ends)),
        bos=ids.of("bos_token_id"),
        eos=eos,
        unknown=ids.of("unknown_token_id"),
        padding=ids.of("padding_token_id"),
        separator=ids.of("seperator_token_id"),
        mask=ids.of("mask_token_id"),
    )
    check_overlaps([vocabulary.tokens[token_id] for token_id in special.hidden | special.shown])
    return special


class _Ids:
    """Special ids that the file gives, each within the vocabulary."""

    def __init__(
        self, metadata: Mapping[str, Any], vocabulary: Vocabulary, defaults: Mapping[str, int]
    ) -> None:
        num_tokens = len(vocabulary.tokens)
        self._ids = {key: token for key, token in defaults.items() if token < num_tokens}
        for key, value in metadata.items():
            if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
                if not 0 <= value < num_tokens:
                    raise ConfigError(
                        f"{key} is {value}, and the vocabulary has the tokens 0 to "
                        f"{num_tokens - 1}. Correct the key with gguf-set-metadata."
                    )
                self._ids[key.removeprefix("tokenizer.ggml.")] = int(value)

    def of(self, *keys: str) -> int | None:
        """Return the id of the last of these keys that there is."""
        given = [self._ids[key] for key in keys if key in self._ids]
        return given[-1] if given else None


def _find_filler(filler: _Filler, vocabulary: Vocabulary, special: set[int]) -> int | None:
    """Find the token by its text.

    Of several, llama.cpp takes the one that its hash table has first: refused where it matters.
    """
    found = [vocabulary.ids[text] for text in filler.texts if text in vocabulary.ids]
    if len(found) > 1 and (filler.ends or not special.issuperset(found)):
        texts = " and ".join(repr(vocabulary.tokens[token_id]) for token_id in found)
        key = f"tokenizer.ggml.{filler.keys[0]}"
        raise UnsupportedModelError(
            f"the vocabulary has {texts}, which mean the same, and no key {key} says which one "
            f"counts. Set {key} with gguf-new-metadata."
        )
    return found[0] if found else None


def _present(*token_ids: int | None) -> set[int]:
    return {token_id for token_id in token_ids if token_id is not None}


def _has_calls(ends: set[str]) -> bool:
    """Tell vocabularies in which <|end|> ends a message and not the generation."""
    calls = "<|call|>" in ends or "<|calls|>" in ends
    return "<|end|>" in ends and calls and ("<|return|>" in ends or "<|flush|>" in ends)
