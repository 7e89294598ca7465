"""Builders of router requests for tests."""

from collections.abc import Sequence

import numpy as np

from paceline.router.active_request import ActiveRequest
from paceline.router.journal import RequestJournal
from paceline.sampling_params import SamplingParams


class SilentText:
    """A text without words: for tests of tokens only."""

    def __init__(self, stop_token: int | None = None, *, ends_in_stop: bool = False) -> None:
        self._stop_token = stop_token
        self._ends_in_stop = ends_in_stop

    def push(self, token_id: int) -> bool:
        return token_id == self._stop_token

    def flush(self) -> bool:
        return self._ends_in_stop

    def take(self) -> str:
        return ""


def make_journal(
    prompt: Sequence[int] = (1, 2, 3), *, n: int = 1, max_tokens: int = 8, tenant: str = ""
) -> RequestJournal:
    sampling = SamplingParams(max_tokens=max_tokens, n=n, seed=1)
    texts = [SilentText() for _ in range(n)]
    return RequestJournal(np.array(prompt, dtype=np.int32), sampling, texts, tenant)


def make_active_request(
    name: str = "a",
    prompt: Sequence[int] = (1, 2, 3),
    *,
    n: int = 1,
    max_tokens: int = 8,
    arrived_s: float = 0.0,
) -> ActiveRequest:
    journal = make_journal(prompt, n=n, max_tokens=max_tokens)
    return ActiveRequest(name, f"{name}@router", journal, arrived_s)
