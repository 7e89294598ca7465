"""What nobody could ever run is named with the numbers and the setting to change."""

from paceline.router.capacity import UNLIMITED_LOCAL_PREFILL, KnownPools, Need, WorkerPool


def make_pools(
    *,
    prefill: tuple[int, ...] = (),
    decode: tuple[int, ...] = (),
    prefill_seqs: int = 10,
    decode_seqs: int = 10,
    local_prefill_tokens: int = 0,
) -> KnownPools:
    """Make pools of these numbers of blocks."""
    pools = KnownPools()
    for blocks in prefill:
        pools.prefill.put(f"p{blocks}", WorkerPool(blocks, 16, prefill_seqs))
    for blocks in decode:
        pools.decode.put(f"d{blocks}", WorkerPool(blocks, 16, decode_seqs, local_prefill_tokens))
    return pools


def test_work_larger_than_every_decode_pool_is_named_with_the_numbers() -> None:
    pools = make_pools(decode=(10, 20))
    why = pools.why_too_large(Need(320, 1))
    assert why is not None
    assert "320 tokens in 1 choice(s) need 21 KV blocks of 16 tokens" in why
    assert "largest decode worker has 20" in why
    assert "decode.num_kv_blocks" in why
    assert pools.why_too_large(Need(304, 1)) is None


def test_work_that_ends_larger_than_every_decode_pool_is_named_with_the_numbers() -> None:
    pools = make_pools(decode=(10,))
    assert pools.why_too_large(Need(100, 1, 60)) is None
    why = pools.why_too_large(Need(100, 1, 61))
    assert why is not None
    assert "161 tokens in 1 choice(s) need 11 KV blocks" in why


def test_context_larger_than_every_prefill_pool_is_named_with_the_numbers() -> None:
    pools = make_pools(prefill=(3, 4), decode=(100,))
    assert pools.why_too_large(Need(64, 1)) is None
    why = pools.why_too_large(Need(65, 1))
    assert why is not None
    assert "need 5 KV blocks" in why
    assert "largest prefill worker has 4" in why
    assert "prefill.num_kv_blocks" in why


def test_context_larger_than_every_prefill_pool_is_left_to_decode_workers_that_may() -> None:
    small = make_pools(prefill=(4,), decode=(100,), local_prefill_tokens=80)
    assert small.why_too_large(Need(80, 1)) is None
    assert small.why_too_large(Need(81, 1)) is not None
    any_length = make_pools(
        prefill=(4,), decode=(100,), local_prefill_tokens=UNLIMITED_LOCAL_PREFILL
    )
    assert any_length.why_too_large(Need(1000, 1)) is None


def test_more_choices_than_any_worker_runs_sequences_are_named_with_the_setting() -> None:
    pools = make_pools(prefill=(100,), decode=(100,), prefill_seqs=8, decode_seqs=4)
    assert pools.why_too_large(Need(5, 4)) is None
    why = pools.why_too_large(Need(5, 5))
    assert why is not None
    assert "5 choices are as many sequences, and a decode worker runs at most 4" in why
    assert "decode.max_num_seqs" in why
    pools = make_pools(prefill=(100,), decode=(100,), prefill_seqs=4, decode_seqs=8)
    why = pools.why_too_large(Need(5, 5))
    assert why is not None
    assert "a prefill worker runs at most 4" in why
    assert "prefill.max_num_seqs" in why


def test_nothing_is_too_large_while_no_pool_is_known() -> None:
    assert make_pools().why_too_large(Need(10**6, 100)) is None
    assert make_pools().max_context_tokens() is None
    assert make_pools(prefill=(4,)).why_too_large(Need(10**6, 1)) is None
    assert make_pools(decode=(10**6,)).why_too_large(Need(10**6, 1)) is None
