"""How many prompt tokens a second a prefill worker computes, from its last steps. Pure."""

from collections import deque
from typing import NamedTuple

_KEEP = 7 / 8
"""Share of the sums that is kept with each step: some eight steps are remembered."""


class _Planned(NamedTuple):
    num_tokens: int
    at_s: float


class PrefillRate:
    """Learns from steps in the order in which they are planned and applied.

    A step is planned while the one before runs, so it counts from when that one ended. The time in
    which nothing was planned does not count.
    """

    def __init__(self) -> None:
        self._planned: deque[_Planned] = deque()
        self._last_applied_s = float("-inf")
        self._num_tokens = self._busy_s = 0.0

    @property
    def tokens_per_s(self) -> int:
        """At least 1 once it is known; 0 before."""
        if self._busy_s <= 0:
            return 0
        return min(max(1, round(self._num_tokens / self._busy_s)), 2**32 - 1)

    def planned(self, num_tokens: int, now: float) -> None:
        self._planned.append(_Planned(num_tokens, now))

    def applied(self, now: float) -> None:
        """Take note that the oldest planned step has ended."""
        step = self._planned.popleft()
        seconds = now - max(step.at_s, self._last_applied_s)
        self._last_applied_s = now
        self._num_tokens = self._num_tokens * _KEEP + step.num_tokens
        self._busy_s = self._busy_s * _KEEP + seconds
