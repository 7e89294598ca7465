"""Which of a worker's room each router is offered. Pure.

While no router claims any, each is offered all of it: their queues are not blocked, so they seldom
collide, and a refusal is cheap. A router whose next work finds no room claims it. Claims are served
oldest first, so that requests come first, first served across routers, and a large one does not
starve behind small ones of other routers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

CLAIM_LIFETIME_S = 3.0
"""A claim that its router has not renewed for this long counts no more; routers renew theirs every
second. It bounds how long a router that stands still can keep room free."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What the next work of a router needs here."""

    num_blocks: int
    num_sequences: int
    since_s: float
    """Since when it waits, by the worker's clock."""
    holds: bool
    """Whether room is kept free until it fits."""
    renewed_s: float


class Room(NamedTuple):
    """What a worker can take."""

    num_blocks: int
    num_sequences: int


class Offers(NamedTuple):
    """What routers may send now."""

    claimed: dict[int, Room]
    """By session, for those with a claim."""
    rest: Room
    """For all others."""


def offer(free: Room, claims: Mapping[int, Claim], now: float) -> Offers:
    """Go through the claims, oldest first. A claim that fits is offered all that is left, and its
    need is kept from those after it. One that does not fit is passed over, so that small requests
    fill the gaps, unless it holds: then nothing is left for those after it.
    """
    offered: dict[int, Room] = {}
    left = free
    for session, claim in sorted(claims.items(), key=lambda entry: entry[1].since_s):
        if now - claim.renewed_s >= CLAIM_LIFETIME_S:
            continue
        offered[session] = left
        if claim.num_blocks <= left.num_blocks and claim.num_sequences <= left.num_sequences:
            left = Room(
                left.num_blocks - claim.num_blocks, left.num_sequences - claim.num_sequences
            )
        elif claim.holds:
            left = Room(0, 0)
    return Offers(offered, left)
