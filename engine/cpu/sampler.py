"""Choose the next token of each sequence in a batch.

A token is a function of (logits, parameters, prompt, output so far, seed, choice, index) and of
nothing else: neither the rows beside it nor the worker's past matter. What penalties need of
prompt and output is kept in the sequence's slot, counted up with every token sampled, and rebuilt
when a sequence starts with output. The order of changes to the logits is vLLM's:

    allowed tokens -> logit_bias, min_tokens -> penalties -> temperature -> min_p -> top_k ->
    top_p -> draw

Log-probabilities reported are those of the logits as the model gave them, before all of this.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from paceline.engine.cpu.random_stream import RandomStreams
from paceline.engine.cpu.seen_tokens import SeenTokens
from paceline.engine.sampling_rules import (
    SMALLEST_TEMPERATURE,
    banned_token_ids,
    check_start,
    check_vocab_size,
    none_allowed,
    not_finite,
)
from paceline.engine.step_plan import Int32Array, SlotStart
from paceline.kernels.sampling import (
    ban_disallowed_,
    first_argmax,
    gumbel_race,
    lowest_kept,
)
from paceline.request import TopLogprobs
from paceline.sampling_params import SamplingParams


class SampledTokens(NamedTuple):
    """The tokens of one call."""

    token_ids: torch.Tensor
    """int32 [S], on the logits' device"""
    logprobs: dict[int, TopLogprobs]
    """By row, only of the slots whose parameters ask for them."""
    failures: dict[int, str]
    """By row: why it has no token; its token id is 0 and is not counted."""


class _Biases(NamedTuple):
    """What a slot adds to single logits."""

    token_ids: torch.Tensor
    """int64 [B]"""
    values: torch.Tensor
    """float32 [B]"""


class Sampler:
    """Samples for slots 0 to max_num_slots - 1. Used by the engine thread alone."""

    def __init__(
        self,
        max_num_slots: int,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        device: torch.device | str,
    ) -> None:
        check_vocab_size(vocab_size)
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._device = torch.device(device)
        self._max_num_slots = max_num_slots
        self._biases: dict[int, _Biases] = {}
        self._banned: dict[int, torch.Tensor] = {}
        self._seen_tokens = SeenTokens(max_num_slots, vocab_size, self._device)
        # Per slot, read for whole batches at once.
        self._is_plain = np.zeros(max_num_slots, np.bool_)  # greedy over the logits as they are
        self._is_special = np.zeros(max_num_slots, np.bool_)  # has an entry in the dicts above
        self._wants_logprobs = np.zeros(max_num_slots, np.bool_)
        self._num_logprobs = np.zeros(max_num_slots, np.int64)
        self._min_tokens = np.zeros(max_num_slots, np.int64)
        self._choices = np.zeros(max_num_slots, np.int64)
        self._seeds = np.zeros(max_num_slots, np.uint64)
        self._top_k = np.zeros(max_num_slots, np.int64)
        self._temperature, self._top_p, self._min_p = np.ones((3, max_num_slots), np.float64)

    def start(self, slot_start: SlotStart) -> None:
        """Give a slot to a sequence, which may have output already; forget the slot's last one."""
        check_start(slot_start, self._max_num_slots)
        slot, sampling = slot_start.slot, slot_start.sampling
        self._wants_logprobs[slot] = sampling.logprobs is not None
        self._num_logprobs[slot] = sampling.logprobs or 0
        self._min_tokens[slot] = sampling.min_tokens
        self._choices[slot] = slot_start.choice
        self._seeds[slot] = sampling.seed or 0
        self._temperature[slot] = sampling.temperature
        self._top_k[slot] = sampling.top_k
        self._top_p[slot] = sampling.top_p
        self._min_p[slot] = sampling.min_p
        self._start_special(slot, sampling)
        has_penalties = self._seen_tokens.start(slot_start)
        special = bool(self._is_special[slot])
        self._is_plain[slot] = sampling.is_greedy and not special and not has_penalties

    def _start_special(self, slot: int, sampling: SamplingParams) -> None:
        self._biases.pop(slot, None)
        self._banned.pop(slot, None)
        if sampling.logit_bias:
            token_ids, values = zip(*sampling.logit_bias, strict=True)
            self._biases[slot] = _Biases(
                torch.tensor(token_ids, dtype=torch.int64, device=self._device),
                torch.tensor(values, dtype=torch.float32, device=self._device),
            )
        banned = banned_token_ids(sampling, self._eos_token_ids)
        if banned:
            self._banned[slot] = torch.tensor(banned, dtype=torch.int64, device=self._device)
        self._is_special[slot] = slot in self._biases or slot in self._banned

    def sample(
        self,
        logits: torch.Tensor,
        slots: Int32Array,
        indices: Int32Array,
        allowed_mask: torch.Tensor | None = None,
    ) -> SampledTokens:
        """Sample one token a row and count it into its slot's state.

        `logits` is [S, V] of any float dtype and is not changed; `slots` and `indices` (output
        index) are [S] on the CPU. `allowed_mask` is int32 [S, ceil(V / 32)]: token t of a row is
        allowed if bit t % 32 of its word t // 32 is 1. A slot has one row, unless its token
        depends on nothing that another row of the call changes (penalties do). A row fails alone
        when it has no largest finite logit or no allowed token.
        """
        if tuple(logits.shape) != (len(slots), self._vocab_size) or len(indices) != len(slots):
            raise ValueError(
                f"got logits {list(logits.shape)} for {len(slots)} slots and "
                f"{len(indices)} indices, expected [{len(slots)}, {self._vocab_size}]"
            )
        chosen = first_argmax(logits)
        failures = _rows_not_finite(logits, chosen)
        shaped = ~self._is_plain[slots] | (allowed_mask is not None)
        shaped[list(failures)] = False
        if (rows := np.flatnonzero(shaped)).size:
            allowed = None if allowed_mask is None else _take(allowed_mask, rows)
            tokens, has_some = self._choose_shaped(
                _take(logits, rows), slots[rows], indices[rows], allowed
            )
            chosen[_index(rows, logits)] = tokens
            failures |= {row: none_allowed(self._vocab_size) for row in rows[~has_some].tolist()}
        good = np.ones(len(slots), np.bool_)
        if failures:
            good[list(failures)] = False
            chosen[_index(np.flatnonzero(~good), logits)] = 0
        counted = np.flatnonzero(good)
        self._seen_tokens.count(slots[counted], _take(chosen, counted))
        logprobs = self._logprobs(logits, slots, chosen, good)
        return SampledTokens(chosen.to(torch.int32), logprobs, failures)

    def _choose_shaped(
        self,
        logits: torch.Tensor,
        slots: Int32Array,
        indices: Int32Array,
        allowed: torch.Tensor | None,
    ) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        """Choose for rows that are not plain; say of each whether it has an allowed token.

        `logits` are finite; they are a copy and may be changed.
        """
        scores = logits.to(torch.float32)
        if allowed is not None:
            ban_disallowed_(scores, allowed)
        self._apply_special_(scores, slots, indices)
        self._seen_tokens.penalise_(scores, slots)
        chosen = first_argmax(scores)
        best = scores.gather(1, chosen.unsqueeze(1))
        has_some: npt.NDArray[np.bool_] = (best > -torch.inf).squeeze(1).cpu().numpy()
        rows = np.flatnonzero((self._temperature[slots] > 0.0) & has_some)
        if rows.size:
            if rows.size < len(slots):
                scores, best = _take(scores, rows), _take(best, rows)
            # The best score becomes 0 before the division, so that no temperature overflows.
            chosen[_index(rows, scores)] = self._draw(scores.sub_(best), slots[rows], indices[rows])
        return chosen, has_some

    def _draw(self, scores: torch.Tensor, slots: Int32Array, indices: Int32Array) -> torch.Tensor:
        """Draw a token of each row at random; the best score of each is 0."""
        temperature = np.maximum(self._temperature[slots], SMALLEST_TEMPERATURE).astype(np.float32)
        scores.div_(torch.from_numpy(temperature).to(scores.device).unsqueeze(1))
        floor = lowest_kept(scores, self._top_k[slots], self._top_p[slots], self._min_p[slots])
        streams = RandomStreams.of(self._seeds[slots], self._choices[slots], indices, scores.device)
        return gumbel_race(scores, floor, streams.gumbels)

    def _apply_special_(self, scores: torch.Tensor, slots: Int32Array, indices: Int32Array) -> None:
        for row in np.flatnonzero(self._is_special[slots]).tolist():
            slot = int(slots[row])
            biases = self._biases.get(slot)
            if biases is not None:
                scores[row].index_add_(0, biases.token_ids, biases.values)
            banned = self._banned.get(slot)
            if banned is not None and indices[row] < self._min_tokens[slot]:
                scores[row].index_fill_(0, banned, -torch.inf)

    def _logprobs(
        self,
        logits: torch.Tensor,
        slots: Int32Array,
        chosen: torch.Tensor,
        good: npt.NDArray[np.bool_],
    ) -> dict[int, TopLogprobs]:
        rows = np.flatnonzero(self._wants_logprobs[slots] & good)
        if not rows.size:
            return {}
        table = torch.log_softmax(_take(logits, rows).to(torch.float32), dim=-1)
        own = table.gather(1, _take(chosen, rows).unsqueeze(1)).squeeze(1).tolist()
        counts = self._num_logprobs[slots[rows]].tolist()
        best = table.topk(min(max(counts), self._vocab_size), dim=-1)
        values, token_ids = best.values.tolist(), best.indices.tolist()
        return {
            row: TopLogprobs(own[i], tuple(token_ids[i][:count]), tuple(values[i][:count]))
            for i, (row, count) in enumerate(zip(rows.tolist(), counts, strict=True))
        }


def _rows_not_finite(logits: torch.Tensor, largest: torch.Tensor) -> dict[int, str]:
    """Find the rows whose largest logit, at `largest`, is infinite or not a number."""
    # NaN and inf are larger than everything, so they are the largest of a row that has any.
    values = logits.gather(1, largest.unsqueeze(1)).squeeze(1)
    if bool(values.isfinite().all()):
        return {}
    rows = (~values.isfinite()).nonzero().squeeze(1).tolist()
    return {row: not_finite(values[row].item()) for row in rows}


def _index(rows: npt.NDArray[np.intp], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(rows).to(like.device)


def _take(tensor: torch.Tensor, rows: npt.NDArray[np.intp]) -> torch.Tensor:
    """Copy rows of a tensor, numbered on the CPU."""
    return tensor.index_select(0, _index(rows, tensor))
