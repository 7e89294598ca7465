"""The choice of a pair of workers, written as a plain search through all of them."""

import itertools
from collections.abc import Iterator

from paceline.router.capacity import UNLIMITED_LOCAL_PREFILL, Need
from paceline.router.route_health import RouteHealth
from paceline.router.worker_view import Pair, Role, WorkerView


def find_pair(workers: list[WorkerView], routes: RouteHealth, need: Need) -> Pair | None:
    """Return what `Placement.find` should, in a deployment of few workers."""
    able = [w for w in workers if not w.load.draining and w.could_run(need)]
    free = [w for w in able if w.can_take(need)]
    best = next(_pairs(free, able, need), None)
    if best is None or not routes.is_resting(*best.ids):
        return best
    for is_fallback in (False, True):
        well = [
            [
                pair
                for pair in _pairs_around(some, need, is_fallback)
                if not routes.is_resting(*pair.ids)
            ]
            for some in (free, able)
        ]
        if well[0] or well[1]:
            return well[0][0] if well[0] else None
    return min(
        itertools.chain(_pairs_around(free, need, False), _pairs_around(free, need, True)),
        key=lambda pair: routes.num_failures(*pair.ids),
        default=None,
    )


def _pairs(free: list[WorkerView], able: list[WorkerView], need: Need) -> Iterator[Pair]:
    """Yield pairs in the order of preference while nothing rests."""
    prefill, decode = _by_preference(free)
    is_left_to_others = any(w.member.role is Role.PREFILL for w in able)
    for worker in decode:
        if _leaves_prompts(worker):
            if not is_left_to_others:
                yield Pair(None, worker)
        elif worker.pool.computes_alone(need):
            yield Pair(None, worker)
    yield from itertools.starmap(Pair, itertools.product(prefill, decode))


def _pairs_around(workers: list[WorkerView], need: Need, is_fallback: bool) -> Iterator[Pair]:
    """Yield pairs in the order of preference while some rest."""
    prefill, decode = _by_preference(workers)
    for worker in decode:
        if _leaves_prompts(worker) == is_fallback and worker.pool.computes_alone(need):
            yield Pair(None, worker)
    if not is_fallback:
        yield from itertools.starmap(Pair, itertools.product(prefill, decode))


def _by_preference(workers: list[WorkerView]) -> tuple[list[WorkerView], list[WorkerView]]:
    prefill = [w for w in workers if w.member.role is Role.PREFILL]
    decode = [w for w in workers if w.member.role is Role.DECODE]
    prefill.sort(key=lambda w: (w.num_pending_tokens, -w.credit_blocks))
    decode.sort(key=lambda w: (-w.credit_blocks, w.load.num_running))
    return prefill, decode


def _leaves_prompts(worker: WorkerView) -> bool:
    return worker.pool.local_prefill_tokens == UNLIMITED_LOCAL_PREFILL
