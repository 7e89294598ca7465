"""Figures of `bench.compare`, as nested dicts of numbers for its JSON. Times are seconds."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from paceline.bench.compared_loads import PlannedLoad
from paceline.bench.record import Limits, RequestRecord, summarize

DISTRIBUTIONS = ("ttft", "tpot", "itl", "e2e")


def load_figures(load: PlannedLoad, records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Work out what a side did with a load. What there is not, such as a TPOT of one token, is not
    named.

    Raises RuntimeError unless every request got all its tokens.
    """
    _check_complete(load, records)
    summary = summarize(records, Limits())
    distributions = {
        name: asdict(found)
        for name in DISTRIBUTIONS
        if (found := summary.distributions[name]) is not None
    }
    step_s = decode_step_s(records)
    return {
        "num_requests": len(records),
        "num_left_out": load.num_left_out,
        "duration_s": summary.duration_s,
        "output_tokens_per_s": summary.output_tokens_per_s,
        "requests_per_s": summary.requests_per_s,
        "num_resumed": summary.num_resumed,
        **({} if step_s is None else {"decode_step_s": step_s}),
        **distributions,
    }


def _check_complete(load: PlannedLoad, records: Sequence[RequestRecord]) -> None:
    planned = load.requests
    failed = [record.error for record in records if record.error]
    short = [
        f"{record.num_output_tokens} of {request.max_tokens}"
        for record, request in zip(records, planned, strict=False)
        if record.num_output_tokens != request.max_tokens
    ]
    if failed or short or len(records) != len(planned):
        raise RuntimeError(
            f"{load.name}: {len(records)} of {len(planned)} requests were answered, {len(failed)} "
            f"failed ({failed[:1]}), {len(short)} have not all their tokens ({short[:5]})"
        )


def decode_step_s(records: Sequence[RequestRecord]) -> float | None:
    """Return the median gap between tokens while all requests decode together: after the last
    one's first token, until the first one ends. None if they never do.
    """
    begin = max(record.token_times_s[0] for record in records)
    end = min(record.token_times_s[-1] for record in records)
    gaps = [
        later - earlier
        for record in records
        for earlier, later in itertools.pairwise(record.token_times_s)
        if earlier >= begin and later <= end
    ]
    return statistics.median(gaps) if gaps else None


def median_figures(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Take the median of each figure that all rounds have."""
    first, *others = rounds
    return {
        key: median_figures([found[key] for found in rounds])
        if isinstance(value, Mapping)
        else statistics.median(found[key] for found in rounds)
        for key, value in first.items()
        if all(key in found for found in others)
    }


def ratio_figures(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Divide each figure that both have by theirs, but for those that are 0 there."""
    return {
        key: ratio_figures(value, theirs[key])
        if isinstance(value, Mapping)
        else value / theirs[key]
        for key, value in ours.items()
        if theirs.get(key)
    }
