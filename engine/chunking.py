"""Which tokens of which prompts the next step computes.

The shortest remaining prompt goes first, which gives the lowest mean time to first token; a prompt
that has waited longer than the age bound goes before all younger ones, so that a stream of short
prompts delays a long one by little more than that bound.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from paceline.engine.removable_heap import RemovableHeap
from paceline.errors import IntegrityError


class ChunkTime(NamedTuple):
    """When a chunk was planned and when its result was applied."""

    num_tokens: int
    planned_s: float
    applied_s: float


@dataclass(slots=True, eq=False)
class PrefillProgress:
    """How far the computation of one context has been planned. Schedulers subclass it."""

    num_tokens: int
    """Tokens of the context: prompt + output so far."""
    num_planned: int
    """Tokens from the cache, of applied steps, and of steps in flight. The queue adds to it."""
    arrived_s: float

    @property
    def num_unplanned(self) -> int:
        return self.num_tokens - self.num_planned


PromptT = TypeVar("PromptT", bound=PrefillProgress)


class Chunk(NamedTuple, Generic[PromptT]):
    """Tokens `start` to `start + num_tokens` of one prompt's context."""

    prompt: PromptT
    start: int
    num_tokens: int


class PromptQueue(Generic[PromptT]):
    """Prompts with unplanned tokens. Each call is O(log n) for a prompt that it adds or plans."""

    def __init__(self, age_bound_s: float) -> None:
        self._age_bound_s = age_bound_s
        self._by_age: RemovableHeap[PromptT] = RemovableHeap()
        self._by_size: RemovableHeap[PromptT] = RemovableHeap()
        self._numbers: dict[PromptT, int] = {}
        """Counts additions: the order of prompts that arrived at the same moment."""
        self._num_added = 0
        self.num_tokens = 0
        """Unplanned tokens of all prompts."""

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, prompt: PromptT) -> None:
        """Take a prompt that has unplanned tokens; it leaves when all are planned."""
        if prompt.num_unplanned <= 0 or prompt in self._numbers:
            raise IntegrityError(
                f"a prompt with {prompt.num_unplanned} unplanned tokens was added to the queue "
                f"({'it is' if prompt in self._numbers else 'it is not'} there already)"
            )
        self._num_added += 1
        self._numbers[prompt] = self._num_added
        self.num_tokens += prompt.num_unplanned
        self._by_age.put(prompt, (prompt.arrived_s, self._num_added))
        self._put_by_size(prompt)

    def discard(self, prompt: PromptT) -> None:
        """Take out a prompt that nobody wants any more; harmless if all of it is planned."""
        if self._numbers.pop(prompt, None) is not None:
            self.num_tokens -= prompt.num_unplanned
            self._by_age.remove(prompt)
            self._by_size.remove(prompt)

    def plan(self, token_budget: int, now: float) -> list[Chunk[PromptT]]:
        """Share `token_budget` new tokens among the prompts; only the last chunk may end early.

        Adds each chunk to its prompt's `num_planned`.
        """
        chunks = []
        while token_budget > 0 and (prompt := self._most_urgent(now)) is not None:
            num_tokens = min(prompt.num_unplanned, token_budget)
            chunks.append(Chunk(prompt, prompt.num_planned, num_tokens))
            token_budget -= num_tokens
            self.num_tokens -= num_tokens
            prompt.num_planned += num_tokens
            if prompt.num_unplanned:
                self._put_by_size(prompt)
            else:
                self.discard(prompt)
        return chunks

    def check_integrity(self, expected: Collection[PromptT]) -> None:
        """Raise IntegrityError unless the queue has just these prompts, and counts them right."""
        prompts = set(expected)
        if not prompts == set(self._numbers) == set(self._by_age) == set(self._by_size):
            raise IntegrityError(
                f"{len(prompts)} prompts have unplanned tokens; the queue has {len(self)}, "
                f"{len(self._by_age)} by age and {len(self._by_size)} by size"
            )
        num_tokens = sum(prompt.num_unplanned for prompt in prompts)
        if num_tokens != self.num_tokens:
            raise IntegrityError(
                f"{num_tokens} tokens are unplanned, the queue counts {self.num_tokens}"
            )

    def _most_urgent(self, now: float) -> PromptT | None:
        oldest = self._by_age.first()
        if oldest is not None and oldest.arrived_s < now - self._age_bound_s:
            return oldest
        return self._by_size.first()

    def _put_by_size(self, prompt: PromptT) -> None:
        key = (prompt.num_unplanned, prompt.arrived_s, self._numbers[prompt])
        self._by_size.put(prompt, key)
