"""Which workers take a request. Pure: a view of the pools and of the credit that is left there."""

from paceline.router.capacity import UNLIMITED_LOCAL_PREFILL, KnownPools, Need, PoolSizes
from paceline.router.detour import Ways, find_around_rests, first_well
from paceline.router.route_health import RouteHealth
from paceline.router.worker_index import WorkerIndex
from paceline.router.worker_view import Pair, Role, WorkerLoad, WorkerView


class Placement:
    """The connected workers, and the choice among them."""

    def __init__(self, routes: RouteHealth | None = None) -> None:
        self.workers: dict[str, WorkerView] = {}
        self.pools = KnownPools()
        self.routes = routes or RouteHealth()
        self._takers = KnownPools()
        """Of the connected workers that are not draining."""
        self._indexes = {role: WorkerIndex() for role in Role}
        self._reserved: Pair | None = None

    def add(self, worker: WorkerView) -> None:
        self._disconnect(worker.worker_id)
        self.workers[worker.worker_id] = worker
        self._indexes[worker.member.role].add(worker)
        _pools_of(self.pools, worker).put(worker.worker_id, worker.pool)
        self._note_draining(worker)

    def remove(self, worker_id: str) -> WorkerView | None:
        """Take a worker out; one that was draining is not expected to come back."""
        worker = self._disconnect(worker_id)
        self.routes.forget(worker_id)
        if worker is not None and worker.load.draining:
            self.pools.forget(worker_id)
        return worker

    def update(self, worker: WorkerView, load: WorkerLoad) -> None:
        """Take a newer Load of a connected worker."""
        was_draining = worker.load.draining
        worker.update(load)
        self._indexes[worker.member.role].update(worker)
        if load.draining != was_draining:
            self._note_draining(worker)

    @property
    def can_serve(self) -> bool:
        """Whether some prompt could be computed and decoded by the connected workers."""
        decode, prefill = self._takers.decode, self._takers.prefill
        return bool(decode.largest) and (
            bool(prefill.largest) or any(pool.local_prefill_tokens > 0 for pool in decode.largest)
        )

    def find(self, need: Need) -> Pair | None:
        """Pick the workers for work, or None when none have room now, or soon will have."""
        pair = self._find(need)
        if pair is None or not self.routes.is_resting(*pair.ids):
            return pair
        prefill, decode = self._indexes[Role.PREFILL], self._indexes[Role.DECODE]
        able = Ways(lambda: prefill.able(need), lambda may: decode.able(need, may))
        free = Ways(lambda: prefill.with_room(need), lambda may: decode.with_room(need, may))
        return find_around_rests(able, free, self.routes, need)

    def _find(self, need: Need) -> Pair | None:
        prefill, decode = self._indexes[Role.PREFILL], self._indexes[Role.DECODE]
        # Beside prefill workers, prompts are left to them, but for those too large for each.
        is_left_to_others = any(pool.could_prefill(need) for pool in self._takers.prefill.largest)

        def computes_alone(local_prefill_tokens: int) -> bool:
            if local_prefill_tokens == UNLIMITED_LOCAL_PREFILL:
                return not is_left_to_others
            return need.num_tokens <= local_prefill_tokens

        alone = decode.best(need, computes_alone)
        if alone is not None:
            return Pair(None, alone)
        decoder = decode.best(need)
        if decoder is None:
            return None
        prefiller = prefill.best(need)
        return None if prefiller is None else Pair(prefiller, decoder)

    def dispatch(self, pair: Pair, need: Need) -> None:
        """Count work that is sent to the pair now against their credit."""
        self.routes.sent(*pair.ids)
        pair.decode.dispatch(need, need.num_tokens if pair.prefill is None else 0)
        if pair.prefill is not None:
            pair.prefill.dispatch(need, need.num_tokens)
        for worker in pair.views:
            self._indexes[worker.member.role].update(worker)

    def reserve(self, need: Need) -> Pair | None:
        """Keep new work away from a pair; return the pair when it has room and nothing there is
        without a token. `release` ends it.

        Picking a pair looks at all workers. It is done once for a suspect as long as the pair lives
        and does not rest.
        """
        pair = self._reserved
        if pair is None or not self._is_worth_waiting_for(pair, need):
            self.release()
            prefill = sorted(self._indexes[Role.PREFILL].able(need), key=_time_until_quiet)
            able = Ways(
                lambda: iter(prefill),
                lambda may: iter(
                    sorted(self._indexes[Role.DECODE].able(need, may), key=_time_until_quiet)
                ),
            )
            well = able.that_are_well(self.routes)
            pair = first_well(well.all_pairs(need), self.routes) or next(able.all_pairs(need), None)
            if pair is None:
                return None
            self._reserved = pair
            self._set_reserved(pair, True)
        return pair if pair.has_room(need) and not pair.num_without_token else None

    def release(self) -> None:
        """Let new work go everywhere."""
        if self._reserved is not None:
            self._set_reserved(self._reserved, False)
            self._reserved = None

    def _is_worth_waiting_for(self, pair: Pair, need: Need) -> bool:
        """Whether a pair that was picked earlier is one to wait for still."""
        return (
            all(self._is_connected(w) and not w.load.draining for w in pair.views)
            and not self.routes.is_resting(*pair.ids)
            and pair.could_run(need)
        )

    def _set_reserved(self, pair: Pair, is_reserved: bool) -> None:
        for worker in pair.views:
            worker.is_reserved = is_reserved
            if self._is_connected(worker):
                self._indexes[worker.member.role].update(worker)

    def _is_connected(self, worker: WorkerView) -> bool:
        return self.workers.get(worker.worker_id) is worker

    def _disconnect(self, worker_id: str) -> WorkerView | None:
        worker = self.workers.pop(worker_id, None)
        if worker is not None:
            self._indexes[worker.member.role].remove(worker)
            self._takers.forget(worker_id)
        return worker

    def _note_draining(self, worker: WorkerView) -> None:
        takers = _pools_of(self._takers, worker)
        if worker.load.draining:
            takers.discard(worker.worker_id)
        else:
            takers.put(worker.worker_id, worker.pool)


def _pools_of(pools: KnownPools, worker: WorkerView) -> PoolSizes:
    return pools.prefill if worker.member.role is Role.PREFILL else pools.decode


def _time_until_quiet(worker: WorkerView) -> tuple[int, int]:
    """Order workers by how soon a suspect may run there."""
    return len(worker.without_token), -worker.credit_blocks
