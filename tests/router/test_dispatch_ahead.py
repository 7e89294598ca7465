"""How much is sent to a prefill worker before it can compute it, in a simulation of its time."""

from collections import deque
from typing import NamedTuple

from router_requests import make_active_request

from paceline.request import AttemptKey, Work
from paceline.router.capacity import WorkerPool
from paceline.router.dispatch import Dispatcher
from paceline.router.settings import RouterSettings
from paceline.router.worker_messages import WorkerClaim
from paceline.router.worker_view import Role, WorkerLoad, WorkerMember, WorkerView

RATE = 9000
PROMPT_TOKENS = 2000
STEP_TOKENS = 1000
ROUND_TRIP_S = 0.005
DECODE_BLOCKS = 20_000


class Measured(NamedTuple):
    idle_s: float
    busy_s: float
    most_blocks_idle: int
    """Decode blocks reserved for prompts whose computation has not begun."""


class Recorder:
    """Takes what the dispatcher sends to the prefill worker."""

    def __init__(self) -> None:
        self.arrived: deque[Work] = deque()
        self.num_dispatches = 0

    def prefill(self, worker_id: str, work: Work, reader: WorkerMember) -> None:
        self.arrived.append(work)
        self.num_dispatches += 1

    def admit(self, worker_id: str, work: Work, source: WorkerMember | None) -> None:
        pass

    def claim(self, worker_id: str, claim: WorkerClaim) -> None:
        pass

    def cancel(self, worker_id: str, key: AttemptKey, choices: tuple[int, ...]) -> None:
        pass


def compute(num_prompts: int) -> Measured:
    """Send prompts to one prefill worker, which computes them in order, step by step."""
    recorder = Recorder()
    dispatcher = Dispatcher(RouterSettings(), recorder)
    for name, role in (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE)):
        pool = WorkerPool(DECODE_BLOCKS, 16, 256)
        load = WorkerLoad(DECODE_BLOCKS, 256, prefill_tokens_per_s=RATE)
        dispatcher.worker_joined(WorkerView(WorkerMember(name, role, 1, ""), pool, load), 0.0)
    for number in range(num_prompts):
        request = make_active_request(str(number), range(1, PROMPT_TOKENS + 1))
        dispatcher.submit(request, 0.0)
    now = idle_s = busy_s = 0.0
    most_blocks_idle = num_computed = 0
    while num_computed < num_prompts * PROMPT_TOKENS:
        num_begun = -(-num_computed // PROMPT_TOKENS)
        num_unbegun = recorder.num_dispatches - num_begun
        most_blocks_idle = max(most_blocks_idle, num_unbegun * (PROMPT_TOKENS // 16 + 1))
        pending = recorder.num_dispatches * PROMPT_TOKENS - num_computed
        if pending:
            num_computed += min(pending, STEP_TOKENS)
            pending -= min(pending, STEP_TOKENS)
            busy_s += STEP_TOKENS / RATE
            now += STEP_TOKENS / RATE
        if not pending:
            idle_s += ROUND_TRIP_S
            now += ROUND_TRIP_S
        load = WorkerLoad(
            DECODE_BLOCKS, 256, recorder.num_dispatches, 0, pending, prefill_tokens_per_s=RATE
        )
        dispatcher.load_changed("prefill-0", load, now)
    return Measured(idle_s, busy_s, most_blocks_idle)


def test_few_decode_blocks_wait_for_prompts_and_the_prefill_worker_is_never_idle() -> None:
    measured = compute(num_prompts=100)
    assert measured.most_blocks_idle < 0.03 * DECODE_BLOCKS
    assert measured.idle_s <= ROUND_TRIP_S  # after the last one
    assert measured.busy_s > 20
