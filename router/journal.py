"""What a request has said so far: the one place where a token becomes final. Pure.

Each choice keeps the first token of every index, in order; what comes early waits for the gap to
close. A token that was kept is never changed or taken back, whichever attempt sent it.
"""

from typing import NamedTuple, Protocol

import numpy as np

from paceline.request import FinishReason, TokenIds
from paceline.sampling_params import SamplingParams


class Text(Protocol):
    """Where a choice's tokens become text (`text_stream.TextStream`)."""

    def push(self, token_id: int) -> bool:
        """Take the next token; say whether it completes a stop string."""

    def flush(self) -> bool:
        """Called once when the choice has ended; say whether a stop string is complete."""

    def take(self) -> str:
        """Return the text that has become certain since the last call."""


class Logprobs(NamedTuple):
    """How likely a token was, and the most likely ones at its position."""

    logprob: float
    top: tuple[tuple[int, float], ...]


class ChoiceDelta(NamedTuple):
    """What one choice has to say since the last delta."""

    choice: int
    first_index: int
    token_ids: list[int]
    logprobs: list[Logprobs | None]
    """One a token, or empty when the request did not ask."""
    text: str
    finish_reason: FinishReason | None


class ChoiceJournal:
    """Output of one choice."""

    __slots__ = (
        "_early",
        "_end",
        "_logprobs",
        "_num_taken",
        "_text",
        "_wants_logprobs",
        "choice",
        "finish_reason",
        "finish_taken",
        "output",
    )

    def __init__(self, choice: int, text: Text, *, wants_logprobs: bool = False) -> None:
        self.choice = choice
        self.output: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.finish_taken = False
        self._text = text
        self._wants_logprobs = wants_logprobs
        self._logprobs: list[Logprobs | None] = []
        self._num_taken = 0
        self._early: dict[int, tuple[int, Logprobs | None]] = {}
        self._end: tuple[int, FinishReason] | None = None

    def add(self, index: int, token_id: int, logprobs: Logprobs | None = None) -> bool:
        """Take a token of the current attempt; say whether the choice has ended with it: by a stop
        string, or because it closed the gap before the last token."""
        if self.finish_reason is not None:
            return False
        next_index = len(self.output)
        if index != next_index:
            if index > next_index:
                self._early.setdefault(index, (token_id, logprobs))
            return False
        self._keep(token_id, logprobs)
        while self.finish_reason is None and self._early:
            early = self._early.pop(len(self.output), None)
            if early is None:
                break
            self._keep(*early)
        return self.finish_reason is not None

    def end(self, reason: FinishReason) -> None:
        """Note that the worker ended the choice with the last token that it has sent.

        The choice ends now, or as soon as the tokens before that one have come.
        """
        if self.finish_reason is None:
            num_tokens = max(self._early, default=len(self.output) - 1) + 1
            self._end = (num_tokens, reason)
            self._end_if_complete()

    def forget_early(self) -> None:
        """Drop what came early: its attempt has ended, and another will send those indices."""
        self._early.clear()
        self._end = None

    def take(self) -> ChoiceDelta | None:
        """Return what is new since the last call, or None."""
        start = self._num_taken
        token_ids = self.output[start:]
        text = self._text.take()
        news = self.finish_reason is not None and not self.finish_taken
        if not token_ids and not text and not news:
            return None
        self._num_taken = len(self.output)
        self.finish_taken = self.finish_reason is not None
        logprobs, self._logprobs = self._logprobs, []
        return ChoiceDelta(
            self.choice, start, token_ids, logprobs, text, self.finish_reason if news else None
        )

    def _keep(self, token_id: int, logprobs: Logprobs | None) -> None:
        self.output.append(token_id)
        if self._wants_logprobs:
            self._logprobs.append(logprobs)
        if self._text.push(token_id):
            self._finish(FinishReason.STOP)
            self._end = None
        elif self._end is not None:
            self._end_if_complete()

    def _end_if_complete(self) -> None:
        if self._end is not None and len(self.output) >= self._end[0]:
            self._finish(self._end[1])

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = FinishReason.STOP if self._text.flush() else reason
        self._early.clear()


class RequestJournal:
    """Everything needed to go on with a request anywhere: prompt, parameters, and output so far."""

    def __init__(
        self, prompt: TokenIds, sampling: SamplingParams, texts: list[Text], tenant: str = ""
    ) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.tenant = tenant
        wants_logprobs = sampling.logprobs is not None
        self.choices = [
            ChoiceJournal(choice, text, wants_logprobs=wants_logprobs)
            for choice, text in enumerate(texts)
        ]

    @property
    def max_tokens(self) -> int:
        """Output tokens a choice at most."""
        limit = self.sampling.max_tokens
        assert limit is not None, "the router fills it in before it makes a journal"
        return limit

    @property
    def is_finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def num_output_tokens(self) -> int:
        return sum(len(choice.output) for choice in self.choices)

    def output_ids(self, choice: int) -> TokenIds:
        return np.array(self.choices[choice].output, dtype=np.int32)

    def take(self) -> list[ChoiceDelta]:
        """Return what is new in every choice since the last call."""
        return [delta for choice in self.choices if (delta := choice.take()) is not None]
