"""From token ids to text, one token at a time, at a cost that does not depend on earlier tokens.

`tokenizers` decodes only whole lists of ids: its DecodeStream decodes the last ones again for each
new id, over and over while they complete no character. Here each id is looked up once for what it
contributes, and a stream keeps the bytes of one incomplete character at most.
"""

import codecs
import re
from collections.abc import Iterable, Mapping
from functools import cache

from tokenizers import Tokenizer

from paceline.router.decoder_steps import Replacement, read_decoder_steps

Piece = str | bytes | None
"""What a token adds: whole characters, bytes that are not whole characters, or None if decoding
skips it."""

REPLACEMENT_CHARACTER = "\ufffd"

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_ESCAPED_BYTES = dict.fromkeys(range(0xDC80, 0xDD00), REPLACEMENT_CHARACTER)
"""What the error handler `surrogateescape` makes of bytes that belong to no character"""


class Detokenizer:
    """What each token of one tokenizer contributes to text. Shared by all streams of an event loop.

    Special tokens and ids beyond the vocabulary have no text. Pieces are made when they are first
    needed, and kept: at most one for each id of the model's vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Read the tokenizer's decoder; raises ConfigError if it cannot be followed."""
        self.steps = read_decoder_steps(tokenizer)
        self.special_tokens: Mapping[str, int] = {
            token.content: token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        # By id: a special token that is normalized has another text in tokenizers 0.23.
        self._skipped = frozenset(self.special_tokens.values())
        self._tokenizer = tokenizer
        self._byte_of = _byte_level_alphabet()
        self.piece = cache(self._make_piece)

    def has_text(self, token_ids: Iterable[int]) -> bool:
        """Whether any of these tokens is one that decoding does not skip."""
        return any(self.piece(token_id) is not None for token_id in token_ids)

    def first_piece(self, token_id: int) -> Piece:
        """Return what a token contributes as the first of a text."""
        return self._make_piece(token_id, is_first_token=True)

    def _make_piece(self, token_id: int, *, is_first_token: bool = False) -> Piece:
        text = self._tokenizer.id_to_token(token_id)
        if text is None or token_id in self._skipped:
            return None
        steps = self.steps
        for replacement in steps.in_tokens:
            text = replacement.apply(text, is_first_token=is_first_token)
        if steps.has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(text)):
            data = bytes.fromhex(match[1])
        elif steps.is_byte_level:
            data = self._bytes_of(text)
        else:
            return _replaced(text, steps.in_text)
        try:
            return _replaced(data.decode(), steps.in_text) if data else data
        except UnicodeDecodeError:
            return data

    def _bytes_of(self, token: str) -> bytes:
        try:
            return bytes(map(self._byte_of.__getitem__, token))
        except KeyError:  # an added token that was not written in the alphabet: its text as it is
            return token.encode()


class TokenDecoder:
    """Turns the tokens of one choice into text.

    The text of all tokens together is `tokenizers.decode(output, skip_special_tokens=True)`, with
    three exceptions:

    - The space before the first word is kept if the prompt has text, since the word comes after it.
      SentencePiece decoders cut it from the beginning of a text.
    - Among byte tokens, whole characters stay and each byte that belongs to none becomes U+FFFD.
      `tokenizers` replaces every byte of a run of byte tokens that is invalid anywhere, which is
      only known at its end. Runs are not held back for that: a whole answer in Thai may be one.
    - A special token that is normalized has no text, like other special tokens. `tokenizers` 0.23
      shows it if the normalizer changes its text.

    Only the output is decoded. If the prompt ends inside a character, the bytes that would
    complete it belong to no character of the output, and become U+FFFD.
    """

    def __init__(self, detokenizer: Detokenizer, *, continues_text: bool) -> None:
        """`continues_text`: whether the prompt has text (`Detokenizer.has_text`)."""
        steps = detokenizer.steps
        self._detokenizer = detokenizer
        self._piece = detokenizer.piece
        self._in_text = steps.in_text
        # Byte-level decoders replace the beginning of a character, SentencePiece's each byte.
        errors = "replace" if steps.is_byte_level else "surrogateescape"
        self._characters = codecs.getincrementaldecoder("utf-8")(errors)
        self._is_incomplete = False
        self._is_first_token = not continues_text
        self._num_to_strip = 0 if continues_text else steps.num_stripped

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that has become whole with it."""
        if self._is_first_token:
            piece = self._detokenizer.first_piece(token_id)
            self._is_first_token = piece is None
        else:
            piece = self._piece(token_id)
        if piece is None:
            return ""
        if type(piece) is str and not self._is_incomplete:
            text = piece
        else:
            text = self._join(piece)
        return self._strip(text) if self._num_to_strip else text

    def flush(self) -> str:
        """Return what stands for an incomplete character: no more tokens will come."""
        return self._strip(self._decode(b"", final=True)) if self._is_incomplete else ""

    @property
    def num_pending_bytes(self) -> int:
        """Bytes of the incomplete character, at most three: all that is kept of earlier tokens."""
        return len(self._characters.getstate()[0])

    def _join(self, piece: str | bytes) -> str:
        if isinstance(piece, bytes):
            return self._decode(piece, final=False)
        return self._decode(b"", final=True) + piece

    def _decode(self, data: bytes, *, final: bool) -> str:
        text = self._characters.decode(data, final)
        self._is_incomplete = self.num_pending_bytes > 0
        return _replaced(text.translate(_ESCAPED_BYTES), self._in_text)

    def _strip(self, text: str) -> str:
        stripped = self._detokenizer.steps.stripped
        while self._num_to_strip and text:
            if not text.startswith(stripped):
                self._num_to_strip = 0
                break
            text = text.removeprefix(stripped)
            self._num_to_strip -= 1
        return text


def _replaced(text: str, replacements: Iterable[Replacement]) -> str:
    for replacement in replacements:
        text = replacement.apply(text)
    return text


def _byte_level_alphabet() -> dict[str, int]:
    # GPT-2's: printable bytes stand for themselves, the others for characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + number): byte for number, byte in enumerate(others)}
