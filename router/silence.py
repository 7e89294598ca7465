"""How long a peer has been silent, without the time in which nobody listened. Pure."""

NUM_LOOKS = 8
"""Within the limit: how exact it is, against what looking costs."""


class Silence:
    """Looked at every `interval_s`. A look that comes late was held up by this process itself,
    frozen or busy, so what the peer has said meanwhile is still to be read."""

    def __init__(self, limit_s: float, now: float) -> None:
        self.interval_s = limit_s / NUM_LOOKS
        self._limit_s = limit_s
        self._looked_s = now
        self._silent_s = 0.0
        self._was_heard = False

    def heard(self) -> None:
        """Note a sign of life."""
        self._was_heard = True

    def is_too_long(self, now: float) -> bool:
        """Look: add the time since the last look, but no more than two intervals."""
        elapsed_s = min(now - self._looked_s, 2 * self.interval_s)
        self._looked_s = now
        self._silent_s = 0.0 if self._was_heard else self._silent_s + elapsed_s
        self._was_heard = False
        return self._silent_s >= self._limit_s
