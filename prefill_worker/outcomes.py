"""What the prefill scheduler answers."""

from dataclasses import dataclass
from typing import Generic, NamedTuple

from paceline.engine.chunking import ChunkTime
from paceline.prefill_worker.prompt import SessionT
from paceline.request import AttemptKey, FinishReason, TopLogprobs


class Accepted(NamedTuple):
    """The worker computes this prompt; it has all its blocks."""

    cached_tokens: int
    """Tokens from the front whose KV is final already."""
    block_ids: tuple[int, ...]
    """All blocks of the context."""


class Refused(NamedTuple):
    """The worker has forgotten this work already."""

    message: str


@dataclass(frozen=True, slots=True)
class FirstSample:
    """The token that prefill samples for one choice."""

    choice: int
    stream_id: int
    index: int
    token_id: int
    finish_reason: FinishReason | None
    """Why the choice ends with this token; None: decode goes on from it."""
    logprobs: TopLogprobs | None


class PromptProgress(NamedTuple):
    """Tokens of a prompt, from the front, whose KV is final."""

    key: AttemptKey
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class PrefillDone(Generic[SessionT]):
    """A prompt whose KV is final. Its blocks stay referenced until `release`."""

    key: AttemptKey
    session: SessionT
    num_tokens: int
    first_samples: tuple[FirstSample, ...]
    """Of the choices that were not cancelled."""
    chunk_times: tuple[ChunkTime, ...]


class PrefillFailed(NamedTuple, Generic[SessionT]):
    """A prompt from whose logits no token could be chosen; the scheduler has forgotten it."""

    key: AttemptKey
    session: SessionT
    message: str


@dataclass(frozen=True, slots=True, eq=False)
class PrefillStep(Generic[SessionT]):
    """What an applied step brought."""

    progressed: tuple[PromptProgress, ...]
    """Prompts with further chunks to come."""
    completed: tuple[PrefillDone[SessionT], ...]
    failed: tuple[PrefillFailed[SessionT], ...] = ()


class PrefillLoad(NamedTuple):
    """What the worker can still take."""

    credit_blocks: int
    credit_sequences: int
    """Free slots; a request takes one a choice."""
    num_running: int
    num_pending_tokens: int
