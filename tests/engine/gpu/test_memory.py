"""The pool gets what is left; what does not fit is refused with the largest value that works."""

import re
from typing import Any

import pytest

from paceline.engine.gpu.memory import OVERHEAD_BYTES, TRANSFER_BYTES, MemoryPlan
from paceline.errors import CapacityError
from paceline.kv_layout import attention_layout

GIB = 1 << 30
LAYOUT = attention_layout(
    num_layers=32, num_kv_heads=8, head_dim=128, block_tokens=16, dtype="bfloat16"
)


def make_plan(**changes: int) -> MemoryPlan:
    sizes = {
        "total": 140 * GIB,
        "free": 123 * GIB,
        "weights": 15 * GIB,
        "state": GIB // 2,
        "activations": 2 * GIB,
        "graphs": GIB,
    }
    return MemoryPlan(**(sizes | changes))


def blocks(plan: MemoryPlan, **changes: Any) -> int:
    given = {"num_kv_blocks": None, "kv_cache_bytes": None, "gpu_memory_utilization": 0.9}
    return plan.pool_blocks(LAYOUT, **(given | changes))


def test_a_pool_takes_what_utilization_leaves() -> None:
    plan = make_plan()
    assert plan.own == 15 * GIB + GIB // 2 + 2 * GIB + GIB + OVERHEAD_BYTES + TRANSFER_BYTES
    assert blocks(plan) == (int(0.9 * plan.total) - plan.own) // LAYOUT.block_bytes


@pytest.mark.parametrize(
    "asked",
    [
        {"num_kv_blocks": 1 << 20},
        {"kv_cache_bytes": 139 * GIB},
        {"gpu_memory_utilization": 0.99},
    ],
)
def test_the_value_that_a_refusal_names_works_and_a_little_more_does_not(
    asked: dict[str, float],
) -> None:
    plan = make_plan(free=60 * GIB)
    with pytest.raises(CapacityError, match=r"Lower [a-z_]+ to at most") as refusal:
        blocks(plan, **asked)
    (name,) = asked
    best = re.search(r"at most ([\d.]+[\d])\.", str(refusal.value))
    assert best is not None
    kind = type(asked[name])
    assert blocks(plan, **{name: kind(best[1])}) > 2
    step = {"num_kv_blocks": 1, "kv_cache_bytes": LAYOUT.block_bytes}.get(name, 0.011)
    with pytest.raises(CapacityError):
        blocks(plan, **{name: kind(best[1]) + step})


def test_a_share_too_small_for_the_weights_says_how_far_it_may_be_raised() -> None:
    with pytest.raises(CapacityError, match=r"is 0\.1, which leaves 0 blocks .* at most 0\.99"):
        blocks(make_plan(), gpu_memory_utilization=0.1)


def test_a_full_gpu_is_refused_whatever_is_asked() -> None:
    for asked in ({"num_kv_blocks": 2}, {"gpu_memory_utilization": 0.9}):
        with pytest.raises(CapacityError, match="No KV pool fits"):
            blocks(make_plan(free=GIB), **asked)
