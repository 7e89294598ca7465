"""Allocator, prefix cache and leases together, in every order that hypothesis can think of.

The model is an owner with a pool whose "KV" is one number a slot: a digest of weights, tenant and
all tokens up to the slot. Sequences compute it in chunks, grow, fork and end; readers copy leased
blocks half a block at a time, at any moment, even long after the lease has ended; confirmations
arrive late, also in the middle of what the engine does; readers and the owner crash. After every
step:

- each sequence finds in its blocks what it wrote, so no block has two owners that write;
- references and pins are those of the sequences and leases, and every count adds up;
- nothing that is cached or published has been written again.

And whenever a confirmation is answered HELD, the reader has the right bytes. At the end nothing is
left.

The second half runs the same machine on code with seeded bugs, and demands that it fails.
"""

import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.prefix_cache import ChainPosition, PrefixCache
from paceline.errors import IntegrityError, OutOfBlocksError
from paceline.kv_transfer.lease import (
    FirstToken,
    Lease,
    LeaseState,
    LeaseTable,
    LeaseUpdate,
    Progress,
)
from paceline.kv_transfer.read_plan import BlockRead, ReadPlan
from paceline.request import AttemptKey, num_blocks_for

NUM_BLOCKS = 9
BLOCK_TOKENS = 4
TTL_S = 5.0
RETENTION_S = 60.0
TEXTS = ("0000000000000", "0000111100001", "1111000011110")
"""Contexts are prefixes of these, so that many begin alike."""
FIRST_TOKENS = (FirstToken(0, 1),)

Slots = npt.NDArray[np.uint64]


@cache
def kv(weights: int, tenant: str, tokens: tuple[int, ...]) -> int:
    """The KV of the last of these tokens."""
    text = f"{weights}|{tenant}|{tokens}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(eq=False)
class Context:
    """A sequence of the owner."""

    weights: int
    tenant: str
    tokens: list[int]
    blocks: list[int]
    chain: ChainPosition
    num_computed: int
    num_inserted: int
    """Blocks that were matched in the cache or inserted."""
    lease: Lease | None = None
    num_leased_tokens: int = 0

    def expected(self, num_tokens: int) -> list[int]:
        tokens = tuple(self.tokens)
        return [kv(self.weights, self.tenant, tokens[: n + 1]) for n in range(num_tokens)]


@dataclass(eq=False)
class Import:
    """One attempt at a reader."""

    reader: str
    lease: Lease
    incarnation: int
    expected: list[int]
    plan: ReadPlan
    memory: Slots
    sent: LeaseUpdate = field(default_factory=lambda: LeaseUpdate((), Progress(0)))
    """All that the owner has told so far; it may still be on its way when the lease has ended."""
    num_blocks_told: int = 0
    told: Progress | None = None
    running: list[list[BlockRead]] = field(default_factory=list)
    num_halves_copied: int = 0
    """Of the first running read."""
    verdict: bool | None = None
    verdict_s: float = 0.0
    is_wanted: bool = True
    """Whether its reader's heartbeats name it."""
    named_s: float = 0.0
    """When it was granted, or named last."""


def is_behind(attempt: Import) -> bool:
    """Whether an update can arrive."""
    return attempt.told != attempt.sent.progress


def is_exporting(context: Context) -> bool:
    lease = context.lease
    return lease is not None and lease.state is LeaseState.ALIVE and not lease.progress.is_complete


class WatchedPins:
    """The owner's pins; lets the io thread run just before they are dropped."""

    def __init__(self, allocator: BlockAllocator, run_io: Callable[[], None]) -> None:
        self._allocator = allocator
        self._run_io = run_io

    def pin(self, block_ids: Sequence[int], /) -> None:
        self._allocator.pin(block_ids)

    def unpin(self, block_ids: Sequence[int], /) -> None:
        self._run_io()
        self._allocator.unpin(block_ids)


class BlocksAndLeases(RuleBasedStateMachine):
    """See the module."""

    allocator_type: ClassVar[type[BlockAllocator]] = BlockAllocator
    cache_type: ClassVar[type[PrefixCache]] = PrefixCache
    table_type: ClassVar[type[LeaseTable]] = LeaseTable
    plan_type: ClassVar[type[ReadPlan]] = ReadPlan
    copies_on_write: ClassVar[bool] = True
    ids_start_anew: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.weights = 0
        self.incarnation = 0
        self.reader_incarnations = [0, 0]
        self.num_requests = 0
        self.attempts: Counter[str] = Counter()
        self.memory: Slots = np.zeros((NUM_BLOCKS, BLOCK_TOKENS), dtype=np.uint64)
        self.imports: list[Import] = []
        self.confirms: deque[Import] = deque()
        self.runs_io_inside = False
        self.new_ids = itertools.count(1)
        self.start_owner()

    def start_owner(self) -> None:
        self.contexts: list[Context] = []
        self.allocator = self.allocator_type(NUM_BLOCKS)
        self.cache = self.cache_type(self.allocator, BLOCK_TOKENS, bytes(32), protected_share=0.5)
        if self.ids_start_anew:
            self.new_ids = itertools.count(1)
        self.table = self.table_type(
            WatchedPins(self.allocator, self.run_io_inside),
            TTL_S,
            RETENTION_S,
            new_id=lambda: next(self.new_ids),
        )

    # The owner's engine thread.

    @rule(
        text=st.sampled_from(TEXTS),
        num_tokens=st.integers(1, 13),
        tenant=st.sampled_from(["a", "a", "a", "b"]),
        count=st.integers(1, 2),
    )
    def start(self, text: str, num_tokens: int, tenant: str, count: int) -> None:
        for _ in range(
            count
        ):  # at the same time, so that the second cannot use what the first computes
            self.start_one([int(letter) for letter in text[:num_tokens]], tenant)

    def start_one(self, tokens: list[int], tenant: str) -> None:
        array = np.array(tokens, dtype=np.int32)
        num_found = self.cache.num_matching_blocks(array, tenant)
        match = self.cache.match(array, tenant)
        assert len(match.block_ids) == num_found
        num_blocks = num_blocks_for(len(tokens), BLOCK_TOKENS)
        num_available = self.allocator.num_available
        try:
            blocks = match.block_ids + self.allocator.allocate(num_blocks - num_found)
        except OutOfBlocksError:
            assert num_available < num_blocks - num_found
            self.allocator.release(match.block_ids)
            return
        assert num_available >= num_blocks - num_found
        num_computed = num_found * BLOCK_TOKENS
        self.contexts.append(
            Context(self.weights, tenant, tokens, blocks, match.chain, num_computed, num_found)
        )

    def pick(self, number: int) -> Context:
        return self.contexts[number % len(self.contexts)]

    @precondition(lambda self: self.contexts)
    @rule(number=st.integers(0, 7), count=st.integers(1, 13))
    def compute_chunk(self, number: int, count: int) -> None:
        context = self.pick(number)
        end = min(context.num_computed + count, len(context.tokens))
        self.write(context, end)

    @precondition(lambda self: self.contexts)
    @rule(number=st.integers(0, 7), token=st.integers(0, 1))
    def grow(self, number: int, token: int) -> None:
        context = self.pick(number)
        if context.num_computed < len(context.tokens):
            return
        if len(context.tokens) % BLOCK_TOKENS == 0:
            if not self.allocator.num_available:
                return
            context.blocks += self.allocator.allocate(1)
        context.tokens.append(token)
        if not self.write(context, len(context.tokens)):
            context.tokens.pop()

    def write(self, context: Context, end: int) -> bool:
        """Compute up to `end`; False: there was no block for a copy on write."""
        for position in range(context.num_computed, end):
            column = position // BLOCK_TOKENS
            block = context.blocks[column]
            if self.allocator.is_shared(block) and self.copies_on_write:
                if not self.allocator.num_available:
                    return False
                (copy,) = self.allocator.allocate(1)
                self.memory[copy] = self.memory[block]
                self.allocator.release([block])
                context.blocks[column] = block = copy
            tokens = tuple(context.tokens[: position + 1])
            self.memory[block, position % BLOCK_TOKENS] = kv(
                context.weights, context.tenant, tokens
            )
            context.num_computed = position + 1
        self.insert_full_blocks(context)
        return True

    def insert_full_blocks(self, context: Context) -> None:
        while (context.num_inserted + 1) * BLOCK_TOKENS <= context.num_computed:
            number = context.num_inserted
            tokens = context.tokens[number * BLOCK_TOKENS : (number + 1) * BLOCK_TOKENS]
            context.chain = self.cache.insert(
                context.chain, np.array(tokens, dtype=np.int32), context.blocks[number]
            )
            context.num_inserted += 1

    @precondition(lambda self: self.contexts)
    @rule(number=st.integers(0, 7))
    def fork(self, number: int) -> None:
        context = self.pick(number)
        if context.num_computed < len(context.tokens):
            return
        self.allocator.share(context.blocks)
        self.contexts.append(
            Context(
                context.weights,
                context.tenant,
                list(context.tokens),
                list(context.blocks),
                context.chain,
                context.num_computed,
                context.num_inserted,
            )
        )

    @precondition(lambda self: self.contexts)
    @rule(number=st.integers(0, 7))
    def end(self, number: int) -> None:
        context = self.pick(number)
        self.contexts.remove(context)
        self.allocator.release(context.blocks)

    @precondition(lambda self: self.cache.num_cached)
    @rule()
    def change_weights(self) -> None:
        self.weights += 1
        self.cache.flush()

    @precondition(lambda self: self.contexts)
    @rule(
        number=st.integers(0, 7),
        which_reader=st.integers(0, 1),
        is_new_request=st.booleans(),
        is_served_at_once=st.booleans(),
    )
    def grant(
        self, number: int, which_reader: int, is_new_request: bool, is_served_at_once: bool
    ) -> None:
        context = self.pick(number)
        if context.lease is not None and context.lease.state is LeaseState.ALIVE:
            return
        self.num_requests += is_new_request or not self.num_requests
        request_id = f"r{self.num_requests}"
        self.attempts[request_id] += 1
        reader = f"decode-{which_reader}.{self.reader_incarnations[which_reader]}"
        key = AttemptKey(request_id, self.attempts[request_id])
        lease = self.table.grant(key, reader, self.now)
        context.lease = lease
        num_tokens = context.num_leased_tokens = len(context.tokens)
        num_blocks = num_blocks_for(num_tokens, BLOCK_TOKENS)
        plan = self.plan_type(BLOCK_TOKENS, num_tokens, range(num_blocks))
        memory = np.full((num_blocks, BLOCK_TOKENS), 7, dtype=np.uint64)
        expected = context.expected(num_tokens)
        started = Import(reader, lease, self.incarnation, expected, plan, memory)
        started.named_s = self.now
        self.imports.append(started)
        if is_served_at_once and self.write(context, num_tokens):
            self.extend_and_publish_up_to(context, num_blocks)

    @precondition(lambda self: any(map(is_exporting, self.contexts)))
    @rule(number=st.integers(0, 7), num_blocks=st.integers(1, 4), num_tokens=st.integers(0, 13))
    def extend_and_publish(self, number: int, num_blocks: int, num_tokens: int) -> None:
        exporting = list(filter(is_exporting, self.contexts))
        context = exporting[number % len(exporting)]
        self.write(context, min(context.num_computed + num_tokens, len(context.tokens)))
        self.extend_and_publish_up_to(context, num_blocks)

    def extend_and_publish_up_to(self, context: Context, num_blocks: int) -> None:
        lease = context.lease
        assert lease is not None
        num_before = len(lease.block_ids)
        num_all = num_blocks_for(context.num_leased_tokens, BLOCK_TOKENS)
        self.table.extend(lease, context.blocks[num_before : min(num_before + num_blocks, num_all)])
        num_covered = len(lease.block_ids) * BLOCK_TOKENS
        num_tokens = min(context.num_computed, num_covered, context.num_leased_tokens)
        is_complete = num_tokens == context.num_leased_tokens
        self.table.publish(lease, Progress(num_tokens, FIRST_TOKENS if is_complete else None))
        for attempt in self.imports:
            if attempt.lease is lease and (update := lease.update_since(0)) is not None:
                attempt.sent = update

    @rule(seconds=st.sampled_from([0.5, 2.0, 4.0, 6.0, 61.0]), runs_io_inside=st.booleans())
    def expire(self, seconds: float, runs_io_inside: bool) -> None:
        self.now += seconds
        self.runs_io_inside = runs_io_inside
        for lease in self.table.expire(self.now):
            assert lease.state is LeaseState.REVOKED
        self.runs_io_inside = False
        for attempt in self.imports:
            if attempt.incarnation == self.incarnation and attempt.named_s + TTL_S <= self.now:
                state = attempt.lease.state
                assert state is not LeaseState.ALIVE, "a lease lives that nobody has renewed"

    @rule(runs_io_inside=st.booleans())
    def settle(self, runs_io_inside: bool) -> None:
        self.runs_io_inside = runs_io_inside
        for lease in self.table.settle():
            assert lease.state is LeaseState.HELD
        self.runs_io_inside = False

    @precondition(lambda self: self.table.num_undecided)
    @rule(number=st.integers(0, 7), runs_io_inside=st.booleans())
    def revoke(self, number: int, runs_io_inside: bool) -> None:
        leases = self.table._leases_with_pins()
        racing = [attempt.lease for attempt in self.confirms if attempt.lease in leases]
        if runs_io_inside and racing:
            leases = racing
        lease = leases[number % len(leases)]
        self.runs_io_inside = runs_io_inside
        is_revoked = self.table.revoke(lease, "cancelled", self.now)
        self.runs_io_inside = False
        assert is_revoked == (lease.state is LeaseState.REVOKED)

    @precondition(lambda self: self.confirms or self.table.num_undecided)
    @rule()
    def crash_owner(self) -> None:
        self.incarnation += 1
        self.start_owner()

    # The owner's io thread.

    def run_io_inside(self) -> None:
        if self.runs_io_inside:
            while self.confirms:
                self.answer(self.confirms.popleft())

    @precondition(lambda self: self.confirms)
    @rule()
    def confirmation_arrives(self) -> None:
        self.answer(self.confirms.popleft())

    def answer(self, attempt: Import) -> None:
        """The one promise: HELD means that the reader has the right bytes."""
        held = self.table.confirm(attempt.lease.lease_id, attempt.reader, self.now)
        if attempt.verdict is None:
            attempt.verdict, attempt.verdict_s = held, self.now
        known_for_s = self.now - attempt.verdict_s
        if attempt.incarnation != self.incarnation:
            assert not held, "an owner answered for another incarnation"
        elif known_for_s < RETENTION_S:
            assert held == attempt.verdict, "a decision changed"
        if held:
            found = attempt.memory.reshape(-1)[: len(attempt.expected)].tolist()
            assert found == attempt.expected, "HELD, but the reader has wrong bytes"

    @rule(which=st.integers(0, 1), has_forgotten=st.booleans())
    def renew(self, which: int, has_forgotten: bool) -> None:
        """A heartbeat names the imports that the reader still wants."""
        reader = f"decode-{which}.{self.reader_incarnations[which]}"
        mine = [attempt for attempt in self.imports if attempt.reader == reader]
        for attempt in mine:
            attempt.is_wanted &= not has_forgotten
        named = [attempt for attempt in mine if attempt.is_wanted]
        for attempt in named:
            attempt.named_s = self.now
        self.table.renew(reader, self.now, [attempt.lease.lease_id for attempt in named])

    # The readers.

    @precondition(lambda self: any(map(is_behind, self.imports)))
    @rule(number=st.integers(0, 7), is_quick=st.booleans())
    def update_arrives(self, number: int, is_quick: bool) -> None:
        waiting = list(filter(is_behind, self.imports))
        attempt = waiting[number % len(waiting)]
        added, progress = attempt.sent
        added = added[attempt.num_blocks_told :]
        attempt.told = progress
        attempt.num_blocks_told += len(added)
        reads = attempt.plan.update(added, progress.num_tokens, progress.is_complete)
        if reads:
            attempt.running.append(reads)
        elif attempt.plan.all_read:
            self.confirms.append(attempt)
        while is_quick and attempt.running:
            self.copy(attempt, 100)

    @precondition(lambda self: any(attempt.running for attempt in self.imports))
    @rule(number=st.integers(0, 7), count=st.integers(1, 6))
    def copy_half_blocks(self, number: int, count: int) -> None:
        reading = [attempt for attempt in self.imports if attempt.running]
        self.copy(reading[number % len(reading)], count)

    def copy(self, attempt: Import, count: int) -> None:
        """Copy up to `count` half blocks of the first running read."""
        half = BLOCK_TOKENS // 2
        reads = attempt.running[0]
        for _ in range(min(count, 2 * len(reads) - attempt.num_halves_copied)):
            which, second = divmod(attempt.num_halves_copied, 2)
            part = slice(second * half, (second + 1) * half)
            attempt.memory[reads[which].target, part] = self.memory[reads[which].source, part]
            attempt.num_halves_copied += 1
        if attempt.num_halves_copied == 2 * len(reads):
            attempt.running.pop(0)
            attempt.num_halves_copied = 0
            attempt.plan.read_ended()
            if attempt.plan.all_read:
                self.confirms.append(attempt)

    @precondition(lambda self: any(a.verdict is not None for a in self.imports))
    @rule(number=st.integers(0, 7))
    def confirm_again(self, number: int) -> None:
        answered = [attempt for attempt in self.imports if attempt.verdict is not None]
        self.confirms.append(answered[number % len(answered)])

    @precondition(lambda self: self.imports)
    @rule(which=st.integers(0, 1), is_noticed=st.booleans())
    def crash_reader(self, which: int, is_noticed: bool) -> None:
        reader = f"decode-{which}.{self.reader_incarnations[which]}"
        self.reader_incarnations[which] += 1
        self.imports = [attempt for attempt in self.imports if attempt.reader != reader]
        if is_noticed:  # else its leases expire, and a confirmation on its way may still arrive
            self.table.revoke_reader(reader, "session ended", self.now)

    # What holds after every step.

    @invariant()
    def every_sequence_finds_what_it_wrote(self) -> None:
        for context in self.contexts:
            found = self.memory[context.blocks].reshape(-1)[: context.num_computed].tolist()
            expected = context.expected(context.num_computed)
            assert found == expected, "another one wrote a sequence's block"

    @invariant()
    def references_and_pins_are_those_of_sequences_and_leases(self) -> None:
        references = Counter(block for context in self.contexts for block in context.blocks)
        pins = Counter(
            block for lease in self.table._leases_with_pins() for block in lease.block_ids
        )
        for block in range(NUM_BLOCKS):
            counts = self.allocator.num_references(block), self.allocator.num_pins(block)
            assert counts == (references[block], pins[block]), "references or pins are wrong"

    @invariant()
    def everything_adds_up_and_nothing_final_was_written(self) -> None:
        self.allocator.check_integrity()
        self.cache.check_integrity(lambda block: self.memory[block].tobytes())
        self.table.check_integrity(self.allocator.num_pins, self.digest)

    def digest(self, block_ids: Sequence[int], num_tokens: int) -> bytes:
        return self.memory[list(block_ids)].reshape(-1)[:num_tokens].tobytes()

    def teardown(self) -> None:
        """End everything; nothing may be left, whatever happened before."""
        for context in self.contexts:
            self.allocator.release(context.blocks)
        while self.confirms:
            self.answer(self.confirms.popleft())
        self.table.settle()
        self.table.expire(self.now + 1000)
        pins = [self.allocator.num_pins(block) for block in range(NUM_BLOCKS)]
        assert pins == [0] * NUM_BLOCKS, "pins are left"
        assert self.allocator.num_available == NUM_BLOCKS, "blocks are left"
        self.cache.flush()
        assert self.allocator.num_free == NUM_BLOCKS, "blocks are left after a flush"
        self.allocator.check_integrity()
        self.table.check_integrity()


TestBlocksAndLeases = BlocksAndLeases.TestCase
TestBlocksAndLeases.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, report_multiple_bugs=False
)


# Seeded bugs.


class NoPins:
    """Pins nothing."""

    def pin(self, block_ids: Sequence[int], /) -> None: ...

    def unpin(self, block_ids: Sequence[int], /) -> None: ...


class DropsPinsBeforeTheDecision(LeaseTable):
    """Takes a complete lease for a finished one, though the reader may still be reading."""

    def publish(self, lease: Lease, progress: Progress) -> None:
        super().publish(lease, progress)
        if progress.is_complete:
            self._pins.unpin(lease.block_ids)

    def _drop_pins(self, lease: Lease) -> None:
        pins = self._pins
        if lease.progress.is_complete:
            self._pins = NoPins()
        super()._drop_pins(lease)
        self._pins = pins


class ChecksThenActs(LeaseTable):
    """Revokes what was alive a moment ago, without compare-and-set."""

    def revoke(self, lease: Lease, reason: str, now: float) -> bool:
        if lease._state is not LeaseState.ALIVE:
            return lease._state is LeaseState.REVOKED
        self._pins.pin(())
        self._pins.unpin(())  # the io thread runs here
        lease._state = LeaseState.REVOKED
        lease.ended_s = now
        self._renewals.pop(lease, None)
        self._drop_pins(lease)
        return True


class RenewsWhatNobodyNamed(LeaseTable):
    """Takes a reader's heartbeat for a renewal of all its leases."""

    def renew(self, reader: str, now: float, lease_ids: Iterable[int] = ()) -> None:
        mine = [lease.lease_id for lease in self._leases_with_pins() if lease.reader == reader]
        super().renew(reader, now, mine)


class ForgetsPins(BlockAllocator):
    """Frees a block with its last reference."""

    def _give_back(self, ended: list[int], others: list[int]) -> None:
        super()._give_back(ended, [0] * self.num_blocks)


class ForgetsCachedBlocksThatAreShared(BlockAllocator):
    """Shares an evictable block and leaves it evictable."""

    def _take_from_evictable(self, first: list[int], others: list[int]) -> None:
        pass


class CachesAcrossFlushes(PrefixCache):
    """Lets sequences go on inserting what they computed with the old weights."""

    def insert(
        self, chain: ChainPosition, tokens_of_block: npt.NDArray[np.int32], block_id: int
    ) -> ChainPosition:
        chain = chain._replace(flush_count=self._flush_count)
        if chain.block is not None and not chain.block.is_cached:
            chain = chain._replace(block=None)
        return super().insert(chain, tokens_of_block, block_id)


def machine(*left_out: str, **bug: object) -> type[BlocksAndLeases]:
    """Build a machine with a bug, without the events that the bug does not need: found in
    seconds."""
    return type("Buggy", (BlocksAndLeases,), {**dict.fromkeys(left_out), **bug})


CRASHES = ("crash_owner", "crash_reader", "change_weights")
ENDS = ("revoke", "expire")
SEQUENCES = ("fork", "grow")
LEASES = ("grant", "settle", "renew", *ENDS)
READS = ("compute_chunk", "extend_and_publish", "update_arrives", "copy_half_blocks")
DECISIONS = ("revoke", "settle", "end", "confirmation_arrives", "confirm_again")
COUNTS = (
    "references_and_pins_are_those_of_sequences_and_leases",
    "everything_adds_up_and_nothing_final_was_written",
)
"""Invariants. Without them only the readers' bytes can betray a bug."""
# For each bug the machine, and what it says.
BUGS = {
    "pins dropped before the decision": (
        machine(*CRASHES, *ENDS, *SEQUENCES, *COUNTS, table_type=DropsPinsBeforeTheDecision),
        "HELD, but the reader has wrong bytes",
    ),
    "check, then act": (
        machine(*CRASHES, *SEQUENCES, table_type=ChecksThenActs),
        "a decision changed|dropped once, after the decision",
    ),
    "forgotten leases renewed": (
        machine(
            *CRASHES, *SEQUENCES, *COUNTS, *READS, *DECISIONS, table_type=RenewsWhatNobodyNamed
        ),
        "a lease lives that nobody has renewed",
    ),
    "lease ids start anew": (
        machine("crash_reader", *ENDS, *SEQUENCES, ids_start_anew=True),
        "answered for another incarnation",
    ),
    "no copy on write": (
        machine(*CRASHES, *LEASES, copies_on_write=False),
        "another one wrote|is cached already",
    ),
    "pins ignored": (
        machine(*CRASHES, *COUNTS, allocator_type=ForgetsPins),
        "HELD, but|another one wrote|blocks are left|more often than it has",
    ),
    "shared stays evictable": (
        machine(*CRASHES, *LEASES, *COUNTS, allocator_type=ForgetsCachedBlocksThatAreShared),
        "another one wrote|blocks are left|were to be evicted",
    ),
    "cached across a flush": (
        machine(*LEASES, *SEQUENCES, cache_type=CachesAcrossFlushes),
        "another one wrote",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_machine_finds_the_bug(bug: str) -> None:
    buggy_machine, message = BUGS[bug]
    with pytest.raises((AssertionError, IntegrityError), match=message):
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            buggy_machine,
            settings=settings(
                max_examples=2000,
                stateful_step_count=60,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_machine_finds_nothing_in_many_more_runs() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        BlocksAndLeases,
        settings=settings(
            max_examples=5000, stateful_step_count=100, deadline=None, report_multiple_bugs=False
        ),
    )
