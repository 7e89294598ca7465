from hypothesis import given
from hypothesis import strategies as st

from paceline.router.capacity import UNLIMITED_LOCAL_PREFILL, Need, WorkerPool
from paceline.router.placement import Placement, Role, WorkerLoad, WorkerMember, WorkerView


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
    worker.update(WorkerLoad(credit_blocks=9, credit_sequences=9, num_dispatches_seen=1))
    assert worker.credit_blocks == 9
    worker.update(WorkerLoad(credit_blocks=20, credit_sequences=10, num_dispatches_seen=1))
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
    decode.update(WorkerLoad(credit_blocks=90, credit_sequences=6, num_dispatches_seen=1))
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
