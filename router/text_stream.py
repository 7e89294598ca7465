"""From the tokens of one choice to its text: decoding and stop strings.

Tokens go in one at a time; text comes out as soon as it is certain. It lags the tokens while a
character is incomplete, and while its end could be the beginning of a stop string.
"""

from collections.abc import Collection, Sequence

from paceline.router.detokenize import Detokenizer, TokenDecoder
from paceline.router.stop_strings import StopStrings


class TextStream:
    """Text of one choice. Owned by the choice's journal; never rewound.

    What `TokenDecoder` makes of all tokens is the text, cut before the first stop string. `silent`
    tokens end a choice and have no text. Stop strings do not count in the first `min_tokens`
    tokens, as in vLLM.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        continues_text: bool,
        stop: Sequence[str] = (),
        silent: Collection[int] = (),
        min_tokens: int = 0,
    ) -> None:
        """`continues_text`: whether the prompt has text."""
        self._decoder = TokenDecoder(detokenizer, continues_text=continues_text)
        self._silent = frozenset(silent)
        self._stop = StopStrings(stop) if stop else None
        self._tokens_before_stop = min_tokens
        self._ready: list[str] = []

    def push(self, token_id: int) -> bool:
        """Take the next token; say whether its text completes a stop string."""
        self._tokens_before_stop -= 1
        if token_id in self._silent:
            return False
        return self._add(self._decoder.push(token_id))

    def flush(self) -> bool:
        """Let go of all that was held back: the choice has ended.

        Say whether a stop string is complete: what stands for an incomplete character can be its
        end.
        """
        if self._stop is None:
            return self._add(self._decoder.flush())
        if not self._stop.found and not self._add(self._decoder.flush()):
            self._ready.append(self._stop.release())
        return self._stop.found

    def take(self) -> str:
        """Return the text that has become certain since the last call."""
        if not self._ready:
            return ""
        text = self._ready[0] if len(self._ready) == 1 else "".join(self._ready)
        self._ready.clear()
        return text

    def _add(self, text: str) -> bool:
        if not text:
            return False
        if self._stop is None or self._tokens_before_stop >= 0:
            self._ready.append(text)
            return False
        self._ready.append(self._stop.push(text))
        return self._stop.found
