"""Sequences that start, as the words that `kernels.sampling_slots_triton` reads on the device."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from paceline.engine.sampling_rules import SMALLEST_TEMPERATURE, banned_token_ids, has_penalties
from paceline.engine.step_plan import Int32Array, SlotStart
from paceline.kernels.sampling_slots_triton import EDIT, START, SlotValues
from paceline.sampling_params import SamplingParams

Edits = npt.NDArray[np.void]
"""EDIT [number of edits]"""


def encode_starts(
    starts: Sequence[SlotStart], vocab_size: int, eos_token_ids: Sequence[int], max_edits: int
) -> Int32Array:
    """Return the words of all starts, int32 [words]; ValueError for more edits than fit a slot."""
    records = np.zeros(len(starts), START)
    parts = [records.view(np.int32)]
    first = len(parts[0])
    for number, start in enumerate(starts):
        edits = _edits(start, eos_token_ids, max_edits)
        values = _values(start, vocab_size, len(edits))
        num_prompt, num_output = len(start.prompt), len(start.output)
        records[number] = (start.slot, first, num_prompt, num_output, tuple(values))
        parts.append(edits.view(np.int32))
        if values.has_penalties:
            parts += (start.prompt, start.output)
            first += num_prompt + num_output
        first += 2 * len(edits)
    return np.concatenate(parts, dtype=np.int32)


def _values(start: SlotStart, vocab_size: int, num_edits: int) -> SlotValues:
    sampling = start.sampling
    temperature = sampling.temperature
    if not sampling.is_greedy:
        temperature = max(temperature, SMALLEST_TEMPERATURE)
    return SlotValues(
        temperature=temperature,
        lowest=math.log(sampling.min_p) if sampling.min_p > 0.0 else -math.inf,
        top_p=sampling.top_p,
        seed=sampling.seed or 0,
        top_k=sampling.top_k,
        choice=start.choice,
        min_tokens=sampling.min_tokens,
        num_biases=len(sampling.logit_bias),
        num_edits=num_edits,
        has_penalties=has_penalties(sampling),
        repetition=sampling.repetition_penalty,
        presence=sampling.presence_penalty,
        frequency=sampling.frequency_penalty,
        num_logprobs=-1 if sampling.logprobs is None else min(sampling.logprobs, vocab_size),
    )


def _edits(start: SlotStart, eos_token_ids: Sequence[int], max_edits: int) -> Edits:
    sampling: SamplingParams = start.sampling
    banned = banned_token_ids(sampling, eos_token_ids)
    edits = [*sampling.logit_bias, *((token, -math.inf) for token in banned)]
    if len(edits) > max_edits:
        raise ValueError(
            f"{len(sampling.logit_bias)} tokens with a bias and {len(banned)} that min_tokens bans "
            f"are more than the {max_edits} that fit slot {start.slot}"
        )
    return np.array(edits, EDIT)
