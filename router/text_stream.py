"""From the tokens of one choice to its text: incremental decoding and stop strings.

Tokens go in one at a time; text comes out as soon as it is certain. It lags the tokens while a
character is incomplete, and while its end could be the beginning of a stop string.
"""

from collections.abc import Collection, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from paceline.router.stop_strings import StopStrings

PRIMING_TOKENS = 6
"""Last prompt tokens that the decoder sees first, so that it keeps the space before the first
word."""


class TextStream:
    """Text of one choice. Owned by the choice's journal; never rewound.

    `silent` tokens end a choice and have no text. Stop strings do not count in the first
    `min_tokens` tokens, as in vLLM.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_tail: Sequence[int],
        *,
        stop: Sequence[str] = (),
        silent: Collection[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt_tail = list(prompt_tail[-PRIMING_TOKENS:])
        self._decoder = self._new_decoder(self._prompt_tail)
        self._undecoded: list[int] = []
        self._silent = frozenset(silent)
        self._stop = StopStrings(stop) if stop else None
        self._tokens_before_stop = min_tokens
        self._ready: list[str] = []

    def push(self, token_id: int) -> bool:
        """Take the next token; say whether its text completes a stop string."""
        self._tokens_before_stop -= 1
        if token_id in self._silent:
            return False
        piece = self._decode(token_id)
        if not piece:
            return False
        if self._stop is None or self._tokens_before_stop >= 0:
            self._ready.append(piece)
            return False
        self._ready.append(self._stop.push(piece))
        return self._stop.found

    def flush(self) -> None:
        """Let go of all that was held back: the choice has ended without a further token."""
        piece = ""
        if self._undecoded:
            piece = self._tokenizer.decode(self._undecoded, skip_special_tokens=True)
            self._undecoded.clear()
        if self._stop is None:
            self._ready.append(piece)
        elif not self._stop.found:
            self._ready.append(self._stop.release() + piece)

    def take(self) -> str:
        """Return the text that has become certain since the last call."""
        if not self._ready:
            return ""
        text = self._ready[0] if len(self._ready) == 1 else "".join(self._ready)
        self._ready.clear()
        return text

    def _decode(self, token_id: int) -> str:
        try:
            piece = self._decoder.step(self._tokenizer, token_id)
        except Exception:  # tokenizers raises no narrower class
            # The decoder refuses a token whose text changes the text before it. That text is
            # final, so begin again behind it.
            self._decoder = self._new_decoder([])
            piece = self._decoder.step(self._tokenizer, token_id)
            self._undecoded.clear()
        if piece is None:
            self._undecoded.append(token_id)
            return ""
        self._undecoded.clear()
        return piece

    @staticmethod
    def _new_decoder(prompt_tail: list[int]) -> DecodeStream:
        return DecodeStream(ids=prompt_tail, skip_special_tokens=True)
