"""Tokenizers of GGUF files with the model `llama`: SentencePiece BPE, with scores and byte tokens.

Such a file has no merges. Any two neighbours whose joined text is a token may merge, and the token
with the best score goes first. Here each token becomes one merge for each of its splits, in the
order of the scores.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from paceline.engine.gguf.metadata import short
from paceline.engine.gguf.special_tokens import SpecialTokens
from paceline.engine.gguf.vocabulary import TokenKind, Vocabulary
from paceline.errors import ConfigError, UnsupportedModelError

_SPACE = "▁"


class _Merge(NamedTuple):
    left: str
    right: str
    score: float

    @property
    def order(self) -> tuple[float, int, int]:
        """Sort by the score, and of equal scores in a run by the length.

        llama.cpp merges what stands further left, and in a run that is what is longer.
        """
        return -self.score, -len(self.left), -len(self.right)


def build_sentencepiece(
    metadata: Mapping[str, Any], vocabulary: Vocabulary, special: SpecialTokens
) -> Tokenizer:
    """Build the tokenizer, without special tokens.

    Raises UnsupportedModelError or ConfigError for vocabularies that would give other tokens than
    llama.cpp's.
    """
    _check_byte_tokens(vocabulary)
    merges = _derive_merges(vocabulary, special.hidden | special.shown)
    tokenizer = Tokenizer(BPE(vocab=dict(vocabulary.ids), merges=merges, byte_fallback=True))
    # Normalizers and pre-tokenizers see each text between special tokens by itself, and llama.cpp
    # puts the space before each of them.
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prepend = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", left=1, right=0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _check_byte_tokens(vocabulary: Vocabulary) -> None:
    texts = {f"<0x{byte:02X}>" for byte in range(256)}
    found = {vocabulary.tokens[token_id] for token_id in vocabulary.of_kind(TokenKind.BYTE)}
    if wrong := sorted(texts ^ found):
        raise ConfigError(
            "the vocabulary of tokenizer.ggml.model = 'llama' needs the 256 tokens <0x00> to "
            f"<0xFF>, of the type byte and no others. Wrong or absent: {', '.join(wrong[:5])}"
            f"{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}. Convert the model again."
        )


def _derive_merges(vocabulary: Vocabulary, special: frozenset[int]) -> list[tuple[str, str]]:
    if vocabulary.scores is None:
        raise ConfigError(
            "the GGUF file has no tokenizer.ggml.scores, which tokenizer.ggml.model = 'llama' "
            "needs. Convert the model again."
        )
    lengths = dict.fromkeys(sorted({1, *map(len, vocabulary.tokens)}))
    by_score: dict[float, str] = {}
    merges: list[_Merge] = []
    for token_id, text in enumerate(vocabulary.tokens):
        if " " in text or (token_id in special and _SPACE not in text):
            continue  # nothing has this text once spaces are escaped and special tokens cut out
        splits = list(_splits(text, vocabulary, lengths))
        if not splits:
            continue
        score = vocabulary.scores[token_id]
        if math.isnan(score):
            raise ConfigError(
                f"tokenizer.ggml.scores of token {token_id}, {short(text)}, is not a number, and "
                "the scores say which tokens merge first. Convert the model again."
            )
        other = by_score.setdefault(score, text)
        if other != text and not _is_one_run(other + text):
            raise UnsupportedModelError(
                f"the tokens {short(other)} and {short(text)} have the same score, {score}. Then "
                "llama.cpp merges what stands further left, and paceline cannot. Set model.path "
                "to the model's safetensors folder."
            )
        merges += [_Merge(text[:cut], text[cut:], score) for cut in splits]
    merges.sort(key=lambda merge: merge.order)
    return [(merge.left, merge.right) for merge in merges]


def _splits(text: str, vocabulary: Vocabulary, lengths: Mapping[int, None]) -> Iterator[int]:
    """Find the places where two symbols can meet to become this token.

    lengths: of all tokens, ascending. A very long token is cut at few places only.
    """
    for cut in lengths:
        if cut >= len(text):
            return
        parts = text[:cut], text[cut:]
        if len(parts[1]) not in lengths:
            continue
        if not all(len(part) == 1 or part in vocabulary.ids for part in parts):
            continue
        for part in parts:
            part_id = vocabulary.ids.get(part)
            if part_id is None or vocabulary.kinds[part_id] is TokenKind.BYTE:
                raise UnsupportedModelError(
                    f"the token {short(text)} can come from {short(parts[0])} and "
                    f"{short(parts[1])}, and {short(part)} is not a token of its own. "
                    "That is not implemented. Convert the model again."
                )
        yield cut


def _is_one_run(text: str) -> bool:
    """Tell a run of one character, such as spaces: in SentencePiece they share the worst score."""
    return len(set(text)) == 1
