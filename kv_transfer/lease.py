"""Leases: the owner's side of the rule that KV moves by reads which the owner judges afterwards.

    ALIVE ──confirm──▶ HELD       the reads saw the right bytes; the reader may use them
      └──────revoke──▶ REVOKED    whatever was read is garbage

A lease pins blocks of the owner's pool, so that a reader on another worker may copy what `publish`
says is final. The one decision, HELD or REVOKED, is a compare-and-set under the table's lock, made
once:

- the *io thread* sets HELD when the reader confirms, even in the middle of a step;
- the *engine thread* sets REVOKED, and alone touches the allocator. It drops pins only after the
  state has changed: at once when it revoked, in `settle` when it finds HELD. So blocks that a
  reader was told HELD for cannot have been reused before the confirmation.

Clocks decide when the owner may revoke, never whether a read was valid. Time is an argument:
seconds of one monotonic clock.

Every call costs O(1) a lease that it names or changes, whatever else the table holds. A lease whose
pins have been dropped keeps its outcome and nothing else: the block list of a long context would
take 0.3 MB for another minute.
"""

import secrets
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from paceline.errors import IntegrityError
from paceline.groups import Groups
from paceline.request import AttemptKey, FinishReason, TopLogprobs


class LeaseState(Enum):
    """See LEASE_TRANSITIONS."""

    ALIVE = "alive"
    """Its blocks are pinned and may be read."""
    HELD = "held"
    """Confirmed while alive. The pins are dropped at the next `settle`."""
    REVOKED = "revoked"
    """Expired, given back, superseded or cut off. Its pins are dropped or about to be."""


LEASE_TRANSITIONS: dict[LeaseState, frozenset[LeaseState]] = {
    LeaseState.ALIVE: frozenset({LeaseState.HELD, LeaseState.REVOKED}),
    LeaseState.HELD: frozenset(),
    LeaseState.REVOKED: frozenset(),
}


class BlockPins(Protocol):
    """What leases need of the block allocator. Called in the engine thread alone."""

    def pin(self, block_ids: Sequence[int], /) -> None: ...

    def unpin(self, block_ids: Sequence[int], /) -> None: ...


ContextChecksum = Callable[[Sequence[int], int], bytes]
"""(block ids, num_tokens) → digest of the KV of a context's first `num_tokens` tokens in them."""


class FirstToken(NamedTuple):
    """The token that prefill sampled for a choice."""

    choice: int
    token_id: int
    finish_reason: FinishReason | None = None
    """Why the choice ended with it; None: decode goes on from it."""
    logprobs: TopLogprobs | None = None
    """If the request asked."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a reader may read. Names only writes that have completed, never merely launched ones."""

    num_tokens: int
    """Tokens of the context, from the start, whose KV is final in all layers."""
    first_tokens: tuple[FirstToken, ...] | None = None
    """None until the context is complete; then one for each choice."""

    @property
    def is_complete(self) -> bool:
        return self.first_tokens is not None


class LeaseUpdate(NamedTuple):
    """What has become readable since the reader was told last."""

    block_ids_added: tuple[int, ...]
    progress: Progress


class Lease:
    """One reader's right to read the blocks of one attempt. Changed by its table alone."""

    __slots__ = (
        "_block_ids",
        "_block_set",
        "_checked",
        "_has_pins",
        "_state",
        "choices",
        "ended_s",
        "key",
        "lease_id",
        "progress",
        "reader",
        "reason",
        "renewed_s",
    )

    def __init__(
        self,
        lease_id: int,
        key: AttemptKey,
        reader: str,
        choices: frozenset[int] | None,
        granted_s: float,
    ) -> None:
        self.lease_id = lease_id
        self.key = key
        self.reader = reader
        """Worker id and incarnation of the reader: another incarnation is another reader."""
        self.choices = choices
        """None: all choices of the request."""
        self.renewed_s = granted_s
        """When its reader named it last; at first, when it was granted."""
        self.ended_s: float | None = None
        """When it was decided; None while ALIVE."""
        self.reason = ""
        """Why it was revoked."""
        self.progress = Progress(0)
        self._state = LeaseState.ALIVE
        self._block_ids: list[int] = []
        self._block_set: set[int] = set()
        self._has_pins = True
        self._checked: tuple[int, bytes] | None = None
        """Tokens and digest at the last `check_integrity`."""

    @property
    def state(self) -> LeaseState:
        return self._state

    @property
    def block_ids(self) -> tuple[int, ...]:
        """The owner's blocks so far, in the order of the context; empty without pins."""
        return tuple(self._block_ids)

    def update_since(self, num_blocks: int) -> LeaseUpdate | None:
        """Give the blocks after the first `num_blocks` and the progress. Callable on any thread.

        None: the lease is decided and has no pins any more.
        """
        block_ids = self._block_ids
        # Progress first: blocks only grow, so those read later cover the progress read earlier.
        progress = self.progress
        added = tuple(block_ids[num_blocks:])
        # Last: with pins now, neither list nor progress has been dropped before.
        return LeaseUpdate(added, progress) if self._has_pins else None

    def _keep_outcome(self) -> None:
        """Forget what only a lease with pins needs."""
        self._has_pins = False
        self._block_ids = []
        self._block_set = set()
        self._checked = None
        self.progress = Progress(self.progress.num_tokens)

    def describe(self) -> str:
        """Name the lease for messages."""
        because = f" ({self.reason})" if self.reason else ""
        return (
            f"lease {self.lease_id:016x} of request {self.key.request_id} attempt "
            f"{self.key.attempt} for {self.reader}, {self._state.name}{because}"
        )


class LeaseTable:
    """All leases that one incarnation of an owner grants.

    Methods under "engine thread" and "io thread" belong to these threads; `find` and `is_readable`
    may be called on any.
    """

    def __init__(
        self,
        pins: BlockPins,
        ttl_s: float,
        outcome_retention_s: float = 60.0,
        new_id: Callable[[], int] = lambda: secrets.randbits(64),
    ) -> None:
        """ttl_s: seconds that a lease lives after its grant or its last renewal.

        outcome_retention_s: how long `confirm` remembers a decision; afterwards the answer is LOST.
        new_id: gives random numbers of 64 bits; one that is in use is drawn again.
        """
        if ttl_s <= 0 or outcome_retention_s <= 0:
            raise ValueError(
                f"ttl_s is {ttl_s} and outcome_retention_s {outcome_retention_s}; both must be "
                "positive"
            )
        self._pins = pins
        self._ttl_s = ttl_s
        self._outcome_retention_s = outcome_retention_s
        self._new_id = new_id
        self._lock = threading.Lock()
        """Held for a few assignments at a time: every change of state, and each renewal."""
        self._by_id: dict[int, Lease] = {}
        """ALIVE ones and those whose outcome is still kept. Written by the engine thread."""
        self._by_key: dict[AttemptKey, Lease] = {}
        """The last lease of each attempt, as long as it is in `_by_id`."""
        self._of_request: Groups[str, Lease] = Groups()
        """Leases with pins: those that the engine thread has not yet seen decided."""
        self._of_reader: Groups[str, Lease] = Groups()
        """The same leases."""
        self._renewals: OrderedDict[Lease, None] = OrderedDict()
        """ALIVE leases, the one that was renewed longest ago first. Changed under the lock."""
        self._last_renewal_s = float("-inf")
        self._held: deque[Lease] = deque()
        """From the io thread to `settle`."""
        self._outcomes: deque[Lease] = deque()
        """Decided leases without pins, oldest first."""

    @property
    def num_undecided(self) -> int:
        """Leases that are ALIVE, or HELD and not settled: those with pins."""
        return len(self._of_request)

    # Engine thread.

    def grant(
        self, key: AttemptKey, reader: str, now: float, choices: Collection[int] | None = None
    ) -> Lease:
        """Begin a lease without blocks, and revoke those of older attempts at the same work.

        choices: those that this attempt covers; None means all of the request. After a failure
        each choice resumes as an attempt of its own, so an older attempt at other choices is left
        alone. Raises IntegrityError if this attempt, or a newer one at the same choices, has a
        lease.
        """
        covered = None if choices is None else frozenset(choices)
        older = []
        for lease in self._of_request.of(key.request_id):
            if lease._state is not LeaseState.ALIVE or not _overlap(covered, lease.choices):
                continue
            if lease.key.attempt >= key.attempt:
                raise IntegrityError(
                    f"attempt {key.attempt} of request {key.request_id} cannot have a lease: "
                    f"there is {lease.describe()}. Work of an older attempt must be dropped "
                    "when a newer arrives"
                )
            older.append(lease)
        for lease in older:
            self.revoke(lease, f"attempt {key.attempt} superseded it", now)
        lease = Lease(self._draw_id(), key, reader, covered, now)
        self._of_request.add(key.request_id, lease)
        self._of_reader.add(reader, lease)
        with self._lock:
            self._renew(lease, now)
        self._by_id[lease.lease_id] = lease
        self._by_key[key] = lease
        return lease

    def extend(self, lease: Lease, block_ids: Sequence[int]) -> None:
        """Pin more blocks, which follow those so far in the context, and add them to the lease."""
        self._require_growing(lease, "extended")
        added = set(block_ids)
        if len(added) != len(block_ids) or not added.isdisjoint(lease._block_set):
            raise IntegrityError(
                f"{lease.describe()} has {len(lease._block_set)} blocks and cannot be extended "
                f"with {list(block_ids)}: a block has one place in a context"
            )
        self._pins.pin(block_ids)
        lease._block_set |= added
        lease._block_ids.extend(block_ids)

    def publish(self, lease: Lease, progress: Progress) -> None:
        """Say what is final now. Progress only grows, and nothing follows complete progress."""
        self._require_growing(lease, "published further")
        if progress.num_tokens < lease.progress.num_tokens:
            raise IntegrityError(
                f"{lease.describe()} has published {lease.progress.num_tokens} tokens and "
                f"cannot go back to {progress.num_tokens}: a reader may have read them"
            )
        lease.progress = progress

    def revoke(self, lease: Lease, reason: str, now: float) -> bool:
        """Decide against the lease and drop its pins. False: it is HELD; `settle` drops them."""
        with self._lock:
            if lease._state is LeaseState.HELD:
                return False
            if lease._state is LeaseState.REVOKED:
                return True
            self._decide(lease, LeaseState.REVOKED, now)
            lease.reason = reason
        self._drop_pins(lease)
        return True

    def revoke_reader(self, reader: str, reason: str, now: float) -> list[Lease]:
        """Revoke what a lost reader had not confirmed, and return it."""
        mine = self._of_reader.of(reader)
        return [lease for lease in mine if self.revoke(lease, reason, now)]

    def expire(self, now: float) -> list[Lease]:
        """Revoke and return leases that were not renewed in time; forget outcomes after theirs."""
        self._forget_outcomes(now)
        expired = []
        while (lease := self._longest_unrenewed()) and self._expires_s(lease) <= now:
            if self.revoke(lease, f"not renewed for {self._ttl_s} s", now):
                expired.append(lease)
        return expired

    def settle(self) -> list[Lease]:
        """Drop the pins of leases that became HELD since the last call, and return these."""
        settled = []
        while self._held:
            lease = self._held.popleft()
            self._drop_pins(lease)
            settled.append(lease)
        return settled

    def check_integrity(
        self,
        num_pins: Callable[[int], int] | None = None,
        checksum: ContextChecksum | None = None,
    ) -> None:
        """Raise IntegrityError unless tables, states and pins add up.

        num_pins: pins of a block, from the allocator, if leases are the only ones that pin.
        checksum: also compare what each lease with pins had published at the last check that had
        one.
        """
        pinned: Counter[int] = Counter()
        for lease in self._leases_with_pins():
            pinned.update(lease._block_ids)
            if checksum is not None:
                _check_content(lease, checksum)
            if lease._state is LeaseState.REVOKED or not lease._has_pins:
                raise IntegrityError(
                    f"{lease.describe()} is decided, but its pins were not dropped"
                )
            if self._by_id.get(lease.lease_id) is not lease:
                raise IntegrityError(f"{lease.describe()} has pins, but cannot be found by its id")
            if len(lease._block_set) != len(lease._block_ids):
                raise IntegrityError(f"{lease.describe()} has a block twice")
        self._check_renewals()
        num_known = self.num_undecided + len(self._outcomes)
        if len(self._by_id) != num_known or len(self._by_key) > num_known:
            raise IntegrityError(
                f"{self.num_undecided} leases have pins and {len(self._outcomes)} are "
                f"outcomes, but {len(self._by_id)} ids and {len(self._by_key)} attempts are known"
            )
        if set(self._of_reader) != set(self._of_request):
            raise IntegrityError(
                f"{self.num_undecided} leases have pins, and not the same {len(self._of_reader)} "
                "are found by their readers"
            )
        for outcome in self._outcomes:
            if outcome._has_pins or outcome._block_ids or outcome._block_set:
                raise IntegrityError(f"{outcome.describe()} keeps more than its outcome")
        if num_pins is not None:
            for block_id, count in pinned.items():
                if num_pins(block_id) != count:
                    raise IntegrityError(
                        f"block {block_id} has {num_pins(block_id)} pins, but {count} leases pin it"
                    )

    # io thread.

    def confirm(self, lease_id: int, reader: str, now: float) -> bool:
        """Decide for the lease, all reads of which have ended. True: HELD. False: LOST.

        The same answer however often it is asked. LOST if the id is unknown or another reader's,
        and for a lease that is not complete yet, which stays as it is.
        """
        with self._lock:
            lease = self._by_id.get(lease_id)
            if lease is None or lease.reader != reader:
                return False
            if lease._state is LeaseState.ALIVE and lease.progress.is_complete:
                self._decide(lease, LeaseState.HELD, now)
                self._held.append(lease)
            return lease._state is LeaseState.HELD

    def renew(self, reader: str, now: float, lease_ids: Iterable[int] = ()) -> None:
        """Let the leases live on that their reader still wants; those of others stay as they are.

        Whatever a reader does not name expires, so that a forgotten lease is not kept by the
        reader's heartbeats.
        """
        for lease_id in lease_ids:
            with self._lock:  # for each: the engine thread must not wait for a long heartbeat
                lease = self._by_id.get(lease_id)
                if lease is not None and lease.reader == reader and lease in self._renewals:
                    self._renew(lease, now)

    def find(self, key: AttemptKey) -> Lease | None:
        """Find the last lease of an attempt, decided or not. Callable on any thread."""
        return self._by_key.get(key)

    def is_readable(self, lease_id: int, block_ids: Sequence[int]) -> bool:
        """Whether the lease is alive and covers the blocks. Callable on any thread."""
        lease = self._by_id.get(lease_id)
        if lease is None or not lease._block_set.issuperset(block_ids):
            return False
        return lease._state is LeaseState.ALIVE

    def _renew(self, lease: Lease, now: float) -> None:
        """Count a lease's time from now. Only under the lock.

        The two threads read the clock at different moments. Time never goes back here, so that the
        order of the renewals is that of their times.
        """
        self._last_renewal_s = max(now, self._last_renewal_s)
        lease.renewed_s = self._last_renewal_s
        self._renewals[lease] = None
        self._renewals.move_to_end(lease)

    def _longest_unrenewed(self) -> Lease | None:
        with self._lock:
            return next(iter(self._renewals), None)

    def _decide(self, lease: Lease, state: LeaseState, now: float) -> None:
        """Change the state. Only under the lock."""
        if state not in LEASE_TRANSITIONS[lease._state]:
            raise IntegrityError(f"{lease.describe()} cannot become {state.name}")
        lease._state = state
        lease.ended_s = now
        del self._renewals[lease]

    def _drop_pins(self, lease: Lease) -> None:
        if lease._state is LeaseState.ALIVE or not lease._has_pins:
            raise IntegrityError(
                f"{lease.describe()} cannot drop its pins: they are dropped once, after the "
                "decision"
            )
        block_ids = lease._block_ids
        lease._keep_outcome()
        self._of_request.remove(lease.key.request_id, lease)
        self._of_reader.remove(lease.reader, lease)
        self._outcomes.append(lease)
        self._pins.unpin(block_ids)

    def _leases_with_pins(self) -> list[Lease]:
        return list(self._of_request)

    def _expires_s(self, lease: Lease) -> float:
        return lease.renewed_s + self._ttl_s

    def _forget_outcomes(self, now: float) -> None:
        while self._outcomes:
            lease = self._outcomes[0]
            if lease.ended_s is None or lease.ended_s + self._outcome_retention_s > now:
                return
            self._outcomes.popleft()
            del self._by_id[lease.lease_id]
            if self._by_key.get(lease.key) is lease:
                del self._by_key[lease.key]

    def _draw_id(self) -> int:
        lease_id = self._new_id()
        while lease_id in self._by_id:
            lease_id = self._new_id()
        return lease_id

    def _check_renewals(self) -> None:
        with self._lock:
            renewed = list(self._renewals)
            alive = {
                lease for lease in self._leases_with_pins() if lease._state is LeaseState.ALIVE
            }
        if set(renewed) != alive:
            raise IntegrityError(f"{len(alive)} leases are alive, {len(renewed)} can expire")
        times = [lease.renewed_s for lease in renewed]
        if times != sorted(times):
            raise IntegrityError(f"leases are not in the order of their renewals: {times}")

    def _require_growing(self, lease: Lease, verb: str) -> None:
        # HELD needs complete progress, so the io thread cannot end this lease between here and
        # the change.
        if lease._state is not LeaseState.ALIVE or lease.progress.is_complete:
            raise IntegrityError(
                f"{lease.describe()} cannot be {verb}: it must be ALIVE and not complete, and has "
                f"published {lease.progress}"
            )


def _overlap(one: frozenset[int] | None, other: frozenset[int] | None) -> bool:
    """Whether two attempts compute a common choice. None: all choices."""
    return one is None or other is None or not one.isdisjoint(other)


def _check_content(lease: Lease, checksum: ContextChecksum) -> None:
    if lease._checked is not None:
        num_tokens, before = lease._checked
        if checksum(lease._block_ids, num_tokens) != before:
            raise IntegrityError(
                f"{lease.describe()} has published {num_tokens} tokens, and their KV was "
                "written again"
            )
    num_tokens = lease.progress.num_tokens
    lease._checked = num_tokens, checksum(lease._block_ids, num_tokens)
