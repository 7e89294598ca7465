"""Several routers that share one decode worker, in a simulation of its steps."""

import itertools
import random
from collections import deque
from collections.abc import Callable

from router_requests import make_active_request

from paceline.request import AttemptKey, FinishReason, Work, num_blocks_promised
from paceline.router.capacity import UNLIMITED_LOCAL_PREFILL, WorkerPool
from paceline.router.dispatch import Dispatcher
from paceline.router.settings import RouterSettings
from paceline.router.worker_messages import TokenColumns, WorkerClaim
from paceline.router.worker_view import Role, WorkerLoad, WorkerMember, WorkerView
from paceline.worker.credit import Claim, Room, offer

STEP_S = 0.02
BLOCK_TOKENS = 16


class SharedWorker:
    """Holds every sequence for about 50 steps; offers its room by the worker's rule."""

    def __init__(self, num_routers: int, num_blocks: int, num_slots: int) -> None:
        self.now = 0.0
        self.free = Room(num_blocks, num_slots)
        self.lives = random.Random(1)
        self.claims: dict[int, Claim] = {}
        self.inbox: deque[Callable[[], None]] = deque()
        self.running: list[tuple[int, int, Work]] = []
        """Last step, router, work."""
        self.admitted_s: dict[str, float] = {}
        self.step_number = 0
        self.num_seen = [0] * num_routers
        self.routers = [
            Dispatcher(RouterSettings(max_queue_requests=10_000), RouterEnd(self, number))
            for number in range(num_routers)
        ]
        pool = WorkerPool(num_blocks, BLOCK_TOKENS, num_slots, UNLIMITED_LOCAL_PREFILL)
        for router in self.routers:
            member = WorkerMember("decode-0", Role.DECODE, 1, "")
            load = WorkerLoad(num_blocks, num_slots)
            router.worker_joined(WorkerView(member, pool, load), 0.0)

    def step(self) -> None:
        self.now += STEP_S
        self.step_number += 1
        while self.inbox:
            self.inbox.popleft()()
        ended = [entry for entry in self.running if entry[0] <= self.step_number]
        self.running = [entry for entry in self.running if entry[0] > self.step_number]
        for _, number, work in ended:
            self._change_free(work, 1)
            stream_id = work.stream_ids[0]
            columns = TokenColumns([stream_id], [0], [7], [(stream_id, FinishReason.STOP)])
            self.routers[number].tokens("decode-0", columns, self.now)
        offers = offer(self.free, self.claims, self.now)
        for number, router in enumerate(self.routers):
            room = offers.claimed.get(number, offers.rest)
            load = WorkerLoad(*room, self.num_seen[number])
            router.load_changed("decode-0", load, self.now)
            router.dispatch(self.now)

    def take(self, number: int, work: Work) -> None:
        self.num_seen[number] += 1
        self.claims.pop(number, None)
        message = None
        if self.free.num_sequences and _num_blocks(work) <= self.free.num_blocks:
            self._change_free(work, -1)
            self.running.append((self.step_number + self.lives.randint(20, 80), number, work))
            self.admitted_s.setdefault(work.key.request_id, self.now)
        else:
            message = "no room"
        self.routers[number].admission("decode-0", work.key, message, 0, self.now)

    def _change_free(self, work: Work, sign: int) -> None:
        blocks, sequences = self.free
        self.free = Room(blocks + sign * _num_blocks(work), sequences + sign)


class RouterEnd:
    """Takes what one router sends to the worker."""

    def __init__(self, worker: SharedWorker, number: int) -> None:
        self.worker, self.number = worker, number

    def prefill(self, worker_id: str, work: Work, reader: WorkerMember) -> None:
        raise AssertionError("there is no prefill worker")

    def admit(self, worker_id: str, work: Work, source: WorkerMember | None) -> None:
        self.worker.inbox.append(lambda: self.worker.take(self.number, work))

    def cancel(self, worker_id: str, key: AttemptKey, choices: tuple[int, ...]) -> None:
        raise AssertionError("nothing is cancelled")

    def claim(self, worker_id: str, claim: WorkerClaim) -> None:
        def take() -> None:
            now = self.worker.now
            if claim.num_sequences:
                self.worker.claims[self.number] = Claim(
                    claim.num_blocks, claim.num_sequences, now - claim.waited_s, claim.holds, now
                )
            else:
                self.worker.claims.pop(self.number, None)

        self.worker.inbox.append(take)


def _num_blocks(work: Work) -> int:
    return num_blocks_promised(work.num_tokens, len(work.choices), BLOCK_TOKENS)


def keep_waiting(
    worker: SharedWorker, router: int, num_requests: int, names: "itertools.count[int]"
) -> None:
    """Keep a backlog of small requests at a router."""
    dispatcher = worker.routers[router]
    while len(dispatcher.requests) < num_requests:
        request = make_active_request(f"s{next(names)}", range(1, 41), arrived_s=worker.now)
        dispatcher.submit(request, worker.now)


def test_large_request_is_admitted_beside_floods_of_small_ones_of_other_routers() -> None:
    """It waits until the pool has freed what it needs, and before that what earlier ones need. All
    of the pool is freed in about 50 steps."""
    for num_floods in (1, 3):
        worker = SharedWorker(1 + num_floods, num_blocks=300, num_slots=200)
        names = itertools.count()
        for step in range(200 + 300 * num_floods):
            for router in range(1, 1 + num_floods):
                keep_waiting(worker, router, 120, names)
            if step == 200:
                large = make_active_request("large", range(1, 90 * 16 - 30), arrived_s=worker.now)
                worker.routers[0].submit(large, worker.now)
                submitted_s = worker.now
            worker.step()
        waited_s = worker.admitted_s["large@router"] - submitted_s
        num_earlier = num_floods * 120 - 300 // 4
        expected_s = (num_earlier * 4 + 90) / 300 * 50 * STEP_S
        assert waited_s < 1.3 * expected_s


def test_routers_with_backlogs_use_every_slot_and_share_them() -> None:
    worker = SharedWorker(8, num_blocks=10_000, num_slots=64)
    names = itertools.count()
    num_running = []
    for step in range(400):
        for router in range(8):
            keep_waiting(worker, router, 50, names)
        worker.step()
        if step >= 100:
            num_running.append(len(worker.running))
    assert sum(num_running) / len(num_running) > 0.93 * 64  # a freed slot is used 2 steps later
    assert max(num_running) == 64
