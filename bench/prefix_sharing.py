"""How much of a load's prompts a prefix cache may save, and whether it saved more than that."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from paceline.bench.record import LoadSummary

MAX_UNEXPECTED_SHARE = 0.02


def num_shared_tokens(prompts: Iterable[Sequence[int]]) -> int:
    """Count the tokens, from the front of each prompt, with which an earlier prompt begins too.

    A cache with blocks of any size saves at most these.
    """
    earlier: list[tuple[int, ...]] = []
    num_shared = 0
    for prompt in map(tuple, prompts):
        place = bisect_left(earlier, prompt)
        # In lexicographic order, the prompts that share most with it are its neighbours.
        neighbours = earlier[max(0, place - 1) : place + 1]
        num_shared += max((_num_common(prompt, other) for other in neighbours), default=0)
        earlier.insert(place, prompt)
    return num_shared


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    for place, (token, other_token) in enumerate(zip(one, other, strict=False)):
        if token != other_token:
            return place
    return min(len(one), len(other))


def cache_warning(summary: LoadSummary) -> str | None:
    """Say so when the deployment had prompts in its cache that the load did not put there."""
    unexpected = summary.num_cached_tokens - summary.num_shared_tokens
    if unexpected <= MAX_UNEXPECTED_SHARE * summary.num_prompt_tokens:
        return None
    return (
        f"{summary.cached_share:.1%} of prompt tokens were cached, and only "
        f"{summary.shared_share:.1%} repeat within the load: the deployment has seen these prompts "
        "before, so the times to the first token are too short. Leave out --seed, and each run has "
        "prompts of its own"
    )
