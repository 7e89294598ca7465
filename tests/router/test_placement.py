import pytest
from counted_calls import count_calls
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_placement import find_pair

from paceline.router.capacity import UNLIMITED_LOCAL_PREFILL, Need, WorkerPool
from paceline.router.placement import Placement
from paceline.router.worker_view import Role, WorkerLoad, WorkerMember, WorkerView


def make_worker(
    worker_id: str,
    role: Role = Role.DECODE,
    *,
    num_blocks: int = 100,
    credit_blocks: int | None = None,
    credit_sequences: int | None = None,
    max_num_seqs: int = 10,
    local_prefill_tokens: int = 0,
    num_pending_tokens: int = 0,
    draining: bool = False,
) -> WorkerView:
    load = WorkerLoad(
        num_blocks if credit_blocks is None else credit_blocks,
        max_num_seqs if credit_sequences is None else credit_sequences,
        num_pending_tokens=num_pending_tokens,
        draining=draining,
    )
    pool = WorkerPool(num_blocks, 16, max_num_seqs, local_prefill_tokens)
    return WorkerView(WorkerMember(worker_id, role, 1, "127.0.0.1:1"), pool, load)


def make_placement(*workers: WorkerView) -> Placement:
    placement = Placement()
    for worker in workers:
        placement.add(worker)
    return placement


def ids(placement: Placement, need: Need) -> tuple[str | None, str] | None:
    pair = placement.find(need)
    if pair is None:
        return None
    return pair.prefill and pair.prefill.worker_id, pair.decode.worker_id


def test_pair_with_most_credit_and_least_pending_prompt_is_taken() -> None:
    placement = make_placement(
        make_worker("p0", Role.PREFILL, num_pending_tokens=500),
        make_worker("p1", Role.PREFILL),
        make_worker("d0", credit_blocks=20),
        make_worker("d1", credit_blocks=60),
    )
    assert ids(placement, Need(100, 1)) == ("p1", "d1")


def test_dispatches_reduce_credit_until_the_worker_has_counted_them() -> None:
    worker = make_worker("d0", credit_blocks=20, local_prefill_tokens=1000)
    placement = make_placement(worker)
    need = Need(160, 1)  # 10 blocks and one to grow
    pair = placement.find(need)
    assert pair is not None
    placement.dispatch(pair, need)
    assert worker.credit_blocks == 9
    assert placement.find(need) is None
    placement.update(worker, WorkerLoad(credit_blocks=9, credit_sequences=9, num_dispatches_seen=1))
    assert worker.credit_blocks == 9
    placement.update(
        worker, WorkerLoad(credit_blocks=20, credit_sequences=10, num_dispatches_seen=1)
    )
    assert placement.find(need) is not None


def test_work_is_not_sent_to_a_worker_with_fewer_free_sequences_than_it_has_choices() -> None:
    """It would be refused, wait out a backoff, and let narrower work take the slots meanwhile."""
    for role in Role:
        narrow = {role: 3}
        placement = make_placement(
            *(
                make_worker(r.value, r, credit_sequences=narrow.get(r, 10))
                for r in (Role.PREFILL, Role.DECODE)
            )
        )
        assert ids(placement, Need(5, 3)) == ("prefill", "decode")
        assert ids(placement, Need(5, 4)) is None


def test_each_choice_of_a_dispatch_reduces_the_credit_by_a_sequence() -> None:
    prefill, decode = make_worker("p0", Role.PREFILL), make_worker("d0")
    placement = make_placement(prefill, decode)
    pair = placement.find(Need(5, 4))
    assert pair is not None
    placement.dispatch(pair, Need(5, 4))
    assert (prefill.credit_sequences, decode.credit_sequences) == (6, 6)
    assert ids(placement, Need(5, 7)) is None
    placement.update(
        decode, WorkerLoad(credit_blocks=90, credit_sequences=6, num_dispatches_seen=1)
    )
    assert decode.credit_sequences == 6


def test_draining_workers_get_no_new_work() -> None:
    placement = make_placement(
        make_worker("p0", Role.PREFILL), make_worker("d0", draining=True), make_worker("d1")
    )
    assert ids(placement, Need(10, 1)) == ("p0", "d1")


def test_long_prompts_wait_for_a_prefill_worker() -> None:
    placement = make_placement(make_worker("d0", local_prefill_tokens=32))
    assert ids(placement, Need(33, 1)) is None
    assert ids(placement, Need(32, 1)) == (None, "d0")


def test_colocated_workers_take_any_prompt_when_there_is_no_prefill_worker() -> None:
    decode = make_worker("d0", local_prefill_tokens=UNLIMITED_LOCAL_PREFILL)
    assert ids(make_placement(decode), Need(1000, 1)) == (None, "d0")
    with_prefill = make_placement(make_worker("p0", Role.PREFILL), decode)
    assert ids(with_prefill, Need(1000, 1)) == ("p0", "d0")


def test_preempted_work_needs_four_blocks_to_grow() -> None:
    placement = make_placement(make_worker("d0", credit_blocks=5, local_prefill_tokens=1000))
    assert ids(placement, Need(32, 1)) is not None
    assert ids(placement, Need(32, 1, preempted=True)) is None


def test_preempted_work_as_large_as_the_pool_takes_it_when_it_is_empty() -> None:
    placement = make_placement(make_worker("d0", num_blocks=5, local_prefill_tokens=1000))
    assert ids(placement, Need(63, 1, preempted=True)) == (None, "d0")


def test_prompts_too_large_for_every_prefill_worker_are_computed_by_a_decode_worker_that_may() -> (
    None
):
    prefill = make_worker("p0", Role.PREFILL, num_blocks=4)
    may = make_worker("d0", local_prefill_tokens=UNLIMITED_LOCAL_PREFILL)
    assert ids(make_placement(prefill, may), Need(64, 1)) == ("p0", "d0")
    assert ids(make_placement(prefill, may), Need(65, 1)) == (None, "d0")
    assert ids(make_placement(prefill, make_worker("d0")), Need(65, 1)) is None


def test_work_is_not_sent_to_a_decode_worker_that_cannot_hold_its_last_token() -> None:
    """Such a worker refuses it, however empty it is."""
    prefill = make_worker("p0", Role.PREFILL)
    small = make_worker("d0", num_blocks=10)
    large = make_worker("d1", num_blocks=20, credit_blocks=9)
    assert ids(make_placement(prefill, small, large), Need(16, 1, 144)) == ("p0", "d0")
    assert ids(make_placement(prefill, small, large), Need(16, 1, 145)) == ("p0", "d1")


def test_size_of_pools_is_remembered_when_a_worker_dies_until_its_replacement_comes() -> None:
    placement = make_placement(make_worker("d0", num_blocks=100))
    placement.remove("d0")
    placement.add(make_worker("d1", num_blocks=10))
    assert placement.pools.why_too_large(Need(500, 1)) is None
    placement.add(make_worker("d0", num_blocks=10))
    assert placement.pools.why_too_large(Need(500, 1)) is not None


def test_size_of_a_worker_that_was_drained_is_forgotten_when_it_goes() -> None:
    placement = make_placement(
        make_worker("d0", num_blocks=100, draining=True), make_worker("d1", num_blocks=10)
    )
    assert placement.pools.why_too_large(Need(500, 1)) is None
    placement.remove("d0")
    assert placement.pools.why_too_large(Need(500, 1)) is not None


EVENTS = ["join", "join", "leave", "load", "load", "dispatch", "dispatch", "fail", "wake"]
EVENTS += ["reserve", "release"]
WORKER_IDS = [f"{role}-{i}" for role in ("prefill", "decode") for i in range(3)]
ROUTES = [(f"prefill-{i}", f"decode-{j}") for i in range(3) for j in range(3)]
ROUTES += [(f"{role}-{i}",) for role in ("prefill", "decode") for i in range(3)]


def test_work_waits_for_a_pair_that_is_well_and_uses_one_that_rests_only_without_it() -> None:
    placement = make_placement(
        make_worker("p0", Role.PREFILL), make_worker("d0"), make_worker("d1", credit_blocks=0)
    )
    placement.routes.failed(("p0", "d0"), 0.0, 0.0)
    assert placement.find(Need(100, 1)) is None
    placement.routes.failed(("p0", "d1"), 0.0, 0.0)
    assert ids(placement, Need(100, 1)) == ("p0", "d0")
    placement.remove("d1")
    assert ids(placement, Need(100, 1)) == ("p0", "d0")


def test_without_a_pair_that_is_well_the_one_with_fewest_failures_is_used() -> None:
    placement = make_placement(
        make_worker("p0", Role.PREFILL), make_worker("d0"), make_worker("d1")
    )
    for now in range(3):
        placement.routes.failed(("p0", "d1"), now, now)
    placement.routes.failed(("p0", "d0"), 3, 3)
    assert ids(placement, Need(100, 1)) == ("p0", "d0")


@st.composite
def workers(draw: st.DrawFn, role: Role) -> list[WorkerView]:
    def worker(number: int) -> WorkerView:
        local = st.sampled_from([0, 20, UNLIMITED_LOCAL_PREFILL])
        return make_worker(
            f"{role.value}-{number}",
            role,
            num_blocks=draw(st.integers(2, 8)),
            max_num_seqs=draw(st.integers(1, 4)),
            local_prefill_tokens=draw(local) if role is Role.DECODE else 0,
        )

    return [worker(number) for number in range(draw(st.integers(1, 3)))]


@given(
    workers(Role.PREFILL),
    workers(Role.DECODE),
    st.builds(Need, st.integers(1, 140), st.integers(1, 5), st.integers(0, 40), st.booleans()),
    st.sets(st.sampled_from(ROUTES), max_size=5),
)
def test_work_either_finds_a_place_among_empty_workers_or_is_too_large(
    prefillers: list[WorkerView],
    decoders: list[WorkerView],
    need: Need,
    failed: set[tuple[str, ...]],
) -> None:
    """Otherwise it would wait for ever, and everything behind it too: also when all have failed."""
    placement = make_placement(*prefillers, *decoders)
    for route in failed:
        placement.routes.failed(route, 0.0, 0.0)
    has_place = placement.find(need) is not None
    assert has_place == (placement.pools.why_too_large(need) is None)


def loads(pool: WorkerPool, num_seen: int) -> st.SearchStrategy[WorkerLoad]:
    return st.builds(
        WorkerLoad,
        credit_blocks=st.integers(0, pool.num_blocks),
        credit_sequences=st.integers(0, pool.max_num_seqs),
        num_dispatches_seen=st.just(num_seen),
        num_running=st.integers(0, 2),
        num_pending_tokens=st.sampled_from([0, 10, 20]),
        draining=st.sampled_from([False, False, False, True]),
    )


@st.composite
def loaded_workers(draw: st.DrawFn, worker_id: str) -> WorkerView:
    role = Role(worker_id.partition("-")[0])
    local = draw(st.sampled_from([0, 20, UNLIMITED_LOCAL_PREFILL])) if role is Role.DECODE else 0
    pool = WorkerPool(draw(st.sampled_from([4, 9, 10, 12])), 16, draw(st.integers(1, 5)), local)
    member = WorkerMember(worker_id, role, 1, "")
    return WorkerView(member, pool, draw(loads(pool, 0)))


NEEDS = st.builds(Need, st.integers(1, 140), st.integers(1, 5), st.integers(0, 40), st.booleans())


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_choice_is_that_of_a_search_through_all_workers_whatever_happened(
    data: st.DataObject,
) -> None:
    """The ordered structures must follow every load, dispatch, rest, reservation and loss."""
    placement = Placement()
    for index in range(data.draw(st.integers(2, 40), "events")):
        event = data.draw(st.sampled_from(EVENTS), "event")
        worker_id = data.draw(st.sampled_from(WORKER_IDS), "worker")
        worker = placement.workers.get(worker_id)
        need = data.draw(NEEDS, "need")
        if event == "join":
            placement.remove(worker_id)
            placement.add(data.draw(loaded_workers(worker_id), "joining"))
        elif event == "leave":
            placement.remove(worker_id)
        elif event == "load" and worker is not None:
            seen = data.draw(st.integers(0, worker.num_dispatched), "seen")
            placement.update(worker, data.draw(loads(worker.pool, seen), "load"))
        elif event == "dispatch":
            pair = placement.find(need)
            if pair is not None:
                placement.dispatch(pair, need)
        elif event == "fail":
            route = data.draw(st.sampled_from(ROUTES), "route")
            placement.routes.failed(route, index, index)
        elif event == "wake":
            placement.routes.wake(index)
        elif event == "reserve":
            placement.reserve(need)
        elif event == "release":
            placement.release()
        wanted = find_pair(list(placement.workers.values()), placement.routes, need)
        assert placement.find(need) == wanted


FITS_SOME = 16 * 99
"""Tokens for half of the workers; beside a rest, each of them is looked at."""


@pytest.mark.parametrize("need", [Need(100, 1), Need(100, 7), Need(FITS_SOME, 1), Need(1, 11)])
@pytest.mark.parametrize("credit", ["some", "none"])
@pytest.mark.parametrize("resting", [(), ("d0",), ("p0", "d0")])
def test_choice_and_new_load_cost_the_same_among_many_workers(
    need: Need, credit: str, resting: tuple[str, ...]
) -> None:
    num_calls = []
    for num_workers in (8, 1024):
        most = 100 if credit == "some" else 0
        placement = make_placement(
            *(
                make_worker(f"p{i}", Role.PREFILL, num_pending_tokens=i, credit_blocks=most)
                for i in range(num_workers)
            ),
            *(
                make_worker(f"d{i}", credit_blocks=max(0, most - i), num_blocks=100 + i % 2)
                for i in range(num_workers)
            ),
        )
        if resting:
            placement.routes.failed(resting, 0.0, 0.0)
        worker = placement.workers["d1"]

        def change_and_choose(
            placement: Placement = placement, worker: WorkerView = worker
        ) -> None:
            placement.update(worker, worker.load)
            placement.find(need)

        num_calls.append(count_calls(change_and_choose))
    if resting and need.num_tokens == FITS_SOME:
        assert num_calls[1] < 8 * 1024
    else:
        assert num_calls[1] <= 1.2 * num_calls[0] + 10


def test_prefill_workers_without_room_are_passed_over_up_to_a_bound() -> None:
    busy = [
        make_worker(f"p{i}", Role.PREFILL, credit_blocks=1, num_pending_tokens=i)
        for i in range(500)
    ]
    free = [make_worker(f"q{i}", Role.PREFILL, num_pending_tokens=1000 + i) for i in range(500)]
    placement = make_placement(*busy, *free, make_worker("d0"))
    num_calls = count_calls(lambda: placement.find(Need(100, 1)))
    assert num_calls < 400
    found = ids(placement, Need(100, 1))
    assert found is not None
    assert found[0] is not None
    assert found[0].startswith("q")


@pytest.mark.parametrize("num_free", [0, 200])
def test_choice_has_a_bound_when_every_pair_of_many_rests(num_free: int) -> None:
    placement = make_placement(
        *(make_worker(f"p{i}", Role.PREFILL) for i in range(200)),
        *(make_worker(f"d{i}", credit_blocks=100 if i < num_free else 0) for i in range(200)),
    )
    for number in range(200 * 200):
        placement.routes.failed((f"p{number // 200}", f"d{number % 200}"), 0.0, 0.0)
    assert count_calls(lambda: placement.find(Need(100, 1))) < 40_000
    assert (placement.find(Need(100, 1)) is not None) == (num_free > 0)


@given(workers(Role.PREFILL), workers(Role.DECODE))
def test_longest_context_can_be_resumed_and_a_longer_one_cannot(
    prefillers: list[WorkerView], decoders: list[WorkerView]
) -> None:
    pools = make_placement(*prefillers, *decoders).pools
    longest = pools.max_context_tokens()
    assert longest is not None
    assert pools.why_too_large(Need(longest, 1)) is None
    assert pools.why_too_large(Need(longest + 1, 1)) is not None


def test_deployment_can_serve_only_when_prompts_can_be_computed_and_decoded() -> None:
    assert not make_placement(make_worker("d0")).can_serve
    assert not make_placement(make_worker("p0", Role.PREFILL)).can_serve
    assert make_placement(make_worker("d0", local_prefill_tokens=8)).can_serve
    assert make_placement(make_worker("d0"), make_worker("p0", Role.PREFILL)).can_serve
