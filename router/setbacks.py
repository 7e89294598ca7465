"""What a piece of work has met since its last new token, and when that is too much. Pure."""

from dataclasses import dataclass, replace

from paceline.request import FailureReason
from paceline.router.settings import RouterSettings

_NO_ROOM = frozenset({FailureReason.REFUSED, FailureReason.PREEMPTED})


@dataclass(frozen=True, slots=True)
class Setbacks:
    """Passed on from attempt to attempt; all is forgotten with the first new token of a decode
    worker. A prefill worker's token is not enough: each attempt has one."""

    num_without_room: int = 0
    """Times that a worker had no room for it after all."""
    num_failures: int = 0
    """Times that it failed for another reason, internal errors aside."""
    num_internal_failures: int = 0
    last: str = ""
    """The last reason, in words."""

    @property
    def num_given_back(self) -> int:
        return self.num_without_room + self.num_failures + self.num_internal_failures

    def after(self, worker_id: str, reason: FailureReason, message: str) -> "Setbacks":
        """Return what it has met when a worker gives it back."""
        last = f"{worker_id} gave it back ({reason.name}): {message}"
        if reason in _NO_ROOM:
            return replace(self, num_without_room=self.num_without_room + 1, last=last)
        if reason is FailureReason.INTERNAL:
            return replace(self, num_internal_failures=self.num_internal_failures + 1, last=last)
        if reason is FailureReason.DRAINING:
            return replace(self, last=last)  # planned, and nobody's fault
        return replace(self, num_failures=self.num_failures + 1, last=last)

    def why_too_many(self, settings: RouterSettings) -> str | None:
        """Say why the work should not be sent again."""
        if self.num_internal_failures >= settings.max_internal_failures:
            return (
                f"{self.num_internal_failures} attempts in a row ended with an internal error of a "
                f"worker, and router.max_internal_failures is {settings.max_internal_failures}; "
                f"at last {self.last}"
            )
        if self.num_failures >= settings.max_setbacks:
            return (
                f"{self.num_failures} attempts in a row failed without a new token, and "
                f"router.max_setbacks is {settings.max_setbacks}; at last {self.last}. If the "
                "workers cannot reach each other, check the network between them and kv.transport"
            )
        if self.num_without_room >= settings.max_refusals:
            return (
                f"workers had no room for it {self.num_without_room} times in a row though their "
                f"credit said so, and router.max_refusals is {settings.max_refusals}; at last "
                f"{self.last}"
            )
        return None
