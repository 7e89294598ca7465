from hypothesis import given
from hypothesis import strategies as st

from paceline.engine.removable_heap import RemovableHeap

changes = st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 5)), max_size=80)


@given(changes=changes)
def test_the_first_item_is_that_of_a_sorted_list(changes: list[tuple[int, int]]) -> None:
    heap: RemovableHeap[int] = RemovableHeap()
    expected: dict[int, tuple[int, int]] = {}
    for number, (item, key) in enumerate(changes):
        if key >= 0:
            heap.put(item, (key,))
            expected[item] = (key, number)
        elif item in expected:
            heap.remove(item)
            del expected[item]
        first = min(expected, key=lambda item: expected[item]) if expected else None
        assert heap.first() == first
        assert len(heap) == len(expected)
        assert set(heap) == set(expected)


def test_items_that_left_take_no_more_memory_than_those_that_stay() -> None:
    heap: RemovableHeap[int] = RemovableHeap()
    heap.put(0, (0,))
    for item in range(1, 10_000):
        heap.put(item, (item,))  # behind item 0, which stays first
        heap.remove(item)
        heap.put(0, (0,))
        assert len(heap._entries) <= 20
    assert heap.first() == 0
