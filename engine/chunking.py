"""Which tokens of which prompts the next step computes.

The shortest remaining prompt goes first, which gives the lowest mean time to first token; a prompt
that has waited longer than the age bound goes before all younger ones, so that a stream of short
prompts delays a long one by little more than that bound.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar


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
    """Tokens from the cache, of applied steps, and of steps in flight. The scheduler adds to it."""
    arrived_s: float

    @property
    def num_unplanned(self) -> int:
        return self.num_tokens - self.num_planned


PromptT = TypeVar("PromptT", bound=PrefillProgress)


class Chunk(NamedTuple, Generic[PromptT]):
    """The next `num_tokens` unplanned tokens of one prompt."""

    prompt: PromptT
    num_tokens: int


def plan_chunks(
    prompts: Iterable[PromptT], token_budget: int, now: float, age_bound_s: float
) -> list[Chunk[PromptT]]:
    """Share `token_budget` new tokens among the prompts; only the last chunk may end early.

    Changes nothing: the caller adds each chunk to its prompt's `num_planned`. Prompts without
    unplanned tokens get no chunk.
    """
    overdue_before = now - age_bound_s

    def urgency(prompt: PromptT) -> tuple[bool, float, float]:
        if prompt.arrived_s < overdue_before:
            return (False, prompt.arrived_s, 0.0)
        return (True, prompt.num_unplanned, prompt.arrived_s)

    chunks = []
    for prompt in sorted((p for p in prompts if p.num_unplanned), key=urgency):
        if token_budget <= 0:
            break
        num_tokens = min(prompt.num_unplanned, token_budget)
        chunks.append(Chunk(prompt, num_tokens))
        token_budget -= num_tokens
    return chunks
