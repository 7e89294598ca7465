import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.groups import Groups

changes = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), max_size=60)


@given(changes=changes)
def test_groups_are_those_of_a_plain_list(changes: list[tuple[str, int]]) -> None:
    groups: Groups[str, int] = Groups()
    expected: list[tuple[str, int]] = []
    for name, member in changes:
        if (name, member) in expected:
            groups.remove(name, member)
            expected.remove((name, member))
        else:
            groups.add(name, member)
            expected.append((name, member))
        for known in "abc":
            assert groups.of(known) == tuple(m for n, m in expected if n == known)
            assert groups.size_of(known) == len(groups.of(known))
        assert len(groups) == len(expected)
        assert sorted(groups) == sorted(m for _, m in expected)


def test_a_member_is_added_once_and_removed_once() -> None:
    groups: Groups[str, int] = Groups()
    groups.add("a", 1)
    with pytest.raises(KeyError, match="already"):
        groups.add("a", 1)
    groups.remove("a", 1)
    with pytest.raises(KeyError):
        groups.remove("a", 1)
    assert len(groups) == 0
