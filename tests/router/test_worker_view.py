"""What may still be sent to a worker."""

import math

from paceline.router.capacity import Need, WorkerPool
from paceline.router.worker_view import Role, WorkerLoad, WorkerMember, WorkerView

NEED = Need(num_tokens=1000, num_choices=1)


def make_view(role: Role, load: WorkerLoad, ahead_s: float = 0.5) -> WorkerView:
    member = WorkerMember("w", role, 1, "")
    return WorkerView(member, WorkerPool(10_000, 16, 64), load, dispatch_ahead_s=ahead_s)


def make_load(pending: int, rate: int) -> WorkerLoad:
    return WorkerLoad(10_000, 64, num_pending_tokens=pending, prefill_tokens_per_s=rate)


def test_prompts_are_sent_ahead_for_as_long_as_the_setting_says() -> None:
    view = make_view(Role.PREFILL, make_load(0, 5000))
    num_sent = 0
    while view.can_take(NEED):
        view.dispatch(NEED, NEED.num_tokens)
        num_sent += 1
    assert num_sent == 3  # 2,500 tokens are computed in 0.5 s
    view.update(WorkerLoad(10_000, 64, 3, num_pending_tokens=2499, prefill_tokens_per_s=5000))
    assert view.can_take(NEED)


def test_idle_prefill_worker_takes_a_prompt_however_slow_it_is() -> None:
    assert make_view(Role.PREFILL, make_load(0, 1)).can_take(NEED)
    assert not make_view(Role.PREFILL, make_load(1, 1)).can_take(NEED)


def test_little_is_sent_ahead_while_the_rate_is_not_known() -> None:
    view = make_view(Role.PREFILL, make_load(0, 0), math.inf)
    num_sent = 0
    while view.can_take(NEED):
        view.dispatch(NEED, NEED.num_tokens)
        num_sent += 1
    assert num_sent == 3


def test_pending_prompts_of_a_decode_worker_do_not_keep_work_away() -> None:
    assert make_view(Role.DECODE, make_load(1_000_000, 1)).can_take(NEED)
