"""The load that the options of `paceline bench` choose: made for a model, and sent."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from paceline.bench.client import LoadClient
from paceline.bench.load import (
    PlannedRequest,
    Vocabulary,
    fixed_lengths,
    poisson_arrivals,
    read_trace,
)
from paceline.bench.progress import shown_progress
from paceline.bench.record import RequestRecord
from paceline.errors import ConfigError


class LoadKind(StrEnum):
    """How requests arrive."""

    CLOSED = "closed"
    OPEN = "open"
    TRACE = "trace"


class SentLoad(NamedTuple):
    """What was sent, and what came of it."""

    planned: list[PlannedRequest]
    records: list[RequestRecord]


@dataclass(frozen=True, slots=True)
class ChosenLoad:
    """The options, of which each kind of load uses some."""

    kind: LoadKind
    requests: int
    concurrency: int
    rate: float
    input_tokens: int
    output_tokens: int
    trace: Path
    speed: float
    max_input_tokens: int | None
    seed: int

    def plan(self, vocabulary: Vocabulary, max_model_len: int) -> list[PlannedRequest]:
        """Make the requests up; raises ConfigError if the model is too short for them."""
        if self.kind is LoadKind.TRACE:
            return self._trace(vocabulary, max_model_len)
        if self.input_tokens + self.output_tokens > max_model_len:
            raise ConfigError(
                f"--input-tokens {self.input_tokens} and --output-tokens {self.output_tokens} are "
                f"more than the model's length, {max_model_len}"
            )
        planned = fixed_lengths(
            self.requests, self.input_tokens, self.output_tokens, vocabulary, self.seed
        )
        if self.kind is LoadKind.OPEN:
            return poisson_arrivals(planned, self.rate, self.seed)
        return planned

    async def send(self, address: str, timeout_s: float) -> SentLoad:
        """Send the load to a router, showing progress on stderr."""
        async with LoadClient(address, timeout_s=timeout_s) as client:
            planned = self.plan(*await client.vocabulary())
            async with shown_progress(len(planned), Console(stderr=True)) as on_end:
                if self.kind is LoadKind.CLOSED:
                    records = await client.closed_loop(planned, self.concurrency, on_end)
                else:
                    records = await client.open_loop(planned, on_end)
            return SentLoad(planned, records)

    def _trace(self, vocabulary: Vocabulary, max_model_len: int) -> list[PlannedRequest]:
        longest = max_model_len - self.output_tokens
        if longest < 1:
            raise ConfigError(
                f"--output-tokens {self.output_tokens} leaves no room for a prompt: the model's "
                f"length is {max_model_len}"
            )
        return read_trace(
            self.trace,
            vocabulary,
            speed=self.speed,
            num_requests=self.requests,
            max_input_tokens=min(self.max_input_tokens or max_model_len, longest),
            max_output_tokens=self.output_tokens,
            seed=self.seed,
        )
