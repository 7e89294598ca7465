from dataclasses import dataclass

import pytest
from counted_calls import count_calls
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import QueueFullError
from paceline.router.queue import WaitingQueue
from paceline.router.returned_work import ReturnedWork


def make_queue(max_new: int = 100) -> WaitingQueue[str]:
    return WaitingQueue(max_new)


def drain(queue: WaitingQueue[str], now: float = 0.0) -> list[str]:
    items = []
    while queue.head(now) is not None:
        items.append(queue.pop(now))
    return items


def test_new_work_leaves_in_order_of_arrival() -> None:
    queue = make_queue()
    for item in "abc":
        queue.push_new(item, "")
    assert drain(queue) == ["a", "b", "c"]


def test_tenants_take_turns() -> None:
    queue = make_queue()
    for item in ("a1", "a2", "a3"):
        queue.push_new(item, "a")
    queue.push_new("b1", "b")
    assert drain(queue) == ["a1", "b1", "a2", "a3"]


def test_resumed_work_goes_first_in_order_of_its_first_arrival() -> None:
    queue = make_queue()
    queue.push_new("new", "")
    queue.push_resumed("younger", arrived_s=2.0, not_before_s=0.0)
    queue.push_resumed("older", arrived_s=1.0, not_before_s=0.0)
    assert drain(queue) == ["older", "younger", "new"]


def test_work_in_backoff_lets_others_pass_and_comes_back() -> None:
    queue = make_queue()
    queue.push_resumed("backing off", arrived_s=1.0, not_before_s=10.0)
    queue.push_resumed("resumed", arrived_s=2.0, not_before_s=0.0)
    queue.push_new("new", "")
    assert queue.next_ready_s(0.0) == 10.0
    assert drain(queue, now=0.0) == ["resumed", "new"]
    assert len(queue) == 1
    assert drain(queue, now=10.0) == ["backing off"]
    assert queue.next_ready_s(10.0) is None


def test_full_queue_refuses_with_numbers_and_a_retry_delay() -> None:
    queue = make_queue(max_new=2)
    queue.push_new("a", "")
    queue.push_new("b", "")
    with pytest.raises(
        QueueFullError, match=r"2 requests wait and router\.max_queue_requests is 2"
    ):
        queue.push_new("c", "")
    queue.push_resumed("resumed", arrived_s=0.0, not_before_s=0.0)
    assert len(queue) == 3


def test_retry_delay_follows_the_pace_of_departures() -> None:
    queue = make_queue(max_new=1000)
    for number in range(200):
        queue.push_new(str(number), "")
    for number in range(100):
        queue.pop(now=number * 0.5)
    assert queue.retry_after_s() == pytest.approx(10 * 0.5)


@pytest.mark.parametrize("is_backing_off", [False, True])
def test_removed_work_does_not_pile_up(is_backing_off: bool) -> None:
    """Requests that end while they wait behind another one never come to the head."""
    returned: ReturnedWork[int] = ReturnedWork()
    returned.push(-1, arrived_s=0.0, not_before_s=0.0)
    for number in range(5000):
        returned.push(number, arrived_s=1.0, not_before_s=1e9 if is_backing_off else 0.0)
        assert returned.head(1.0) == -1
        assert returned.remove(number)
    assert len(returned) == 1
    assert len(returned._ready) + len(returned._backing_off) < 100


@dataclass(frozen=True)
class Item:
    """Compared by a function in Python, so that a search is seen in the calls."""

    number: int


@pytest.mark.parametrize("kind", ["new", "tenants", "resumed", "backing off"])
def test_every_step_of_a_long_queue_costs_what_it_costs_in_a_short_one(kind: str) -> None:
    num_calls = []
    for num_items in (100, 5000):
        queue: WaitingQueue[Item] = WaitingQueue(num_items)
        items = [Item(number) for number in range(num_items)]
        for item in items:
            if kind in ("new", "tenants"):
                queue.push_new(item, str(item.number) if kind == "tenants" else "")
            else:
                queue.push_resumed(item, item.number, 1e9 if kind == "backing off" else 0.0)
        queue.head(1.0)
        middle = items[num_items // 2]

        def one_of_each(queue: WaitingQueue[Item] = queue, middle: Item = middle) -> None:
            queue.remove(middle, str(middle.number) if kind == "tenants" else "")
            queue.next_ready_s(1.0)
            if queue.head(1.0) is not None:
                queue.pop(1.0)

        num_calls.append(count_calls(one_of_each))
    assert num_calls[1] <= num_calls[0] + 5


def test_pop_of_an_empty_queue_raises() -> None:
    with pytest.raises(IndexError):
        make_queue().pop(0.0)


@given(
    st.lists(
        st.tuples(st.sampled_from(["new", "resumed", "remove", "pop"]), st.integers(0, 5)),
        max_size=60,
    )
)
def test_nothing_is_lost_or_served_twice(operations: list[tuple[str, int]]) -> None:
    queue = make_queue()
    waiting: dict[str, str] = {}
    for number, (operation, pick) in enumerate(operations):
        now = float(number)
        tenant = f"t{pick % 2}"
        if operation == "new":
            queue.push_new(str(number), tenant)
            waiting[str(number)] = tenant
        elif operation == "resumed":
            queue.push_resumed(str(number), arrived_s=float(pick), not_before_s=now + pick)
            waiting[str(number)] = tenant
        elif operation == "remove" and waiting:
            item = sorted(waiting)[pick % len(waiting)]
            assert queue.remove(item, waiting.pop(item))
            assert not queue.remove(item, tenant)
        elif operation == "pop" and queue.head(now) is not None:
            item = queue.pop(now)
            del waiting[item]
        assert len(queue) == len(waiting)
        head = queue.head(now)
        assert head is None or head in waiting
    assert sorted(drain(queue, now=1e9)) == sorted(waiting)
