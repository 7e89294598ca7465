"""Tokenizers of GGUF files with the model `gpt2`: byte-level BPE."""

from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from paceline.engine.gguf.metadata import short
from paceline.engine.gguf.pre_tokenizers import (
    PRE_TOKENIZERS,
    REFUSED_PRE_TOKENIZERS,
    PreTokenizer,
)
from paceline.engine.gguf.special_tokens import SpecialTokens
from paceline.engine.gguf.vocabulary import TokenKind, Vocabulary
from paceline.errors import ConfigError, UnsupportedModelError

# The characters of these bytes have the bytes' numbers.
_NEVER_IN_UTF8 = frozenset(map(chr, (0xC0, 0xC1, *range(0xF5, 0x100))))


def find_pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    """Return the pre-tokenizer that the file names; raises UnsupportedModelError for others."""
    key = "tokenizer.ggml.pre"
    name = metadata.get(key)
    if not name:
        raise UnsupportedModelError(
            f"the GGUF file has no {key}, so it is not known how its text is split; llama.cpp "
            "guesses `default` and warns of worse output. Convert the model again, or set "
            f"{key} with gguf-new-metadata --pre-tokenizer."
        )
    if (pre_tokenizer := PRE_TOKENIZERS.get(name)) is not None:
        return pre_tokenizer
    reason = REFUSED_PRE_TOKENIZERS.get(name, "nothing is known about it")
    raise UnsupportedModelError(
        f"{key} is {name!r}, which is not implemented: {reason}. Choose a model with one of "
        f"{', '.join(PRE_TOKENIZERS)}."
    )


def build_byte_level(
    metadata: Mapping[str, Any], vocabulary: Vocabulary, special: SpecialTokens
) -> Tokenizer:
    """Build the tokenizer, without special tokens.

    Raises UnsupportedModelError or ConfigError for vocabularies that would give other tokens than
    llama.cpp's.
    """
    pre_tokenizer = find_pre_tokenizer(metadata)
    if pre_tokenizer.strips_before_mask and "<mask>" in vocabulary.ids:
        raise UnsupportedModelError(
            f"tokenizer.ggml.pre is {metadata['tokenizer.ggml.pre']!r} and the vocabulary has "
            "<mask>, before which llama.cpp drops blanks. That is not implemented. Choose another "
            "model."
        )
    if byte_tokens := vocabulary.of_kind(TokenKind.BYTE):
        text = vocabulary.tokens[min(byte_tokens)]
        raise UnsupportedModelError(
            f"the token {short(text)} is of the type byte, which tokenizer.ggml.model = 'gpt2' "
            "does not have. Convert the model again."
        )
    tokenizer = Tokenizer(
        BPE(
            vocab=dict(vocabulary.ids),
            merges=_read_merges(metadata, vocabulary, needed=pre_tokenizer.needs_merges),
            ignore_merges=pre_tokenizer.ignore_merges,
        )
    )
    steps = [*pre_tokenizer.build(), pre_tokenizers.ByteLevel(False, use_regex=False)]
    if absent := _absent_bytes(vocabulary):
        if pre_tokenizer.ignore_merges:
            raise UnsupportedModelError(
                f"{len(absent)} bytes have no token ({absent!r}, written as GPT-2 does), and with "
                f"tokenizer.ggml.pre = {metadata['tokenizer.ggml.pre']!r} that is not implemented. "
                "Convert the model again."
            )
        # llama.cpp drops a byte without a token, and merges nothing across it.
        any_absent = "".join(f"\\x{{{ord(character):x}}}" for character in absent)
        steps.append(pre_tokenizers.Split(Regex(f"[{any_absent}]"), "removed"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = _build_decoder(vocabulary.tokens[token] for token in special.shown)
    return tokenizer


def _build_decoder(shown: Iterable[str]) -> decoders.Decoder:
    """Build the way back to text, in which the tokens `shown` stay as they are.

    The decoder reads any token of GPT-2's byte characters as bytes. Vocabularies such as
    DeepSeek's have user-defined tokens of one such character each, for bytes that no text has:
    they are written as the bytes of themselves first.
    """
    to_bytes = pre_tokenizers.ByteLevel(False, use_regex=False)
    alphabet = set(to_bytes.alphabet())
    replaced = []
    for text in shown:
        if text.isascii() or not alphabet.issuperset(text):
            continue
        if text not in _NEVER_IN_UTF8:
            raise UnsupportedModelError(
                f"the user-defined token {short(text)} looks like bytes to the decoder, which "
                "would change it in generated text. Set model.path to the model's safetensors "
                "folder."
            )
        replaced.append(decoders.Replace(text, to_bytes.pre_tokenize_str(text)[0][0]))
    return (
        decoders.Sequence([*replaced, decoders.ByteLevel()]) if replaced else decoders.ByteLevel()
    )


def _read_merges(
    metadata: Mapping[str, Any], vocabulary: Vocabulary, *, needed: bool
) -> list[tuple[str, str]]:
    merges: dict[tuple[str, str], None] = {}  # of the same merge, the first counts
    if needed and "tokenizer.ggml.merges" not in metadata:
        raise ConfigError(
            "the GGUF file has no tokenizer.ggml.merges, which tokenizer.ggml.model = 'gpt2' "
            "needs. Convert the model again."
        )
    for merge in metadata.get("tokenizer.ggml.merges", ()):
        head, _, right = merge[1:].partition(" ")  # the first character may be a space
        left = merge[:1] + head
        for text in (left, right, left + right):
            if text not in vocabulary.ids:
                raise ConfigError(
                    f"tokenizer.ggml.merges has {short(merge)}, and {short(text)} is not a token. "
                    "Convert the model again."
                )
        merges.setdefault((left, right))
    return list(merges)


def _absent_bytes(vocabulary: Vocabulary) -> str:
    """Return the characters of those bytes that can occur in a text and have no token."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return "".join(sorted({*alphabet} - _NEVER_IN_UTF8 - {*vocabulary.ids}))
