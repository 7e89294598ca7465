"""What a prefill worker tells its routers, from steps at given times."""

from collections.abc import Callable

import pytest
from opcodes import num_opcodes
from prefill_simulation import PrefillSimulation, make_work
from recording_routers import RecordingRouters

from paceline.errors import IntegrityError
from paceline.failpoints import Failpoints
from paceline.groups import Groups
from paceline.kv_transfer.lease import LeaseTable
from paceline.prefill_worker.core import PrefillCore
from paceline.prefill_worker.scheduler import PrefillScheduler
from paceline.request import AttemptKey, Span
from paceline.worker.core import Peer


def make_core(simulation: PrefillSimulation) -> PrefillCore:
    return PrefillCore(
        simulation.scheduler,  # type: ignore[arg-type]
        LeaseTable(simulation.allocator, ttl_s=100.0),
        RecordingRouters(),
        Failpoints(),
        worker_id="prefill-0",
        unix_offset_s=0.0,
    )


def test_chunks_are_timed_from_their_plan_and_reported_before_the_first_token() -> None:
    simulation = PrefillSimulation(max_num_batched_tokens=64)
    routers = RecordingRouters()
    core = PrefillCore(
        simulation.scheduler,  # type: ignore[arg-type]
        LeaseTable(simulation.allocator, ttl_s=100.0),
        routers,
        Failpoints(),
        worker_id="prefill-0",
        unix_offset_s=1000.0,
    )
    core.dispatch(1, make_work("r", range(100, 180)), Peer("decode-0", 1, "127.0.0.1:1"), now=1.0)
    for planned_s, applied_s in ((4.0, 6.0), (7.0, 7.5)):
        plan = core.plan(planned_s)
        assert plan is not None
        core.apply(simulation.runner.launch(plan).result(), applied_s)
    assert routers.calls == ["admission", "phase prefill", "output"]
    assert routers.spans == [
        Span("prefill", "prefill-0", 1004.0, 1006.0, 64),
        Span("prefill", "prefill-0", 1007.0, 1007.5, 16),
    ]


def miscount_choices(scheduler: PrefillScheduler[str], core: PrefillCore) -> None:
    scheduler._num_computing += 1


def miscount_tokens(scheduler: PrefillScheduler[str], core: PrefillCore) -> None:
    scheduler._num_pending_tokens -= 1


def miscount_unplanned_tokens(scheduler: PrefillScheduler[str], core: PrefillCore) -> None:
    scheduler._waiting.num_tokens += 1


def forget_to_plan(scheduler: PrefillScheduler[str], core: PrefillCore) -> None:
    scheduler._waiting.discard(next(iter(scheduler._prompts.values())))


def forget_the_session(scheduler: PrefillScheduler[str], core: PrefillCore) -> None:
    core._of_session = Groups()


def forget_the_request(scheduler: PrefillScheduler[str], core: PrefillCore) -> None:
    core._of_request = Groups()


@pytest.mark.parametrize(
    "mistake",
    [
        miscount_choices,
        miscount_tokens,
        miscount_unplanned_tokens,
        forget_to_plan,
        forget_the_session,
        forget_the_request,
    ],
)
def test_a_wrong_count_or_index_is_found(
    mistake: Callable[[PrefillScheduler[str], PrefillCore], None],
) -> None:
    simulation = PrefillSimulation()
    core = make_core(simulation)
    core.dispatch(1, make_work("r", range(100, 180)), Peer("decode-0", 1, ""), now=1.0)
    core.check_integrity()
    mistake(simulation.scheduler, core)
    with pytest.raises(IntegrityError):
        core.check_integrity()


def test_no_message_costs_more_beside_many_waiting_prompts() -> None:
    few, many = (costs(num_waiting) for num_waiting in (30, 1000))
    for name, count in many.items():
        assert count < 1.5 * few[name], f"{name}: {count} and {few[name]} opcodes"


def costs(num_waiting: int) -> dict[str, int]:
    """Count what each call executes on a worker with prompts that wait."""
    simulation = PrefillSimulation(
        num_blocks=8 * num_waiting + 64,
        max_num_seqs=num_waiting + 8,
        max_num_batched_tokens=64,
        max_model_len=200,
    )
    core = make_core(simulation)
    peer = Peer("decode-0", 1, "127.0.0.1:1")

    def dispatch(name: str, session: int) -> None:
        core.dispatch(session, make_work(name, range(100, 180)), peer, now=1.0)

    for number in range(num_waiting):
        dispatch(f"waiting-{number}", session=number % 3)
    dispatch("of another", session=7)
    counts = {
        "dispatch": num_opcodes(lambda: dispatch("new", session=8)),
        "load": num_opcodes(core.load),
        "tick": num_opcodes(lambda: core.tick(1.0)),
        "idle": num_opcodes(lambda: core.is_idle or simulation.scheduler.has_work),
    }
    plan = core.plan(1.0)
    assert plan is not None
    result = simulation.runner.launch(plan).result()
    counts["apply"] = num_opcodes(lambda: core.apply(result, 1.0))
    counts["plan"] = num_opcodes(lambda: core.plan(1.0))
    # Both wait for the step in flight, or for none.
    key = AttemptKey("new", 1)
    counts["cancel"] = num_opcodes(lambda: core.cancel(8, key, (), 1.0))
    counts["end session"] = num_opcodes(lambda: core.end_session(7, 1.0))
    core.check_integrity()
    return counts
