"""Choose the next token of each sequence on a GPU: the tokens of the sampler on CPUs.

    upload    encode_starts on the host, start on the device         when sequences take slots
    step      sample; then logprobs, if some slot wants any          in the stream's order
    copy      result_words to the host                               in the stream's order
    results   tokens from the host's copy, or an error               when that copy has arrived

Everything has one address from the beginning. What a step needs of a slot is read on the device as
the step runs, so a slot can be given away while an earlier step is unfinished.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from paceline.engine.gpu.slot_words import encode_starts
from paceline.engine.sampling_rules import (
    check_start,
    check_vocab_size,
    none_allowed,
    not_finite,
)
from paceline.engine.step_plan import Int32Array, SlotStart
from paceline.errors import IntegrityError
from paceline.kernels.logprobs_triton import LogprobsWorkspace, TokenLogprobs, logprobs_triton
from paceline.kernels.sampling_finish_triton import (
    STATUS_NONE_ALLOWED,
    STATUS_NOT_FINITE,
    STATUS_OK,
)
from paceline.kernels.sampling_slots_triton import START, SamplingSlots, start_slots_triton
from paceline.kernels.sampling_triton import SampledRows, SamplingWorkspace, sample_triton
from paceline.request import TopLogprobs
from paceline.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKEN_IDS

_SAMPLE_WORDS = 3
_LOGPROBS_WORDS = 2 + 2 * MAX_LOGPROBS


class SamplingKind(NamedTuple):
    """Which kernels of sampling a step needs; the others would only find that they are not."""

    any_random: bool
    """Some slot does not take the likeliest token always."""
    any_filtered: bool
    """Some slot draws at random within top_k or top_p."""


SAMPLING_KINDS = (
    SamplingKind(False, False),
    SamplingKind(True, False),
    SamplingKind(True, True),
)


class StepSamples(NamedTuple):
    """What a step sampled, on the host."""

    token_ids: Int32Array
    """[S]"""
    logprobs: dict[int, TopLogprobs]
    """By sample number, only of the slots whose parameters ask for them."""
    failures: dict[int, str]
    """By sample number: why it has no token; its token id is 0."""


class GpuSampler:
    """Samples for slots 0 to max_num_slots - 1. Used by the engine thread alone, on one stream."""

    def __init__(
        self,
        max_num_slots: int,
        max_num_samples: int,
        vocab_size: int,
        logits_dtype: torch.dtype,
        eos_token_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        """max_num_samples: rows of a step at most."""
        check_vocab_size(vocab_size)
        self._max_num_slots = max_num_slots
        self.max_num_samples = max_num_samples
        self._vocab_size = vocab_size
        self._logits_dtype = logits_dtype
        self._eos_token_ids = tuple(eos_token_ids)
        self._max_edits = MAX_LOGIT_BIAS + MAX_STOP_TOKEN_IDS + len(self._eos_token_ids)
        self._slots = SamplingSlots.allocate(max_num_slots, vocab_size, self._max_edits, device)
        self._workspace = SamplingWorkspace.allocate(max_num_samples, vocab_size, device)
        self._logprobs_workspace = LogprobsWorkspace.allocate(
            max_num_samples, vocab_size, MAX_LOGPROBS, device
        )
        self._words = torch.zeros(self.num_result_words, dtype=torch.int32, device=device)
        self._sampled = _sampled_rows(self._words, max_num_samples)
        self._logprobs = _token_logprobs(self._words, max_num_samples)
        # Per slot, of the steps to come.
        self._is_random = np.zeros(max_num_slots, np.bool_)
        self._is_filtered = np.zeros(max_num_slots, np.bool_)
        self._wants_logprobs = np.zeros(max_num_slots, np.bool_)

    @property
    def num_bytes(self) -> int:
        """Device memory that it holds, the same at all times."""
        tensors = (*self._slots, *self._workspace, *self._logprobs_workspace, self._words)
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def num_result_words(self) -> int:
        """Words of a host's copy at most."""
        return (_SAMPLE_WORDS + _LOGPROBS_WORDS) * self.max_num_samples

    def compile_kernels(self) -> None:
        """Compile every kernel now, by launching each for a row and a start without a slot."""
        device = self._words.device
        logits = torch.zeros((1, self._vocab_size), dtype=self._logits_dtype, device=device)
        no_slot = torch.full((1,), -1, dtype=torch.int32, device=device)
        for kind in SAMPLING_KINDS:
            self.sample(logits, no_slot, no_slot, kind)
        self.logprobs(logits, no_slot)
        words = np.zeros(1, START)
        words["slot"] = -1
        self.start(torch.from_numpy(words.view(np.int32)).to(device), 1)

    def encode_starts(self, starts: Sequence[SlotStart]) -> Int32Array:
        """Return the words by which `start` gives slots to sequences, which may have output.

        Called for each step's starts in order, as `kind_of` and its like are of the slots as they
        are from then on. Raises ValueError, with nothing changed, for what cannot be started.
        """
        for start in starts:
            check_start(start, self._max_num_slots)
            num_logprobs = start.sampling.logprobs or 0
            if num_logprobs > MAX_LOGPROBS:
                raise ValueError(
                    f"slot {start.slot} wants the log-probabilities of {num_logprobs} tokens, at "
                    f"most {MAX_LOGPROBS} are allowed"
                )
        words = encode_starts(starts, self._vocab_size, self._eos_token_ids, self._max_edits)
        for start in starts:
            sampling = start.sampling
            self._is_random[start.slot] = not sampling.is_greedy
            self._is_filtered[start.slot] = not sampling.is_greedy and (
                sampling.top_p < 1.0 or 0 < sampling.top_k < self._vocab_size
            )
            self._wants_logprobs[start.slot] = start.sampling.logprobs is not None
        return words

    def start(self, words: torch.Tensor, num_starts: int) -> None:
        """Give slots to sequences; `words` are those of `encode_starts`, on the device."""
        start_slots_triton(words, num_starts, self._slots)

    def kind_of(self, slots: Int32Array) -> SamplingKind:
        """Say what sampling these slots takes."""
        return SamplingKind(
            bool(self._is_random[slots].any()), bool(self._is_filtered[slots].any())
        )

    def wants_logprobs(self, slots: Int32Array) -> bool:
        """Whether a step that samples these slots needs `logprobs`."""
        return bool(self._wants_logprobs[slots].any())

    def sample(
        self,
        logits: torch.Tensor,
        row_slots: torch.Tensor,
        indices: torch.Tensor,
        kind: SamplingKind,
    ) -> SampledRows:
        """Sample one token a row and count it into its slot; can be captured in a graph.

        `logits` is [S, V] with rows of any stride and is not changed; `row_slots` and `indices`
        (output index) are int32 [S] on the device. A row of slot -1 does nothing. A slot with
        penalties has one row. `kind` takes no less than `kind_of` the slots. Returns views of the
        results, which the next call overwrites; a token that could not be sampled is -1.
        """
        if logits.dtype != self._logits_dtype:
            raise ValueError(f"logits are {logits.dtype}, the sampler's {self._logits_dtype}")
        sample_triton(
            logits,
            row_slots,
            indices,
            self._slots,
            self._sampled,
            self._workspace,
            any_random=kind.any_random,
            any_filtered=kind.any_filtered,
        )
        return SampledRows(*(tensor[: len(logits)] for tensor in self._sampled))

    def logprobs(self, logits: torch.Tensor, row_slots: torch.Tensor) -> None:
        """Compute what the slots want of the rows that `sample` sampled last, the same ones."""
        logprobs_triton(
            logits,
            self._sampled.token_ids[: len(logits)],
            row_slots,
            self._slots,
            self._logprobs,
            self._logprobs_workspace,
        )

    def result_words(self, *, with_logprobs: bool) -> torch.Tensor:
        """Return the words to copy to the host, int32 on the device, always the same memory.

        with_logprobs: `logprobs` was called in this step.
        """
        words = _SAMPLE_WORDS * self.max_num_samples
        return self._words if with_logprobs else self._words[:words]

    def results(
        self, words: torch.Tensor, slots: Int32Array, *, with_logprobs: bool
    ) -> StepSamples:
        """Return what a step sampled for `slots`, its first rows.

        `words` begin with the host's copy of `result_words`; they may be overwritten afterwards.
        A row fails alone when it has no largest finite logit or no allowed token.
        """
        sampled, num_samples = _sampled_rows(words, self.max_num_samples), len(slots)
        (wrong,) = np.nonzero(sampled.status[:num_samples].numpy() != STATUS_OK)
        failures = {row: self._failure(sampled, row, int(slots[row])) for row in wrong.tolist()}
        token_ids: Int32Array = sampled.token_ids[:num_samples].numpy().copy()
        token_ids[wrong] = 0
        logprobs = {}
        if with_logprobs:
            top = _top_logprobs(_token_logprobs(words, self.max_num_samples), num_samples)
            logprobs = {row: found for row, found in top.items() if row not in failures}
        return StepSamples(token_ids, logprobs, failures)

    def _failure(self, sampled: SampledRows, row: int, slot: int) -> str:
        status = int(sampled.status[row])
        if status == STATUS_NOT_FINITE:
            return not_finite(float(sampled.largest[row]))
        if status == STATUS_NONE_ALLOWED:
            return none_allowed(self._vocab_size)
        raise IntegrityError(
            f"the draw for slot {slot} gave none of the {self._vocab_size} tokens, or was not made "
            "as its parameters want: a defect of the sampler"
        )


def _sampled_rows(words: torch.Tensor, num_rows: int) -> SampledRows:
    """View the first words as what `sample` writes."""
    token_ids, status, largest = words[: _SAMPLE_WORDS * num_rows].view(_SAMPLE_WORDS, -1)
    return SampledRows(token_ids, status, largest.view(torch.float32))


def _token_logprobs(words: torch.Tensor, num_rows: int) -> TokenLogprobs:
    """View the words behind them as what `logprobs` writes."""
    wide = MAX_LOGPROBS * num_rows
    start = _SAMPLE_WORDS * num_rows
    end = start + _LOGPROBS_WORDS * num_rows
    sizes = [num_rows, num_rows, wide, wide]
    counts, own, values, token_ids = torch.split(words[start:end], sizes)
    return TokenLogprobs(
        counts,
        own.view(torch.float32),
        values.view(torch.float32).view(num_rows, MAX_LOGPROBS),
        token_ids.view(num_rows, MAX_LOGPROBS),
    )


def _top_logprobs(logprobs: TokenLogprobs, num_samples: int) -> dict[int, TopLogprobs]:
    counts, own, values, token_ids = (tensor[:num_samples].numpy() for tensor in logprobs)
    return {
        row: TopLogprobs(
            float(own[row]),
            tuple(token_ids[row, : counts[row]].tolist()),
            tuple(values[row, : counts[row]].tolist()),
        )
        for row in np.flatnonzero(counts >= 0).tolist()
    }
