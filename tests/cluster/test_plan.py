"""Decisions of the controller: wanted + seen -> actions."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from paceline.cluster.back_off import BackOff
from paceline.cluster.plan import LIVE, Action, Drain, Seen, Start, Stop, plan
from paceline.cluster.process_state import TRANSITIONS, ProcessName, ProcessState, Role


def make_back_off() -> BackOff:
    return BackOff(first_s=1.0, max_s=30.0, stable_after_s=30.0)


def make_seen(
    worker_id: str,
    state: ProcessState = ProcessState.READY,
    *,
    is_idle: bool = False,
    drain_deadline_s: float | None = None,
    incarnation: int = 1,
) -> Seen:
    name = ProcessName.parse(f"{worker_id}.{incarnation}")
    assert name is not None
    return Seen(name, state, is_idle, drain_deadline_s)


def test_an_empty_deployment_starts_everything_wanted() -> None:
    wanted = {Role.ROUTER: 1, Role.PREFILL: 1, Role.DECODE: 2}
    assert plan(wanted, [], make_back_off(), now=0.0) == [
        Start(Role.ROUTER, 0),
        Start(Role.PREFILL, 0),
        Start(Role.DECODE, 0),
        Start(Role.DECODE, 1),
    ]


def test_nothing_is_done_when_all_is_as_wanted() -> None:
    seen = [make_seen("decode-0"), make_seen("decode-1", ProcessState.STARTING)]
    assert plan({Role.DECODE: 2}, seen, make_back_off(), now=0.0) == []


def test_a_dead_worker_is_replaced_under_its_id() -> None:
    seen = [make_seen("decode-0", ProcessState.DEAD), make_seen("decode-1")]
    assert plan({Role.DECODE: 2}, seen, make_back_off(), now=0.0) == [Start(Role.DECODE, 0)]


def test_scaling_down_drains_the_highest_index() -> None:
    seen = [make_seen("decode-0"), make_seen("decode-1"), make_seen("decode-2")]
    assert plan({Role.DECODE: 1}, seen, make_back_off(), now=0.0) == [
        Drain(seen[2].name),
        Drain(seen[1].name),
    ]


def test_scaling_down_stops_what_still_starts_before_draining_what_serves() -> None:
    seen = [make_seen("decode-0", ProcessState.STARTING), make_seen("decode-1")]
    assert plan({Role.DECODE: 1}, seen, make_back_off(), now=0.0) == [Stop(seen[0].name)]


def test_a_draining_worker_is_stopped_when_idle() -> None:
    busy = make_seen("decode-1", ProcessState.DRAINING, drain_deadline_s=10.0)
    assert plan({Role.DECODE: 0}, [busy], make_back_off(), now=9.9) == []
    assert plan({Role.DECODE: 0}, [busy._replace(is_idle=True)], make_back_off(), now=1.0) == [
        Stop(busy.name)
    ]


def test_a_draining_worker_is_stopped_at_its_deadline() -> None:
    busy = make_seen("decode-1", ProcessState.DRAINING, drain_deadline_s=10.0)
    assert plan({Role.DECODE: 0}, [busy], make_back_off(), now=10.0) == [Stop(busy.name)]


def test_the_id_of_a_draining_worker_is_not_given_to_a_new_one() -> None:
    seen = [make_seen("decode-0"), make_seen("decode-1", ProcessState.DRAINING)]
    assert plan({Role.DECODE: 2}, seen, make_back_off(), now=0.0) == [Start(Role.DECODE, 2)]


def test_a_crash_loop_waits_longer_each_time() -> None:
    back_off = make_back_off()
    waits = []
    for _ in range(8):
        back_off.failed("decode-0", ready_for_s=0.0, now=100.0)
        waits.append(back_off.seconds_left("decode-0", now=100.0))
    assert waits == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    others = [make_seen("decode-1")]
    assert plan({Role.DECODE: 2}, others, back_off, now=129.9) == []
    assert plan({Role.DECODE: 2}, others, back_off, now=130.0) == [Start(Role.DECODE, 0)]


def test_an_empty_pool_is_not_kept_waiting_for_long() -> None:
    back_off = make_back_off()
    for worker_id in ("decode-0", "decode-1") * 8:
        back_off.failed(worker_id, ready_for_s=0.0, now=100.0)
    wanted = {Role.DECODE: 2}
    both = [Start(Role.DECODE, 0), Start(Role.DECODE, 1)]
    gone = [make_seen("decode-0", ProcessState.DEAD), make_seen("decode-2", ProcessState.DRAINING)]
    for seen in ([], gone):
        assert plan(wanted, seen, back_off, now=101.9) == []
        assert plan(wanted, seen, back_off, now=102.0) == both
    assert plan(wanted, [make_seen("decode-1")], back_off, now=129.9) == []


def test_a_waiting_id_is_not_replaced_by_another_one() -> None:
    back_off = make_back_off()
    for _ in range(3):
        back_off.failed("decode-1", ready_for_s=0.0, now=0.0)
    assert plan({Role.DECODE: 2}, [make_seen("decode-0")], back_off, now=1.0) == []


def test_a_long_time_in_service_ends_a_row_of_failures() -> None:
    back_off = make_back_off()
    for _ in range(5):
        back_off.failed("decode-0", ready_for_s=0.0, now=0.0)
    back_off.failed("decode-0", ready_for_s=31.0, now=100.0)
    assert back_off.may_start("decode-0", now=100.0)


def test_a_worker_that_was_told_to_end_has_no_failures() -> None:
    back_off = make_back_off()
    for _ in range(5):
        back_off.failed("decode-0", ready_for_s=0.0, now=0.0)
    back_off.forget("decode-0")
    assert back_off.may_start("decode-0", now=0.0)
    assert back_off.num_failures("decode-0") == 0


def test_every_state_has_its_transitions_and_dead_is_final() -> None:
    assert set(TRANSITIONS) == set(ProcessState)
    assert TRANSITIONS[ProcessState.DEAD] == frozenset()
    for state in ProcessState:
        if state is not ProcessState.DEAD:
            assert ProcessState.DEAD in TRANSITIONS[state]


def test_a_name_survives_writing_and_reading() -> None:
    name = ProcessName(Role.DECODE, 12, 1763915000000000000)
    assert ProcessName.parse(str(name)) == name
    for other in ("controller", "decode.1", "decode-x.1", "decode-1", "gpu-0.1", "decode-0.x"):
        assert ProcessName.parse(other) is None


wanted_sizes = st.fixed_dictionaries(
    {Role.PREFILL: st.integers(0, 4), Role.DECODE: st.integers(0, 4)}
)
processes = st.dictionaries(
    st.sampled_from([f"{role}-{i}" for role in ("prefill", "decode") for i in range(6)]),
    st.tuples(st.sampled_from(ProcessState), st.booleans()),
).map(lambda found: [make_seen(k, state, is_idle=idle) for k, (state, idle) in found.items()])


def perform(seen: list[Seen], actions: list[Action]) -> list[Seen]:
    """Do what was planned, and let everything begun succeed."""
    by_name = {s.name: s for s in seen if s.state is not ProcessState.DEAD}
    for action in actions:
        if isinstance(action, Start):
            name = ProcessName(action.role, action.number, 2)
            assert name.worker_id not in {other.worker_id for other in by_name}
            by_name[name] = Seen(name, ProcessState.READY, False, None)
        elif isinstance(action, Drain):
            old = by_name[action.name]
            assert ProcessState.DRAINING in TRANSITIONS[old.state]
            by_name[action.name] = old._replace(state=ProcessState.DRAINING, is_idle=True)
        else:
            assert ProcessState.STOPPING in TRANSITIONS[by_name[action.name].state]
            del by_name[action.name]
    return list(by_name.values())


@given(wanted_sizes, processes)
def test_carrying_out_plans_reaches_the_wanted_sizes(
    wanted: dict[Role, int], seen: list[Seen]
) -> None:
    for _ in range(3):
        # What was told to stop ends meanwhile; what drains becomes idle.
        seen = [s._replace(is_idle=True) for s in seen if s.state is not ProcessState.STOPPING]
        seen = perform(seen, plan(wanted, seen, make_back_off(), now=0.0))
    live = Counter(s.name.role for s in seen if s.state in LIVE)
    assert {role: live[role] for role in wanted} == wanted
    assert all(s.state in LIVE for s in seen)


@given(wanted_sizes, processes)
def test_no_process_gets_two_orders_and_no_more_end_than_are_too_many(
    wanted: dict[Role, int], seen: list[Seen]
) -> None:
    actions = plan(wanted, seen, make_back_off(), now=0.0)
    ordered = [a.name for a in actions if not isinstance(a, Start)]
    assert len(ordered) == len(set(ordered))
    for role, size in wanted.items():
        live = {s.name for s in seen if s.name.role is role and s.state in LIVE}
        ended = live.intersection(ordered)
        assert len(live) - len(ended) >= min(size, len(live))
