"""Loads of `bench.compare`: what its --loads and --trace say, and the requests that follow."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from paceline.bench.load import (
    TRACES,
    PlannedRequest,
    Vocabulary,
    at_mean_rate,
    fixed_lengths,
    read_trace,
)
from paceline.errors import ConfigError

WARM_UP_INPUT_TOKENS, WARM_UP_OUTPUT_TOKENS = 64, 8


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """A load, ready to be sent."""

    name: str
    requests: list[PlannedRequest]
    """In the order of their arrival, at least one."""
    num_left_out: int
    """Requests of a trace that were too long."""

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest request, in and out."""
        return max(len(request.prompt) + request.max_tokens for request in self.requests)

    def warm_up(self) -> list[PlannedRequest]:
        """Plan a short run of the same kind: as many requests at once, one prompt as long.

        Prompts run backwards, so that none is in a prefix cache afterwards.
        """
        longest = max(self.requests, key=lambda request: len(request.prompt))
        return [
            PlannedRequest(
                0.0,
                request.prompt[::-1][: None if request is longest else WARM_UP_INPUT_TOKENS],
                min(request.max_tokens, WARM_UP_OUTPUT_TOKENS),
            )
            for request in self.requests
        ]


class Load(Protocol):
    """A load as it was asked for."""

    @property
    def name(self) -> str:
        """What it is called in results: as in the option."""

    def plan(self, vocabulary: Vocabulary, max_model_len: int | None, seed: int) -> PlannedLoad:
        """Make its requests up. Raises ConfigError for what cannot be had."""


@dataclass(frozen=True, slots=True)
class ClosedLoad:
    """Requests of equal lengths, all at once."""

    num_requests: int
    input_tokens: int
    output_tokens: int

    @property
    def name(self) -> str:
        return f"{self.num_requests}x{self.input_tokens}+{self.output_tokens}"

    def plan(self, vocabulary: Vocabulary, max_model_len: int | None, seed: int) -> PlannedLoad:
        num_tokens = self.input_tokens + self.output_tokens
        if max_model_len is not None and num_tokens > max_model_len:
            raise ConfigError(
                f"--loads has {self.name}, whose requests have {num_tokens} tokens, and "
                f"--max-model-len is {max_model_len}. Raise it, or leave the load out."
            )
        planned = fixed_lengths(
            self.num_requests, self.input_tokens, self.output_tokens, vocabulary, seed
        )
        return PlannedLoad(self.name, planned, num_left_out=0)


@dataclass(frozen=True, slots=True)
class TraceLoad:
    """The first requests of a trace, with its lengths."""

    trace: str
    """One of TRACES, or a file"""
    num_requests: int
    rate_per_s: float | None
    """Mean, the trace's gaps scaled to it; None: all at once"""

    @property
    def name(self) -> str:
        rate = "" if self.rate_per_s is None else f"@{self.rate_per_s:g}"
        return f"{self.trace}:{self.num_requests}{rate}"

    def plan(self, vocabulary: Vocabulary, max_model_len: int | None, seed: int) -> PlannedLoad:
        found = read_trace(
            self._path(),
            vocabulary,
            speed=1.0,
            num_requests=self.num_requests,
            max_input_tokens=sys.maxsize,
            max_output_tokens=sys.maxsize,
            seed=seed,
        )
        if len(found) < self.num_requests:
            raise ConfigError(
                f"--trace asks for {self.num_requests} requests of {self.trace}, which has "
                f"{len(found)}. Ask for fewer."
            )
        limit = max_model_len or sys.maxsize
        fitting = [p for p in found if len(p.prompt) + p.max_tokens <= limit]
        if not fitting:
            raise ConfigError(
                f"--trace has {self.name}, and none of its requests fits into --max-model-len, "
                f"which is {max_model_len}. Raise it, or leave the load out."
            )
        if self.rate_per_s is None:
            planned = [replace(request, at_s=0.0) for request in fitting]
        else:
            fitting.sort(key=lambda request: request.at_s)
            planned = at_mean_rate(fitting, self.rate_per_s)
        return PlannedLoad(self.name, planned, num_left_out=len(found) - len(fitting))

    def _path(self) -> Path:
        path = TRACES.get(self.trace, Path(self.trace))
        if not path.is_file():
            raise ConfigError(
                f"--trace names {self.trace!r}, which is neither a file nor one of "
                f"{', '.join(TRACES)}. Choose one of these."
            )
        return path


def parse_loads(text: str) -> list[ClosedLoad]:
    """Read 256x1024+256,1x8192+64: requests times tokens in and out."""
    loads = []
    for entry in filter(None, text.split(",")):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", entry)
        if match is None:
            raise ConfigError(
                f"--loads is {text!r}, and each must be REQUESTSxINPUT+OUTPUT, such as 8x1024+64; "
                f"{entry!r} is not."
            )
        loads.append(ClosedLoad(*map(int, match.groups())))
    return loads


def parse_traces(text: str) -> list[TraceLoad]:
    """Read azure-conversation:200@6.5,azure-conversation:200: with a mean rate, and at once."""
    loads = []
    for entry in filter(None, text.split(",")):
        match = re.fullmatch(r"(.+):([1-9]\d*)(?:@(\d+(?:\.\d+)?))?", entry)
        rate = float(match[3]) if match and match[3] else None
        if match is None or rate == 0.0:
            raise ConfigError(
                f"--trace is {text!r}, and each must be TRACE:REQUESTS or TRACE:REQUESTS@RATE with "
                f"a rate over 0, such as azure-conversation:200@6.5; {entry!r} is not."
            )
        loads.append(TraceLoad(match[1], int(match[2]), rate))
    return loads


def plan_loads(
    loads: str, traces: str, vocabulary: Vocabulary, max_model_len: int | None, seed: int
) -> list[PlannedLoad]:
    """Plan all that --loads and --trace ask for. Raises ConfigError for what cannot be had.

    Each load has a seed of its own: no prompt begins like one of an earlier load.
    """
    asked: Sequence[Load] = [*parse_loads(loads), *parse_traces(traces)]
    names = [load.name for load in asked]
    if not asked or len(set(names)) < len(names):
        raise ConfigError(
            f"--loads is {loads!r} and --trace is {traces!r}: together they must name at least one "
            "load, and none twice."
        )
    return [
        load.plan(vocabulary, max_model_len, seed + number) for number, load in enumerate(asked)
    ]
