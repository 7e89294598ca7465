"""Who gives up its blocks when a running sequence needs one and none is left.

The youngest goes first, whether it runs or has only been promised blocks; of the choices of one
attempt the last. The oldest sequence never goes, so at every moment somebody gets to its end. Those
that go return to the head of their router's queue with their output.
"""

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from paceline.decode_worker.attempts import Attempt, Sequence, SequenceState


class Victim(NamedTuple):
    """What is preempted together."""

    attempt: Attempt
    sequences: tuple[Sequence, ...]


def choose_victim(attempts: SequenceOf[Attempt]) -> Victim | None:
    """Choose among attempts, oldest first; None when only the oldest sequence could go.

    The choices of an attempt that has not forked have one set of blocks, so they go together.
    """
    oldest = _oldest_holder(attempts)
    for attempt in reversed(attempts):
        waiting = attempt.in_state(SequenceState.WAITING)
        if waiting:
            return None if attempt is oldest else Victim(attempt, tuple(waiting))
        running = attempt.in_state(SequenceState.RUNNING)
        if attempt is oldest:
            running = running[1:]
        if running:
            return Victim(attempt, (running[-1],))
    return None


def _oldest_holder(attempts: SequenceOf[Attempt]) -> Attempt | None:
    for attempt in attempts:
        if attempt.in_state(SequenceState.WAITING) or attempt.in_state(SequenceState.RUNNING):
            return attempt
    return None
