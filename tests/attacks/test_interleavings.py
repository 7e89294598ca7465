"""No order of messages, and no fault in any order, gives a wrong token or leaves anything held."""

import pytest
from interleaved_world import run_world


@pytest.mark.parametrize("seed", range(3))
async def test_no_order_of_messages_gives_a_wrong_token_or_leaves_anything_behind(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run_world(seed, num_blocks=60, fault_share=0.0, num_steps=2400, monkeypatch=monkeypatch)


@pytest.mark.parametrize("seed", range(6))
async def test_no_fault_in_any_order_gives_a_wrong_token_or_leaves_anything_behind(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run_world(seed, num_blocks=40, fault_share=0.03, num_steps=3000, monkeypatch=monkeypatch)


@pytest.mark.parametrize("seed", range(5))
async def test_whoever_ends_a_request_tells_all_who_hold_something_for_it(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No lease expires here, so that what nobody gives back stays and is found."""
    await run_world(
        seed,
        num_blocks=40,
        fault_share=0.1,
        num_steps=1000,
        monkeypatch=monkeypatch,
        num_requests=25,
        max_tokens=1,
        lease_ttl_s=1e9,
        faults=("refuse", "cancel"),
    )


@pytest.mark.parametrize("seed", range(6))
async def test_faults_in_pools_that_are_too_small_cost_time_only(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are reused at once, and decode workers preempt and compute short contexts alone."""
    await run_world(
        seed,
        num_blocks=14,
        fault_share=0.04,
        num_steps=3000,
        monkeypatch=monkeypatch,
        num_requests=30,
        local_prefill_tokens=10 if seed % 2 else 0,
        max_tokens=28,
    )


@pytest.mark.parametrize("seed", range(2))
async def test_requests_of_a_frozen_worker_go_on_at_another(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run_world(
        seed,
        num_blocks=40,
        fault_share=0.01,
        num_steps=1000,
        monkeypatch=monkeypatch,
        faults=("freeze",),
    )
