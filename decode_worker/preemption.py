"""Who gives up its blocks when a running sequence needs one and none is left.

The youngest goes first, whether it runs or has only been promised blocks; of the choices of one
attempt the last. The oldest sequence never goes, so at every moment somebody gets to its end. Those
that go return to the head of their router's queue with their output.
"""

from collections import OrderedDict
from typing import NamedTuple

from paceline.decode_worker.attempts import Attempt, Sequence, SequenceState


class Victim(NamedTuple):
    """What is preempted together."""

    attempt: Attempt
    sequences: tuple[Sequence, ...]


def choose_victim(holders: OrderedDict[Attempt, None]) -> Victim | None:
    """Choose among attempts that hold blocks, oldest first; None when only the oldest could go.

    The choices of an attempt that has not forked have one set of blocks, so they go together.
    """
    if not holders:
        return None
    oldest, youngest = next(iter(holders)), next(reversed(holders))
    waiting = youngest.in_state(SequenceState.WAITING)
    if waiting:
        return None if youngest is oldest else Victim(youngest, tuple(waiting))
    running = youngest.in_state(SequenceState.RUNNING)
    if youngest is oldest and len(running) == 1:
        return None
    return Victim(youngest, (running[-1],))
