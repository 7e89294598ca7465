"""One decision for each lease, made once, and pins that outlive it by no more than a step."""

import itertools
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import pytest
from opcodes import num_opcodes

from paceline.errors import IntegrityError
from paceline.groups import Groups
from paceline.kv_transfer.lease import (
    LEASE_TRANSITIONS,
    FirstToken,
    Lease,
    LeaseState,
    LeaseTable,
    LeaseUpdate,
    Progress,
)
from paceline.request import AttemptKey

READER = "decode-0.7"
KEY = AttemptKey("r1", 1)
COMPLETE = Progress(8, (FirstToken(0, 42),))


class CountedPins:
    """Pins without blocks."""

    def __init__(self) -> None:
        self.pins: Counter[int] = Counter()

    def pin(self, block_ids: Sequence[int], /) -> None:
        self.pins.update(block_ids)

    def unpin(self, block_ids: Sequence[int], /) -> None:
        self.pins.subtract(block_ids)
        assert min(self.pins.values(), default=0) >= 0

    @property
    def total(self) -> int:
        return self.pins.total()


class Owner:
    """A table with its pins, and builders of leases."""

    def __init__(self, ttl_s: float = 5.0, new_id: Callable[[], int] | None = None) -> None:
        self.pins = CountedPins()
        ids = itertools.count(1000)
        self.table = LeaseTable(self.pins, ttl_s, new_id=new_id or (lambda: next(ids)))

    def alive(
        self, key: AttemptKey = KEY, reader: str = READER, now: float = 0.0, complete: bool = True
    ) -> Lease:
        lease = self.table.grant(key, reader, now)
        self.table.extend(lease, [10, 11])
        if complete:
            self.table.publish(lease, COMPLETE)
        return lease

    def check(self) -> None:
        self.table.check_integrity(self.pins.pins.__getitem__)


def test_confirmed_lease_is_held_and_keeps_its_pins_until_settled() -> None:
    owner = Owner()
    lease = owner.alive()
    assert owner.table.confirm(lease.lease_id, READER, 1.0)
    assert lease.state is LeaseState.HELD
    assert owner.pins.total == 2
    owner.check()
    assert owner.table.settle() == [lease]
    assert owner.pins.total == 0
    assert owner.table.settle() == []
    owner.check()


def test_revoked_lease_is_lost_and_has_no_pins() -> None:
    owner = Owner()
    lease = owner.alive()
    assert owner.table.revoke(lease, "cancelled", 1.0)
    assert (lease.state, lease.reason, owner.pins.total) == (LeaseState.REVOKED, "cancelled", 0)
    assert not owner.table.confirm(lease.lease_id, READER, 1.0)
    owner.check()


def test_state_has_changed_before_pins_are_dropped() -> None:
    owner = Owner()
    states = []
    for decide in ("revoke", "confirm"):
        lease = owner.alive(AttemptKey(decide, 1))

        def unpin(block_ids: Sequence[int], lease: Lease = lease) -> None:
            states.append(lease.state)

        owner.pins.unpin = unpin  # type: ignore[method-assign]
        if decide == "revoke":
            owner.table.revoke(lease, "test", 0.0)
        else:
            owner.table.confirm(lease.lease_id, READER, 0.0)
            owner.table.settle()
    assert states == [LeaseState.REVOKED, LeaseState.HELD]


@pytest.mark.parametrize("source", LeaseState)
@pytest.mark.parametrize("target", LeaseState)
def test_state_moves_only_along_the_table(source: LeaseState, target: LeaseState) -> None:
    owner = Owner()
    lease = owner.alive()
    if source is not LeaseState.ALIVE:
        owner.table._decide(lease, source, 0.0)
    allowed = source is LeaseState.ALIVE and target is not LeaseState.ALIVE
    assert (target in LEASE_TRANSITIONS[source]) == allowed
    if allowed:
        owner.table._decide(lease, target, 0.0)
        assert lease.state is target
    else:
        with pytest.raises(IntegrityError, match=f"{source.name}.* cannot become {target.name}"):
            owner.table._decide(lease, target, 0.0)
        assert lease.state is source


def test_every_answer_after_the_first_is_the_same() -> None:
    owner = Owner()
    held, revoked = owner.alive(), owner.alive(AttemptKey("r2", 1))
    owner.table.revoke(revoked, "test", 0.0)
    for _ in range(3):
        assert owner.table.confirm(held.lease_id, READER, 1.0)
        assert not owner.table.confirm(revoked.lease_id, READER, 1.0)
        owner.table.settle()
    assert not owner.table.revoke(held, "too late", 2.0)
    assert owner.table.revoke(revoked, "again", 2.0)
    assert revoked.reason == "test"
    owner.check()


def test_outcome_is_forgotten_after_its_time_and_then_lost() -> None:
    owner = Owner()
    lease = owner.alive()
    owner.table.confirm(lease.lease_id, READER, 1.0)
    owner.table.settle()
    owner.table.expire(60.9)
    assert owner.table.confirm(lease.lease_id, READER, 60.9)
    owner.table.expire(61.0)
    assert not owner.table.confirm(lease.lease_id, READER, 61.0)
    assert owner.table.find(KEY) is None
    owner.check()


def test_held_lease_is_not_forgotten_before_it_is_settled() -> None:
    owner = Owner()
    lease = owner.alive()
    owner.table.confirm(lease.lease_id, READER, 1.0)
    assert owner.table.expire(100.0) == []
    assert owner.table.confirm(lease.lease_id, READER, 100.0)
    assert owner.table.settle() == [lease]
    assert owner.pins.total == 0


def test_unknown_id_is_lost() -> None:
    owner = Owner()
    owner.alive()
    assert not owner.table.confirm(1, READER, 0.0)


def test_another_reader_gets_lost_and_changes_nothing() -> None:
    owner = Owner()
    lease = owner.alive()
    assert not owner.table.confirm(lease.lease_id, "decode-0.8", 0.0)
    assert lease.state is LeaseState.ALIVE
    assert owner.table.confirm(lease.lease_id, READER, 0.0)
    assert not owner.table.confirm(lease.lease_id, "decode-0.8", 0.0)


def test_incomplete_lease_is_lost_and_changes_nothing() -> None:
    owner = Owner()
    lease = owner.alive(complete=False)
    owner.table.publish(lease, Progress(8))
    assert not owner.table.confirm(lease.lease_id, READER, 0.0)
    assert lease.state is LeaseState.ALIVE
    owner.table.publish(lease, COMPLETE)
    assert owner.table.confirm(lease.lease_id, READER, 0.0)


def test_unrenewed_lease_expires_after_its_time() -> None:
    owner = Owner(ttl_s=5.0)
    first, second = owner.alive(now=0.0), owner.alive(AttemptKey("r2", 1), now=2.0)
    assert owner.table.expire(4.9) == []
    assert owner.table.expire(5.0) == [first]
    assert "5.0 s" in first.reason
    assert owner.table.expire(6.9) == []
    assert owner.table.expire(7.0) == [second]
    assert owner.pins.total == 0
    owner.check()


def test_renewal_keeps_the_leases_that_it_names_and_no_other() -> None:
    owner = Owner(ttl_s=5.0)
    named = [owner.alive(AttemptKey(f"r{number}", 1)) for number in range(3)]
    forgotten = owner.alive(AttemptKey("r8", 1))
    of_another = owner.alive(AttemptKey("r9", 1), reader="decode-1.3")
    wanted = [lease.lease_id for lease in (*named, of_another)]
    owner.table.renew(READER, 4.0, [*wanted, 12345])
    assert owner.table.expire(8.9) == [forgotten, of_another]
    owner.table.renew(READER, 3.0, wanted)  # a renewal that comes late shortens nothing
    assert owner.table.expire(8.95) == []
    assert owner.table.expire(9.0) == named


def test_renewal_after_the_decision_changes_nothing() -> None:
    owner = Owner(ttl_s=5.0)
    lease = owner.alive()
    assert owner.table.expire(5.0) == [lease]
    owner.table.renew(READER, 5.0, [lease.lease_id])
    assert lease.state is LeaseState.REVOKED
    assert not owner.table.confirm(lease.lease_id, READER, 5.0)
    owner.check()


def test_clock_never_decides_that_a_read_was_invalid() -> None:
    owner = Owner(ttl_s=5.0)
    lease = owner.alive()
    assert owner.table.confirm(lease.lease_id, READER, 1000.0)
    assert owner.table.expire(1000.0) == []


def test_newer_attempt_revokes_the_older_ones_lease() -> None:
    owner = Owner()
    old = owner.alive(AttemptKey("r1", 1))
    new = owner.alive(AttemptKey("r1", 2))
    assert (old.state, new.state) == (LeaseState.REVOKED, LeaseState.ALIVE)
    assert owner.table.find(AttemptKey("r1", 1)) is old
    assert owner.table.find(AttemptKey("r1", 2)) is new
    owner.check()


def test_newer_attempt_leaves_a_held_lease_to_settle() -> None:
    owner = Owner()
    old = owner.alive(AttemptKey("r1", 1))
    owner.table.confirm(old.lease_id, READER, 0.0)
    owner.alive(AttemptKey("r1", 2))
    assert old.state is LeaseState.HELD
    assert owner.table.settle() == [old]
    assert owner.pins.total == 2


def test_choices_that_resume_alone_do_not_revoke_each_other() -> None:
    owner = Owner()
    both = owner.table.grant(AttemptKey("r1", 1), READER, 0.0, choices=(0, 1))
    first = owner.table.grant(AttemptKey("r1", 2), READER, 0.0, choices=(0,))
    second = owner.table.grant(AttemptKey("r1", 3), READER, 0.0, choices=(1,))
    assert [lease.state for lease in (both, first, second)] == [
        LeaseState.REVOKED,
        LeaseState.ALIVE,
        LeaseState.ALIVE,
    ]
    whole = owner.table.grant(AttemptKey("r1", 4), READER, 0.0)
    assert {first.state, second.state} == {LeaseState.REVOKED}
    assert whole.state is LeaseState.ALIVE


@pytest.mark.parametrize("attempt", [1, 2])
def test_attempt_that_is_not_newer_gets_no_lease(attempt: int) -> None:
    owner = Owner()
    lease = owner.alive(AttemptKey("r1", 2))
    with pytest.raises(IntegrityError, match=f"attempt {attempt} of request r1"):
        owner.table.grant(AttemptKey("r1", attempt), READER, 0.0)
    assert lease.state is LeaseState.ALIVE
    owner.check()


def test_attempt_takes_a_new_lease_after_its_old_one_was_revoked() -> None:
    owner = Owner()
    old = owner.alive()
    owner.table.revoke(old, "chunk computed again", 0.0)
    new = owner.alive()
    assert new.lease_id != old.lease_id
    assert owner.table.find(KEY) is new
    owner.table.expire(60.0)
    assert owner.table.find(KEY) is new  # forgetting the old outcome leaves the new lease known


def test_lost_reader_loses_what_it_had_not_confirmed() -> None:
    owner = Owner()
    held = owner.alive(AttemptKey("r1", 1))
    lost = owner.alive(AttemptKey("r2", 1))
    other = owner.alive(AttemptKey("r3", 1), reader="decode-1.3")
    owner.table.confirm(held.lease_id, READER, 0.0)
    assert owner.table.revoke_reader(READER, "session ended", 1.0) == [lost]
    assert (held.state, other.state) == (LeaseState.HELD, LeaseState.ALIVE)
    assert owner.table.revoke(other, "stopping", 1.0)
    owner.table.settle()
    assert (owner.pins.total, owner.table.num_undecided) == (0, 0)
    owner.check()


def test_lease_is_readable_for_its_own_blocks_while_alive() -> None:
    owner = Owner()
    lease = owner.alive(complete=False)
    assert owner.table.is_readable(lease.lease_id, [11])
    assert owner.table.is_readable(lease.lease_id, [10, 11])
    assert not owner.table.is_readable(lease.lease_id, [10, 12])
    assert not owner.table.is_readable(1, [10])
    owner.table.extend(lease, [12])
    assert owner.table.is_readable(lease.lease_id, [10, 12])
    owner.table.publish(lease, COMPLETE)
    owner.table.confirm(lease.lease_id, READER, 0.0)
    assert not owner.table.is_readable(lease.lease_id, [10])


def test_reader_is_told_what_was_added_since() -> None:
    owner = Owner()
    lease = owner.alive(complete=False)
    owner.table.publish(lease, Progress(3))
    assert lease.update_since(0) == ((10, 11), Progress(3))
    owner.table.extend(lease, [5])
    owner.table.publish(lease, COMPLETE)
    assert lease.update_since(2) == ((5,), COMPLETE)
    assert lease.update_since(3) == ((), COMPLETE)
    assert lease.block_ids == (10, 11, 5)


def test_progress_only_grows() -> None:
    owner = Owner()
    lease = owner.alive(complete=False)
    owner.table.publish(lease, Progress(5))
    owner.table.publish(lease, Progress(5))
    with pytest.raises(IntegrityError, match="published 5 tokens and cannot go back to 4"):
        owner.table.publish(lease, Progress(4))
    assert lease.progress == Progress(5)


@pytest.mark.parametrize("end", ["complete", "revoked", "held"])
def test_ended_or_complete_lease_does_not_grow(end: str) -> None:
    owner = Owner()
    lease = owner.alive(complete=end != "revoked")
    if end == "revoked":
        owner.table.revoke(lease, "test", 0.0)
    elif end == "held":
        owner.table.confirm(lease.lease_id, READER, 0.0)
    num_pins = owner.pins.total
    with pytest.raises(IntegrityError, match="cannot be extended"):
        owner.table.extend(lease, [12])
    with pytest.raises(IntegrityError, match="cannot be published"):
        owner.table.publish(lease, COMPLETE)
    assert owner.pins.total == num_pins


@pytest.mark.parametrize("blocks", [[10], [12, 12]])
def test_block_has_one_place_in_a_lease(blocks: list[int]) -> None:
    owner = Owner()
    lease = owner.alive(complete=False)
    with pytest.raises(IntegrityError, match="one place"):
        owner.table.extend(lease, blocks)
    assert owner.pins.total == 2


def test_ids_are_drawn_again_when_in_use() -> None:
    ids = iter([5, 5, 5, 6])
    owner = Owner(new_id=lambda: next(ids))
    first = owner.alive(AttemptKey("r1", 1))
    owner.table.revoke(first, "test", 0.0)
    assert owner.alive(AttemptKey("r2", 1)).lease_id == 6


def test_ids_of_two_incarnations_differ() -> None:
    tables = [LeaseTable(CountedPins(), 1.0) for _ in range(2)]
    ids = {
        table.grant(AttemptKey(str(n), 1), READER, 0.0).lease_id
        for table in tables
        for n in range(99)
    }
    assert len(ids) == 2 * 99
    assert max(ids) < 2**64


def test_integrity_check_finds_a_published_slot_that_was_written() -> None:
    owner = Owner()
    memory = {10: b"abcd", 11: b"ef??"}

    def digest(block_ids: Sequence[int], num_tokens: int) -> bytes:
        return b"".join(memory[block] for block in block_ids)[:num_tokens]

    lease = owner.alive(complete=False)
    owner.table.publish(lease, Progress(6))
    owner.table.check_integrity(checksum=digest)
    memory[11] = b"efgh"  # appended above what is published
    owner.table.check_integrity(checksum=digest)
    owner.table.publish(lease, COMPLETE)
    owner.table.check_integrity(checksum=digest)
    memory[11] = b"efg!"
    with pytest.raises(IntegrityError, match="published 8 tokens, and their KV was written again"):
        owner.table.check_integrity(checksum=digest)


def test_integrity_check_finds_a_missing_pin() -> None:
    owner = Owner()
    owner.alive()
    owner.pins.unpin([11])
    with pytest.raises(IntegrityError, match="block 11 has 0 pins, but 1 leases"):
        owner.check()


@pytest.mark.parametrize(("ttl_s", "retention_s"), [(0, 60), (5, 0), (-1, 60)])
def test_impossible_times_are_refused(ttl_s: float, retention_s: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        LeaseTable(CountedPins(), ttl_s, retention_s)


def test_confirmation_and_revocation_at_the_same_moment_have_one_winner() -> None:
    """Real threads: HELD is answered exactly where the engine did not revoke."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        deadline = time.monotonic() + 30
        winners: set[bool] = set()
        while len(winners) < 2 and time.monotonic() < deadline:
            winners |= contest(num_leases=2000)
    finally:
        sys.setswitchinterval(interval)
    assert winners == {True, False}


def contest(num_leases: int) -> set[bool]:
    """Let three io threads confirm what the engine revokes from the other end; say who won."""
    owner = Owner()
    leases = [owner.alive(AttemptKey(f"r{number}", 1)) for number in range(num_leases)]
    start = threading.Barrier(4, timeout=30)
    answers: list[list[bool]] = [[], [], []]

    def confirm(own: list[bool]) -> None:
        start.wait()
        own.extend(owner.table.confirm(lease.lease_id, READER, 1.0) for lease in leases)

    threads = [threading.Thread(target=confirm, args=(own,)) for own in answers]
    for thread in threads:
        thread.start()
    start.wait()
    settled: list[Lease] = []
    held = []
    for lease in reversed(leases):
        held.append(not owner.table.revoke(lease, "test", 1.0))
        settled += owner.table.settle()
    for thread in threads:
        thread.join(timeout=30)
    settled += owner.table.settle()
    held.reverse()
    assert answers == [held] * 3
    assert len(settled) == held.count(True)
    assert owner.pins.total == 0
    owner.check()
    return set(held)


def test_a_decided_lease_keeps_its_outcome_and_nothing_that_grows_with_its_context() -> None:
    owner = Owner()
    held, revoked = owner.alive(), owner.alive(AttemptKey("r2", 1))
    owner.table.confirm(held.lease_id, READER, 0.0)
    assert held.update_since(0) == ((10, 11), COMPLETE)
    owner.table.settle()
    owner.table.revoke(revoked, "test", 0.0)
    for lease in (held, revoked):
        assert lease.update_since(0) is None
        assert lease.block_ids == ()
        assert lease.progress.first_tokens is None
    assert owner.table.confirm(held.lease_id, READER, 1.0)
    owner.check()


def test_memory_of_decided_leases_does_not_depend_on_their_contexts() -> None:
    kept_bytes = []
    for num_blocks in (1, 4000):
        owner, block_ids = Owner(), list(range(num_blocks))
        tracemalloc.start()
        for number in range(20):
            lease = owner.table.grant(AttemptKey(f"r{number}", 1), READER, 0.0)
            owner.table.extend(lease, block_ids)
            owner.table.publish(lease, COMPLETE)
            owner.table.confirm(lease.lease_id, READER, 0.0)
            owner.table.settle()
        owner.pins.pins.clear()
        kept_bytes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    assert kept_bytes[1] < kept_bytes[0] + 20 * 1000


@pytest.mark.parametrize("end", ["held", "revoked"])
def test_an_update_is_whole_or_none_while_the_engine_drops_the_lease(end: str) -> None:
    """The io thread reads the lease at every line of the engine thread's `_drop_pins`."""
    owner = Owner()
    lease = owner.alive()
    seen: list[LeaseUpdate | None] = []

    def read(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_name == "update_since":
            return None
        seen.append(lease.update_since(0))
        return read

    if end == "held":
        owner.table.confirm(lease.lease_id, READER, 0.0)
    sys.settrace(read)
    try:
        if end == "held":
            owner.table.settle()
        else:
            owner.table.revoke(lease, "test", 0.0)
    finally:
        sys.settrace(None)
    assert seen[0] == ((10, 11), COMPLETE)
    assert seen[-1] is None
    assert all(update in (None, ((10, 11), COMPLETE)) for update in seen)


def test_no_call_costs_more_beside_many_other_leases() -> None:
    assert costs(num_others=300) == costs(num_others=3)


def costs(num_others: int) -> dict[str, int]:
    """Count what each call executes in a table with other leases, some of the same reader."""
    owner = Owner()
    table = owner.table
    # They were renewed once: their first time to expire has passed.
    others = [owner.alive(AttemptKey(f"other-{n}", 1), f"other.{n % 3}") for n in range(num_others)]
    for lease in others:
        table.renew(lease.reader, 4.0, [lease.lease_id])
    lost, held, late = (owner.alive(AttemptKey(f"r{n}", 1), f"decode-{n}.1") for n in range(3))
    counts = {
        "grant": num_opcodes(lambda: table.grant(AttemptKey("new", 1), READER, 4.5)),
        "renew": num_opcodes(lambda: table.renew(late.reader, 4.5, [late.lease_id])),
        "expire nothing": num_opcodes(lambda: table.expire(5.5)),
        "lose a reader": num_opcodes(lambda: table.revoke_reader(lost.reader, "gone", 5.5)),
        "confirm": num_opcodes(lambda: table.confirm(held.lease_id, held.reader, 5.5)),
        "settle": num_opcodes(table.settle),
        "count": num_opcodes(lambda: table.num_undecided),
    }
    for lease in others:
        table.renew(lease.reader, 9.0, [lease.lease_id])
    return counts | {"expire two": num_opcodes(lambda: table.expire(9.5))}


def forget_renewals(table: LeaseTable) -> None:
    table._renewals.clear()


def forget_readers(table: LeaseTable) -> None:
    table._of_reader = Groups()


def mix_up_renewals(table: LeaseTable) -> None:
    table._renewals.move_to_end(next(iter(table._renewals)))


def keep_blocks_of_an_outcome(table: LeaseTable) -> None:
    table._outcomes[0]._block_ids = [10]


@pytest.mark.parametrize(
    "mistake",
    [forget_renewals, forget_readers, mix_up_renewals, keep_blocks_of_an_outcome],
)
def test_a_wrong_count_or_index_is_found(mistake: Callable[[LeaseTable], None]) -> None:
    owner = Owner()
    owner.table.revoke(owner.alive(), "test", 0.0)
    for number in range(2):
        owner.alive(AttemptKey(f"other-{number}", 1), now=float(number))
    owner.check()
    mistake(owner.table)
    with pytest.raises(IntegrityError):
        owner.check()
