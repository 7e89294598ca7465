"""The table against plain lists, whatever is granted, renewed, decided and lost in what order."""

import itertools
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from paceline.engine.block_allocator import BlockAllocator
from paceline.kv_transfer.lease import FirstToken, Lease, LeaseState, LeaseTable, Progress
from paceline.request import AttemptKey

TTL_S = 5.0
READERS = ("decode-0.1", "decode-1.1", "decode-2.1")
COMPLETE = Progress(16, (FirstToken(0, 1),))

readers = st.sampled_from(READERS)
numbers = st.integers(0, 50)


@dataclass(eq=False)
class Expected:
    """What a lease should be."""

    lease: Lease
    reader: str
    renewed_s: float
    state: LeaseState = LeaseState.ALIVE
    is_settled: bool = False


class LeaseMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        ids = itertools.count(1)
        self.allocator = BlockAllocator(4)
        self.block_ids = self.allocator.allocate(4)
        self.table = LeaseTable(self.allocator, TTL_S, new_id=lambda: next(ids))
        self.leases: list[Expected] = []
        self.now = 0.0
        self.last_renewal_s = 0.0

    def alive(self) -> list[Expected]:
        return [expected for expected in self.leases if expected.state is LeaseState.ALIVE]

    def clock(self, lag_s: float) -> float:
        """The two threads' clocks differ; renewals keep their order all the same."""
        self.last_renewal_s = max(self.last_renewal_s, self.now - lag_s)
        return self.now - lag_s

    @rule(reader=readers, lag_s=st.sampled_from([0.0, 0.5]), choice=st.integers(0, 3))
    def grant(self, reader: str, lag_s: float, choice: int) -> None:
        now = self.clock(lag_s)
        key = AttemptKey("shared", len(self.leases) + 1)
        lease = self.table.grant(key, reader, now, (choice,))
        for expected in self.alive():
            if expected.lease.choices == frozenset({choice}):
                expected.state, expected.is_settled = LeaseState.REVOKED, True
        self.table.extend(lease, self.block_ids)
        self.table.publish(lease, COMPLETE)
        self.leases.append(Expected(lease, reader, self.last_renewal_s))

    @rule(reader=readers, named=st.sets(numbers, max_size=4), lag_s=st.sampled_from([0.0, 0.5]))
    def renew(self, reader: str, named: set[int], lag_s: float) -> None:
        wanted = [self.leases[number] for number in named if number < len(self.leases)]
        mine = [e for e in wanted if e.reader == reader and e.state is LeaseState.ALIVE]
        now = self.clock(lag_s) if mine else self.now - lag_s
        for expected in mine:
            expected.renewed_s = self.last_renewal_s
        self.table.renew(reader, now, [expected.lease.lease_id for expected in wanted])

    @precondition(lambda self: self.leases)
    @rule(number=numbers)
    def confirm(self, number: int) -> None:
        expected = self.leases[number % len(self.leases)]
        held = self.table.confirm(expected.lease.lease_id, expected.reader, self.now)
        if expected.state is LeaseState.ALIVE:
            expected.state = LeaseState.HELD
        assert held == (expected.state is LeaseState.HELD)

    @precondition(lambda self: self.leases)
    @rule(number=numbers)
    def revoke(self, number: int) -> None:
        expected = self.leases[number % len(self.leases)]
        self.table.revoke(expected.lease, "test", self.now)
        if expected.state is LeaseState.ALIVE:
            expected.state, expected.is_settled = LeaseState.REVOKED, True

    @rule()
    def settle(self) -> None:
        self.table.settle()
        for expected in self.leases:
            expected.is_settled |= expected.state is LeaseState.HELD

    @rule(reader=readers)
    def lose_reader(self, reader: str) -> None:
        mine = [expected for expected in self.alive() if expected.reader == reader]
        lost = self.table.revoke_reader(reader, "gone", self.now)
        assert lost == [expected.lease for expected in mine]
        for expected in mine:
            expected.state, expected.is_settled = LeaseState.REVOKED, True

    @rule(seconds=st.sampled_from([0.0, 1.0, 4.0, 6.0]))
    def expire(self, seconds: float) -> None:
        self.now += seconds
        due = [expected for expected in self.alive() if expected.renewed_s + TTL_S <= self.now]
        expired = self.table.expire(self.now)
        assert set(expired) == {expected.lease for expected in due}
        for expected in due:
            expected.state, expected.is_settled = LeaseState.REVOKED, True

    @invariant()
    def everything_adds_up(self) -> None:
        self.table.check_integrity(self.allocator.num_pins)
        assert self.table.num_undecided == sum(not expected.is_settled for expected in self.leases)
        for expected in self.leases:
            assert expected.lease.state is expected.state


TestLeases = LeaseMachine.TestCase
TestLeases.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
