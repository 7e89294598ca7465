"""What one request of a load met, and the figures that follow from it. Times are seconds."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from paceline.bench.load import PlannedRequest
from paceline.request import PhaseTimes, Span


@dataclass(slots=True)
class RequestRecord:
    """One request, as its client saw it. Moments are Unix seconds, to fit the timeline."""

    request_id: str
    prompt_tokens: int
    max_tokens: int
    scheduled_s: float
    """When the load wanted it to be sent."""
    sent_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    """Arrival of each output token; tokens of one message share a time."""
    ended_s: float = 0.0
    error: str = ""
    """gRPC status and message; empty when all went well."""
    cached_tokens: int = 0
    resumed: int = 0
    phases: PhaseTimes = field(default_factory=PhaseTimes)
    timeline: list[Span] = field(default_factory=list)

    @classmethod
    def due(cls, planned: PlannedRequest, request_id: str, start_s: float) -> Self:
        """Begin the record of a request of a load that starts at `start_s`.

        It counts as sent when it was due: what a busy engine takes to accept it is in its TTFT.
        """
        due_s = start_s + planned.at_s
        return cls(request_id, len(planned.prompt), planned.max_tokens, due_s, due_s)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_times_s)

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.token_times_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None when there is only one."""
        if self.num_output_tokens < 2:
            return None
        span = self.token_times_s[-1] - self.token_times_s[0]
        return span / (self.num_output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Gaps between tokens."""
        times = self.token_times_s
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.sent_s

    @property
    def succeeded(self) -> bool:
        return not self.error and bool(self.token_times_s)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must meet to count as good. None: no limit."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def are_met(self, record: RequestRecord) -> bool:
        if not record.succeeded:
            return False
        pairs = (
            (self.ttft_s, record.ttft_s),
            (self.tpot_s, record.tpot_s),
            (self.e2e_s, record.e2e_s),
        )
        return all(limit is None or value is None or value <= limit for limit, value in pairs)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Mean and percentiles of some seconds."""

    mean: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Distribution | None":
        """None when there are no values."""
        if not values:
            return None
        ordered = sorted(values)

        def percentile(share: float) -> float:
            # Nearest rank: always a value that was seen.
            return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

        return cls(
            sum(ordered) / len(ordered), percentile(0.50), percentile(0.95), percentile(0.99)
        )


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """The figures of a whole load."""

    num_requests: int
    num_failed: int
    duration_s: float
    """From the first request sent to the last one ended."""
    output_tokens_per_s: float
    input_tokens_per_s: float
    requests_per_s: float
    goodput_per_s: float
    """Requests a second that met every limit."""
    good_share: float
    num_resumed: int
    num_prompt_tokens: int
    """Of the requests that succeeded, as the next."""
    num_cached_tokens: int
    """Those of them whose KV was in a prefix cache."""
    num_shared_tokens: int
    """Tokens at the front of all prompts that the load itself repeats: these may well be cached."""
    cached_share: float
    shared_share: float
    distributions: dict[str, Distribution | None]
    """TTFT, TPOT, ITL, E2E and the phases, by name."""


def summarize(
    records: Sequence[RequestRecord], limits: Limits, *, num_shared_tokens: int = 0
) -> LoadSummary:
    """Work out the figures; failed requests count in the rates' time and in no distribution."""
    good = [record for record in records if record.succeeded]
    start = min((record.sent_s for record in records), default=0.0)
    end = max((record.ended_s for record in records), default=0.0)
    duration = max(end - start, 1e-9)
    num_prompt_tokens = sum(record.prompt_tokens for record in good)
    num_cached_tokens = sum(record.cached_tokens for record in good)
    num_good = sum(limits.are_met(record) for record in records)
    distributions = {
        "ttft": Distribution.of([record.ttft_s for record in good]),
        "tpot": Distribution.of([tpot for r in good if (tpot := r.tpot_s) is not None]),
        "itl": Distribution.of([gap for record in good for gap in record.itl_s]),
        "e2e": Distribution.of([record.e2e_s for record in good]),
        "queue": Distribution.of([record.phases.queue_s for record in good]),
        "wait": Distribution.of([record.phases.wait_s for record in good]),
        "prefill": Distribution.of([record.phases.prefill_s for record in good]),
        "router": Distribution.of([record.phases.router_s for record in good]),
        "kv_transfer": Distribution.of([record.phases.kv_transfer_s for record in good]),
        "decode": Distribution.of([record.phases.decode_s for record in good]),
    }
    return LoadSummary(
        num_requests=len(records),
        num_failed=len(records) - len(good),
        duration_s=duration,
        output_tokens_per_s=sum(record.num_output_tokens for record in records) / duration,
        input_tokens_per_s=num_prompt_tokens / duration,
        requests_per_s=len(good) / duration,
        goodput_per_s=num_good / duration,
        good_share=num_good / max(len(records), 1),
        num_resumed=sum(record.resumed for record in records),
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=num_cached_tokens,
        num_shared_tokens=num_shared_tokens,
        cached_share=num_cached_tokens / max(num_prompt_tokens, 1),
        shared_share=num_shared_tokens / max(sum(r.prompt_tokens for r in records), 1),
        distributions=distributions,
    )
