"""Continuous batching on a decode worker: which sequences the next step computes, and what it gave."""

from collections.abc import Collection, Sequence

from paceline.decode_worker.outcomes import Admitted, DecodeStep, Refused
from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.prefix_cache import PrefixCache
from paceline.engine.step_plan import StepPlan, StepResult
from paceline.kv_transfer.lease import FirstToken
from paceline.request import AttemptKey, Work
from paceline.worker.core import LoadReport


class DecodeScheduler:
    """Called by the engine thread alone; times are arguments. Up to two steps may be unapplied.

    Everything that leaves the worker comes out of `apply`, or of `take_output` when no step is there to be
    applied (after any other call, and after a `plan` that gave None): tokens, failures, imports to abandon.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        prefix_cache: PrefixCache,
        *,
        block_tokens: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        local_prefill_tokens: int | None,
        watermark_blocks: int,
        promise_ttl_s: float,
        prefill_age_bound_s: float,
        eos_token_ids: Collection[int],
        max_model_len: int,
    ) -> None:
        """local_prefill_tokens: longest uncached context computed here; None: any, 0: none."""
        raise NotImplementedError

    def admit(
        self, work: Work, session: int, *, has_source: bool, now: float
    ) -> Admitted | Refused:
        """Take the work with everything it needs, or refuse it and keep nothing.

        Admitted(block_ids of the whole context, num_cached_tokens): with a source, reads go into the blocks
        after the cached ones, until `imported` or `import_ended`.
        """
        raise NotImplementedError

    def import_progressed(self, key: AttemptKey, now: float) -> None:
        """Renew the promise."""
        raise NotImplementedError

    def imported(self, key: AttemptKey, first_tokens: Sequence[FirstToken], now: float) -> None:
        """All reads have ended well: the choices may run; outputs are held back until `confirmed`."""
        raise NotImplementedError

    def confirmed(self, key: AttemptKey, now: float) -> None:
        """HELD. The first tokens, and what was held back, are in the next output."""
        raise NotImplementedError

    def lost(self, key: AttemptKey, message: str, now: float) -> None:
        """End the attempt with a LEASE_LOST failure."""
        raise NotImplementedError

    def import_ended(self, key: AttemptKey) -> None:
        """Nothing writes to the destination blocks any more. Harmless at any time after that is so."""
        raise NotImplementedError

    def cancel(self, key: AttemptKey, choices: Collection[int] = (), *, now: float) -> None:
        """End some choices, or all when none is named; unknown ones have ended already."""
        raise NotImplementedError

    def end_session(self, session: int, now: float) -> None:
        """The router is gone: cancel all its work and drop its output."""
        raise NotImplementedError

    def drain(self) -> None:
        """Refuse new work from now on."""
        raise NotImplementedError

    def expire(self, now: float) -> None:
        """Fail promises whose prefill made no progress for promise_ttl_s (PROMISE_EXPIRED)."""
        raise NotImplementedError

    def plan(self, now: float) -> StepPlan | None:
        """Plan the next step; None when there is nothing to compute now."""
        raise NotImplementedError

    def apply(self, result: StepResult, now: float) -> DecodeStep:
        """Take the result of the oldest unapplied step; gives everything that may leave the worker."""
        raise NotImplementedError

    def take_output(self) -> DecodeStep:
        """Give what came up since the last output without a step."""
        raise NotImplementedError

    def tidy(self) -> None:
        """Free what has ended and cache its blocks. `plan` does it; earlier, beside a running step, is free."""
        raise NotImplementedError

    def step_failed(self, message: str, now: float) -> None:
        """The runner lost the unapplied steps: fail (INTERNAL) whatever had rows in them."""
        raise NotImplementedError

    def load(self, session: int, num_sessions: int) -> LoadReport:
        """Say what a router may send now."""
        raise NotImplementedError

    @property
    def is_idle(self) -> bool:
        """Whether no request holds anything here."""
        raise NotImplementedError

    def check_integrity(self) -> None:
        """Add everything up; raise IntegrityError with the numbers that disagree."""
        raise NotImplementedError
