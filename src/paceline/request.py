"""A request as every process knows it: work for workers, how it ends, where its time went."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from paceline.sampling_params import SamplingParams

TokenIds = npt.NDArray[np.int32]


class FinishReason(Enum):
    """Why a choice ended. The values are those of the wire (`paceline.v1.FinishReason`)."""

    STOP = 1
    """End-of-sequence, a stop token id or a stop string."""
    LENGTH = 2
    """max_tokens or the model's length."""


class TopLogprobs(NamedTuple):
    """Log-probabilities of one sample, of the unmodified logits."""

    logprob: float
    """Of the sampled token."""
    token_ids: tuple[int, ...]
    """The most likely tokens, most likely first."""
    logprobs: tuple[float, ...]


class FailureReason(Enum):
    """Why a worker gave an attempt back. The values are those of the wire (`FailureReason`)."""

    REFUSED = 1
    """No room: the router's view of the credit was out of date."""
    LEASE_LOST = 2
    """The KV could not be read and confirmed: owner gone, lease expired, transport failed."""
    PREEMPTED = 3
    """A running sequence gave its blocks to an older one."""
    DRAINING = 4
    """The worker is stopping and takes no new work."""
    PROMISE_EXPIRED = 5
    """Blocks were promised, but prefill made no progress in time."""
    INTERNAL = 6
    """A bug or a failing device; the message says which."""


class AttemptKey(NamedTuple):
    """One dispatch of a request. Attempts grow; messages of older ones are dropped everywhere."""

    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What a worker must know to compute a request's next tokens, whoever computed the earlier
    ones.

    One attempt covers all choices of a new request, or, after their first token, one choice alone.
    """

    key: AttemptKey
    choices: tuple[int, ...]
    """Numbers of the choices, part of the random stream's key."""
    stream_ids: tuple[int, ...]
    """One a choice: the router's short name of (attempt, choice) in step messages."""
    prompt: TokenIds
    """int32 [prompt tokens]"""
    output: TokenIds
    """int32 [output so far]; empty unless there is exactly one choice. Never part of the prompt."""
    sampling: SamplingParams
    """With the seed filled in and max_tokens not None."""
    tenant: str = ""
    """Root of the prefix cache's space: tenants never share blocks."""

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV must exist before the next token can be sampled."""
        return len(self.prompt) + len(self.output)

    @property
    def next_index(self) -> int:
        """Output index of the next token."""
        return len(self.output)


def num_blocks_for(num_tokens: int, block_tokens: int) -> int:
    return -(-num_tokens // block_tokens)


def num_blocks_promised(num_tokens: int, num_choices: int, block_tokens: int) -> int:
    """Blocks that admission promises: the context plus one growth block a choice.

    A partial last block is shared until each choice writes to it, so it counts once a choice.
    """
    whole, rest = divmod(num_tokens, block_tokens)
    return whole + num_choices * (1 + (rest > 0))


class Span(NamedTuple):
    """A stretch of a request's life on one process, for timelines. Unix seconds."""

    phase: str
    """queue, wait, prefill, router, kv_transfer or decode"""
    worker_id: str
    start_s: float
    end_s: float
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """Seconds a request spent in each phase; they overlap where the system overlaps them."""

    queue_s: float = 0.0
    """From arrival to (first) dispatch."""
    wait_s: float = 0.0
    """From dispatch to the first token, without `prefill_s` and `router_s`: the wait for a step
    at the worker, the way there and back, and earlier attempts that gave no token."""
    prefill_s: float = 0.0
    """From the start of the prompt's first chunk to the end of its last, by the worker's clock. If
    the worker did not report it: from dispatch to the first token, without `router_s`."""
    kv_transfer_s: float = 0.0
    """From the first read's start to the confirmation, at the decode worker."""
    decode_s: float = 0.0
    """From the first to the last token."""
    router_s: float = 0.0
    """How long the first token waited for the router, whose event loop was busy."""
