"""When the engine has done nothing for longer than its steps explain. Pure: the time comes in."""

LEAST_S = 2.5
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
        self._largest = 0

    def note(self, num_tokens: int, seconds: float) -> None:
        """Take what a step took, with the launch and the wait for its result."""
        self._longest_s = max(seconds, self._longest_s * FORGETTING)
        self._largest = max(num_tokens, self._largest)

    def limit_s(self, num_tokens: int) -> float:
        """Return how long a step of this size may take. Nothing is known of larger ones than
        those that have ended, so they may take the longest time."""
        if num_tokens > self._largest:
            return self._most_s
        return min(max(LEAST_S, LONGEST_STEPS * self._longest_s), self._most_s)
