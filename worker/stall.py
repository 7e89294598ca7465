"""When the engine has done nothing for longer than its steps explain. Pure: the time comes in."""

LEAST_S = 2.0
"""Shorter is no stall: a busy machine may hold a short step up for that long."""
LONGEST_STEPS = 10.0
"""A stall is longer than so many of the longest steps."""
FORGETTING = 0.999
"""What a step leaves of the longest before it."""


class Stall:
    """Learns from steps that end. Written by the engine thread, read by any."""

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._longest_s = 0.0
        self._largest: int | None = None

    def note(self, num_tokens: int, seconds: float) -> None:
        """Take what a step took, with the launch and the wait for its result."""
        self._longest_s = max(seconds, self._longest_s * FORGETTING)
        self._largest = max(num_tokens, self._largest or 0)

    def limit_s(self, num_tokens: int) -> float:
        """Return how long a step of this size may take: one that is larger than any before in
        proportion, and the first one the longest time."""
        if self._largest is None:
            return self._most_s
        growth = max(1.0, num_tokens / max(1, self._largest))
        return min(max(LEAST_S, LONGEST_STEPS * self._longest_s * growth), self._most_s)
