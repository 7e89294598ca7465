"""What the router claims at which worker for the work at the head of its queue. Pure.

Each Load that leaves the head waiting is answered with a claim, so a message costs O(1). At one
worker of each role the claim holds: room is kept free there until the work fits. Elsewhere it only
has its place among the claims of other routers.
"""

from typing import NamedTuple

from paceline.router.active_request import WaitingWork
from paceline.router.capacity import Need
from paceline.router.worker_messages import WorkerClaim, WorkerCommands
from paceline.router.worker_view import Pair, Role, WorkerView

_RENEW_S = 1.0
"""A claim is repeated with the next Load after this time: workers forget it after three."""


class _Told(NamedTuple):
    work: WaitingWork
    num_blocks: int
    holds: bool
    at_s: float


class Claims:
    """What each worker was told last."""

    def __init__(self, commands: WorkerCommands) -> None:
        self._commands = commands
        self._told: dict[str, _Told] = {}
        self._holders: dict[Role, str] = {}

    def wait(self, worker: WorkerView, work: WaitingWork, need: Need, now: float) -> None:
        """Claim room at a worker whose Load has left work waiting."""
        if worker.load.draining or not worker.could_run(need):
            self.withdraw(worker)
            return
        holder = self._holders.setdefault(worker.member.role, worker.worker_id)
        told = self._told.get(worker.worker_id)
        holds = holder == worker.worker_id
        is_known = told is not None and told[:3] == (work, worker.blocks_for(need), holds)
        if told is not None and is_known and now - told.at_s < _RENEW_S:
            return
        self._told[worker.worker_id] = _Told(work, worker.blocks_for(need), holds, now)
        waited_s = max(0.0, now - work.request.arrived_s)
        claim = WorkerClaim(worker.blocks_for(need), need.num_choices, waited_s, holds)
        self._commands.claim(worker.worker_id, claim)

    def withdraw(self, worker: WorkerView) -> None:
        """Take back what was claimed at a worker, if there is anything."""
        self._stop_holding(worker.worker_id)
        if self._told.pop(worker.worker_id, None) is not None:
            self._commands.claim(worker.worker_id, WorkerClaim(0, 0, 0.0, False))

    def sent(self, pair: Pair, workers: dict[str, WorkerView]) -> None:
        """Note that work goes to a pair, which ends the claims there; end the holds elsewhere."""
        for worker in pair.views:
            self.forget(worker.worker_id)
        for worker_id in list(self._holders.values()):
            self.withdraw(workers[worker_id])

    def forget(self, worker_id: str) -> None:
        """Forget what a worker was told: it has forgotten it, or is gone."""
        self._told.pop(worker_id, None)
        self._stop_holding(worker_id)

    def _stop_holding(self, worker_id: str) -> None:
        self._holders = {role: held for role, held in self._holders.items() if held != worker_id}
