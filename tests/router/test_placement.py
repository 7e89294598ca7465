from paceline.router.placement import (
    UNLIMITED_LOCAL_PREFILL,
    Need,
    Placement,
    Role,
    WorkerLoad,
    WorkerMember,
    WorkerPool,
    WorkerView,
)


def make_worker(
    worker_id: str,
    role: Role = Role.DECODE,
    *,
    num_blocks: int = 100,
    credit_blocks: int | None = None,
    credit_requests: int = 10,
    local_prefill_tokens: int = 0,
    num_pending_tokens: int = 0,
    draining: bool = False,
) -> WorkerView:
    load = WorkerLoad(
        num_blocks if credit_blocks is None else credit_blocks,
        credit_requests,
        num_pending_tokens=num_pending_tokens,
        draining=draining,
    )
    pool = WorkerPool(num_blocks, 16, local_prefill_tokens)
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
    worker.update(WorkerLoad(credit_blocks=9, credit_requests=9, num_dispatches_seen=1))
    assert worker.credit_blocks == 9
    worker.update(WorkerLoad(credit_blocks=20, credit_requests=10, num_dispatches_seen=1))
    assert placement.find(need) is not None


def test_no_credit_for_requests_means_no_place() -> None:
    assert ids(make_placement(make_worker("d0", credit_requests=0)), Need(1, 1)) is None


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


def test_request_larger_than_every_pool_is_named_with_the_numbers() -> None:
    placement = make_placement(make_worker("d0", num_blocks=10), make_worker("d1", num_blocks=20))
    why = placement.why_too_large(320, 1, 1)
    assert why is not None
    assert "need 21 KV blocks" in why
    assert "largest decode worker has 20" in why
    assert "decode.num_kv_blocks" in why
    assert placement.why_too_large(150, 1, 100) is None


def test_prompt_larger_than_every_prefill_pool_is_named_with_the_numbers() -> None:
    placement = make_placement(
        make_worker("p0", Role.PREFILL, num_blocks=4), make_worker("d0", num_blocks=100)
    )
    why = placement.why_too_large(100, 1, 1)
    assert why is not None
    assert "largest prefill worker has 4" in why


def test_nothing_is_too_large_while_no_pool_is_known() -> None:
    assert make_placement().why_too_large(10**6, 1, 1) is None


def test_size_of_pools_is_remembered_when_a_worker_dies() -> None:
    placement = make_placement(make_worker("d0", num_blocks=100))
    placement.remove("d0")
    placement.add(make_worker("d1", num_blocks=10))
    assert placement.why_too_large(500, 1, 1) is None


def test_deployment_can_serve_only_when_prompts_can_be_computed_and_decoded() -> None:
    assert not make_placement(make_worker("d0")).can_serve
    assert not make_placement(make_worker("p0", Role.PREFILL)).can_serve
    assert make_placement(make_worker("d0", local_prefill_tokens=8)).can_serve
    assert make_placement(make_worker("d0"), make_worker("p0", Role.PREFILL)).can_serve
