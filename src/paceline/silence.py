"""How long a peer has been silent, and how much of that is its own."""

import asyncio

NUM_LOOKS = 8
"""Within the limit: how exact it is, against what looking costs."""
ALL_SILENT_FACTOR = 3.0
"""By how much longer a silence is borne while every other peer is silent too: then this process,
or the machine, is slow."""
PATIENCE_FACTOR = 1.5
MAX_PATIENCE_FACTOR = 4.0
CALM_S = 60.0
"""Without a false alarm, after which the patience is the usual one again."""


class Company:
    """The last sign of life of any of several peers."""

    def __init__(self) -> None:
        self.heard_s: float | None = None
        self.num_peers = 0

    def is_silent(self, since_s: float) -> bool:
        """Whether nobody has said anything since then. One peer alone is no company."""
        return self.num_peers > 1 and (self.heard_s is None or self.heard_s < since_s)


class Silence:
    """Looked at every `interval_s`. A look that comes late was held up by this process itself,
    frozen or busy, so what the peer has said meanwhile is still to be read."""

    def __init__(self, limit_s: float, now: float, company: Company | None = None) -> None:
        self.interval_s = limit_s / NUM_LOOKS
        self._limit_s = limit_s
        self._company = company
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
        if self._was_heard and self._company is not None:
            self._company.heard_s = now
        self._was_heard = False
        limit_s = self._limit_s
        if self._company is not None and self._company.is_silent(now - limit_s):
            limit_s *= ALL_SILENT_FACTOR
        return self._silent_s >= limit_s


async def wait_for_silence(silence: Silence) -> None:
    """Return when the peer has been silent for too long."""
    loop = asyncio.get_running_loop()
    while True:
        if silence.is_too_long(loop.time()):
            return
        await asyncio.sleep(silence.interval_s)


class Patience:
    """A peer's limit. It grows with each false alarm: a silence that ended by itself."""

    def __init__(self, usual_s: float) -> None:
        self._usual_s = usual_s
        self._factor = 1.0
        self._alarm_s: float | None = None
        self._was_false_s: float | None = None

    def alarm(self, now: float) -> None:
        """Note that the limit has passed."""
        self._alarm_s = now

    def answered(self, now: float) -> None:
        """Note that the peer is there. After an alarm it was a false one."""
        if self._alarm_s is None:
            return
        self._alarm_s = None
        self._factor = min(self.limit_s(now) / self._usual_s * PATIENCE_FACTOR, MAX_PATIENCE_FACTOR)
        self._was_false_s = now

    def limit_s(self, now: float) -> float:
        """Return how long a silence is borne now."""
        if self._was_false_s is None or now - self._was_false_s > CALM_S:
            return self._usual_s
        return self._usual_s * self._factor
