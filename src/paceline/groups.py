"""Members by a name that several of them share: a request's attempts, a session's work."""

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

NameT = TypeVar("NameT", bound=Hashable)
MemberT = TypeVar("MemberT", bound=Hashable)


class Groups(Generic[NameT, MemberT]):
    """Adds and removes in O(1); a group that becomes empty is forgotten."""

    def __init__(self) -> None:
        self._groups: dict[NameT, dict[MemberT, None]] = {}
        self._num_members = 0

    def __len__(self) -> int:
        """Count the members of all groups."""
        return self._num_members

    def __iter__(self) -> Iterator[MemberT]:
        """Give the members, group by group."""
        for group in self._groups.values():
            yield from group

    def of(self, name: NameT) -> tuple[MemberT, ...]:
        """Give the members of one group, in the order in which they were added."""
        return tuple(self._groups.get(name, ()))

    def size_of(self, name: NameT) -> int:
        return len(self._groups.get(name, ()))

    def add(self, name: NameT, member: MemberT) -> None:
        """Add a member that is not in the group yet. Raises KeyError if it is."""
        group = self._groups.setdefault(name, {})
        if member in group:
            raise KeyError(f"{member!r} is in the group {name!r} already")
        group[member] = None
        self._num_members += 1

    def remove(self, name: NameT, member: MemberT) -> None:
        """Take a member out of its group. Raises KeyError if it is not there."""
        group = self._groups[name]
        del group[member]
        self._num_members -= 1
        if not group:
            del self._groups[name]
