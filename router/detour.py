"""The choice among pairs of workers when the one that placement prefers rests. Pure.

Such a pair is passed over in the order of preference. The walk is short, because few routes rest,
and it ends after a fixed number of steps when many do.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from paceline.router.capacity import UNLIMITED_LOCAL_PREFILL, Need
from paceline.router.route_health import RouteHealth
from paceline.router.worker_view import Pair, WorkerView

_MAX_STEPS = 250
"""Some milliseconds. When more pairs than this rest in the order of preference, one of these is
used."""


MayComputeAlone = Callable[[int], bool]
"""Says of a local_prefill_tokens whether such workers are meant."""


class Ways(NamedTuple):
    """Workers that could run a piece of work, each time in the order of preference."""

    prefill: Callable[[], Iterator[WorkerView]]
    decode: Callable[[MayComputeAlone | None], Iterator[WorkerView]]

    def usual_pairs(self, need: Need) -> Iterator[Pair]:
        """Yield decode workers that compute the context themselves, then all pairs."""

        def computes_alone(local_prefill_tokens: int) -> bool:
            is_fallback = local_prefill_tokens == UNLIMITED_LOCAL_PREFILL
            return not is_fallback and need.num_tokens <= local_prefill_tokens

        for decode in self.decode(computes_alone):
            yield Pair(None, decode)
        if next(self.decode(None), None) is None:
            return  # without a look at every prefill worker
        for prefill in self.prefill():
            for decode in self.decode(None):
                yield Pair(prefill, decode)

    def fallback_pairs(self) -> Iterator[Pair]:
        """Yield decode workers that compute what no prefill worker can."""
        leaves_prompts_to_others = UNLIMITED_LOCAL_PREFILL.__eq__
        return (Pair(None, decode) for decode in self.decode(leaves_prompts_to_others))

    def all_pairs(self, need: Need) -> Iterator[Pair]:
        return itertools.chain(self.usual_pairs(need), self.fallback_pairs())

    def that_are_well(self, routes: RouteHealth) -> "Ways":
        """Leave out workers that rest themselves."""

        def well(workers: Iterator[WorkerView]) -> Iterator[WorkerView]:
            return (w for w in workers if not routes.is_resting_worker(w.worker_id))

        return Ways(lambda: well(self.prefill()), lambda may: well(self.decode(may)))


def find_around_rests(able: Ways, free: Ways, routes: RouteHealth, need: Need) -> Pair | None:
    """Pick a pair that does not rest; wait for its room rather than take one that does.

    `able` may run the work when they have room, `free` have it now. Decode workers that leave
    prompts to others compute them when every other way rests, and only without any other way is a
    resting pair used.
    """
    able_well, free_well = able.that_are_well(routes), free.that_are_well(routes)
    for pairs, free_pairs in (
        (able_well.usual_pairs(need), free_well.usual_pairs(need)),
        (able_well.fallback_pairs(), free_well.fallback_pairs()),
    ):
        pair = first_well(free_pairs, routes)
        if pair is not None or first_well(pairs, routes) is not None:
            return pair
    return min(
        itertools.islice(free.all_pairs(need), _MAX_STEPS),
        key=lambda pair: routes.num_failures(*pair.ids),
        default=None,
    )


def first_well(pairs: Iterator[Pair], routes: RouteHealth) -> Pair | None:
    """Return the first pair that does not rest, among as many as a message may cost."""
    looked_at = itertools.islice(pairs, _MAX_STEPS)
    return next((pair for pair in looked_at if not routes.is_resting(*pair.ids)), None)
