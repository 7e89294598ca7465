"""How much of a load's prompts a prefix cache may save, and whether it saved more than that."""

from collections.abc import Iterable, Sequence

from paceline.bench.record import LoadSummary

BLOCK_TOKENS = 16
"""Prefixes are compared in blocks of this size, the default of kv.block_tokens."""
MAX_UNEXPECTED_SHARE = 0.02


def num_shared_tokens(prompts: Iterable[Sequence[int]]) -> int:
    """Count the tokens, in whole blocks from the front, that an earlier prompt begins with too."""
    seen: set[int] = set()
    num_shared = 0
    for prompt in prompts:
        prefix = 0
        is_shared = True
        for end in range(BLOCK_TOKENS, len(prompt) + 1, BLOCK_TOKENS):
            prefix = hash((prefix, tuple(prompt[end - BLOCK_TOKENS : end])))
            is_shared = is_shared and prefix in seen
            num_shared += BLOCK_TOKENS * is_shared
            seen.add(prefix)
    return num_shared


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
