"""When requests are sent, and how long they are. Pure: the same seed gives the same load."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from paceline.errors import ConfigError

TRACES = {
    "azure-conversation": Path(__file__).parent / "traces" / "azure-conversation-2023-excerpt.jsonl"
}
"""Files that come with the bench, by name."""
TRACE_BLOCK_TOKENS = 512
"""Tokens of a prompt that one of a trace's `hash_ids` stands for."""


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of a load."""

    at_s: float
    """Seconds after the load's start; 0 for all in a closed loop, which sends when it may."""
    prompt: tuple[int, ...]
    max_tokens: int
    is_cut: bool = False
    """Whether its trace has a longer prompt or output."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids that made-up prompts may use."""

    size: int
    reserved: frozenset[int]
    """Ids with a meaning of their own, such as the end of a sequence."""

    def draw(self, random: Random, count: int) -> tuple[int, ...]:
        drawn: list[int] = []
        while len(drawn) < count:
            token = random.randrange(self.size)
            if token not in self.reserved:
                drawn.append(token)
        return tuple(drawn)


def fixed_lengths(
    num_requests: int, input_tokens: int, output_tokens: int, vocabulary: Vocabulary, seed: int
) -> list[PlannedRequest]:
    """Plan requests of equal lengths and unlike content, all at once."""
    random = Random(seed)
    return [
        PlannedRequest(0.0, vocabulary.draw(random, input_tokens), output_tokens)
        for _ in range(num_requests)
    ]


def poisson_arrivals(
    requests: Iterable[PlannedRequest], rate_per_s: float, seed: int
) -> list[PlannedRequest]:
    """Spread requests over time as an open loop: gaps are exponential with mean 1 / rate."""
    random = Random(seed)
    planned: list[PlannedRequest] = []
    at_s = 0.0
    for request in requests:
        planned.append(replace(request, at_s=at_s))
        at_s += random.expovariate(rate_per_s)
    return planned


def at_mean_rate(requests: Sequence[PlannedRequest], rate_per_s: float) -> list[PlannedRequest]:
    """Stretch the gaps between arrivals, the first of them now, until their mean is 1 / rate.

    Takes requests in the order of their arrival. Raises ConfigError if all arrive at once.
    """
    first_s, last_s = requests[0].at_s, requests[-1].at_s
    if first_s == last_s:
        raise ConfigError(
            f"{len(requests)} requests that arrive at once have no gaps to scale to a rate of "
            f"{rate_per_s} a second. Take more of the trace, or leave out the rate."
        )
    scale = (len(requests) - 1) / rate_per_s / (last_s - first_s)
    return [replace(request, at_s=(request.at_s - first_s) * scale) for request in requests]


def read_trace(
    path: Path,
    vocabulary: Vocabulary,
    *,
    speed: float,
    num_requests: int | None,
    max_input_tokens: int,
    max_output_tokens: int,
    seed: int,
) -> list[PlannedRequest]:
    """Plan the requests of a trace file (see bench/traces/README.md), `speed` times as fast.

    Longer prompts and outputs are cut to the given limits. Raises ConfigError with the line.
    """
    planned: list[PlannedRequest] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if num_requests is not None and len(planned) == num_requests:
                break
            try:
                at_s, num_input, num_output, hash_ids = _trace_entry(line)
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise ConfigError(
                    f"{path}:{number}: a line of a trace needs timestamp, input_length and "
                    f"output_length as numbers, and hash_ids, if it has any, as a list ({error!r})"
                ) from error
            at_s /= speed
            prompt = _trace_prompt(
                min(max(num_input, 1), max_input_tokens), hash_ids, vocabulary, seed, number
            )
            output_tokens = min(max(num_output, 1), max_output_tokens)
            is_cut = num_input > max_input_tokens or num_output > max_output_tokens
            planned.append(PlannedRequest(at_s, prompt, output_tokens, is_cut))
    if not planned:
        raise ConfigError(f"the trace {path} has no requests")
    first_s = planned[0].at_s
    return [replace(request, at_s=request.at_s - first_s) for request in planned]


def _trace_entry(line: bytes) -> tuple[float, int, int, list[int]]:
    """Return the seconds, tokens of input and of output, and hash ids of a line."""
    entry = json.loads(line)
    at_s = float(entry["timestamp"]) / 1000
    if not math.isfinite(at_s):
        raise ValueError(f"timestamp is {at_s}")
    hash_ids = entry.get("hash_ids", [])
    if not isinstance(hash_ids, list):
        raise TypeError(f"hash_ids is {hash_ids!r}")
    return at_s, int(entry["input_length"]), int(entry["output_length"]), hash_ids


def _trace_prompt(
    num_tokens: int, hash_ids: Sequence[int], vocabulary: Vocabulary, seed: int, number: int
) -> tuple[int, ...]:
    """Make a prompt up; blocks with equal ids get equal content for the same seed."""
    blocks = (
        vocabulary.draw(Random(f"{seed} block {block}"), TRACE_BLOCK_TOKENS) for block in hash_ids
    )
    prompt = tuple(_take(blocks, num_tokens))
    rest = Random(seed * 1_000_003 + number)
    return prompt + vocabulary.draw(rest, num_tokens - len(prompt))


def _take(blocks: Iterable[tuple[int, ...]], count: int) -> Iterator[int]:
    for block in blocks:
        if count <= 0:
            return
        yield from block[:count]
        count -= len(block)
