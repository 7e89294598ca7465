"""What a piece of work has met since its last new token, and when that is too much. Pure."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from paceline.request import FailureReason
from paceline.router.settings import RouterSettings


class Incarnation(NamedTuple):
    """One start of a worker."""

    worker_id: str
    incarnation: int


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
    deaths: frozenset[Incarnation] = frozenset()
    """Workers that died under it among others; of a planned stop nobody dies."""
    lone_deaths: frozenset[Incarnation] = frozenset()
    """Workers that died when it was the only one there without a token."""
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

    def after_death(self, worker: Incarnation, *, is_alone: bool) -> "Setbacks":
        """Return what it has met when a worker dies under it."""
        last = f"{worker.worker_id} died"
        if is_alone:
            return replace(self, lone_deaths=self.lone_deaths | {worker}, last=last)
        return replace(self, deaths=self.deaths | {worker}, last=last)

    def is_suspect(self, settings: RouterSettings) -> bool:
        """Whether the work should run alone, because workers may have died of it."""
        return len(self.deaths) >= settings.max_worker_deaths

    def why_too_many(self, settings: RouterSettings) -> str | None:
        """Say why the work should not be sent again."""
        if len(self.lone_deaths) >= settings.max_lone_deaths:
            names = ", ".join(sorted({w.worker_id for w in self.deaths | self.lone_deaths}))
            return (
                f"{len(self.deaths)} workers died in a row while they worked on this request and "
                f"others, and {len(self.lone_deaths)} more when it ran alone ({names}), without a "
                f"new token; router.max_worker_deaths is {settings.max_worker_deaths} and "
                f"router.max_lone_deaths {settings.max_lone_deaths}. If the workers' logs show "
                "that it was not the request's fault, send it again or raise them"
            )
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
