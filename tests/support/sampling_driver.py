"""Samples rows with the kernels, and with the sampler on the CPU, which says what is right."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from triton_device import device, poisoned

from paceline.engine.cpu.sampler import Sampler
from paceline.engine.gpu.slot_words import encode_starts
from paceline.engine.step_plan import SlotStart
from paceline.kernels.sampling_slots_triton import SamplingSlots, start_slots_triton
from paceline.kernels.sampling_triton import SampledRows, SamplingWorkspace, sample_triton
from paceline.sampling_params import SamplingParams

EOS = (2, 3)
MAX_EDITS = 8


@dataclasses.dataclass
class Case:
    """One row: its parameters and what came before."""

    sampling: SamplingParams
    prompt: tuple[int, ...] = (0,)
    output: tuple[int, ...] = ()
    choice: int = 0


class SamplingDriver:
    """Samples the same cases with the kernels, and with the sampler on the CPU."""

    def __init__(
        self,
        cases: Sequence[Case],
        vocab_size: int,
        tile: int = 64,
        max_listed: int = 64,
        chunk: int = 8,
        max_short: int = 16,
    ) -> None:
        self.cases, self.vocab_size, self.tile = cases, vocab_size, tile
        num = len(cases)
        self.slots = SamplingSlots.allocate(num, vocab_size, MAX_EDITS, device())
        self.workspace = SamplingWorkspace.allocate(
            num, vocab_size, device(), tile, max_listed, chunk, max_short
        )
        for tensor in self.workspace:
            tensor.fill_(math.nan if tensor.is_floating_point() else -(2**30))
        self.sampler = Sampler(num, vocab_size, EOS, "cpu")
        starts = [
            SlotStart(
                slot,
                case.sampling,
                case.choice,
                np.array(case.prompt, np.int32),
                np.array(case.output, np.int32),
            )
            for slot, case in enumerate(cases)
        ]
        words = encode_starts(starts, vocab_size, EOS, MAX_EDITS)
        start_slots_triton(torch.from_numpy(words).to(device()), num, self.slots)
        for start in starts:
            self.sampler.start(start)

    def sample(
        self,
        logits: torch.Tensor,
        indices: Sequence[int],
        allowed_mask: torch.Tensor | None = None,
        row_slots: Sequence[int] | None = None,
        any_random: bool = True,
        any_filtered: bool = True,
    ) -> SampledRows:
        out = SampledRows(
            torch.full((len(logits),), -7, dtype=torch.int32, device=device()),
            torch.full((len(logits),), -7, dtype=torch.int32, device=device()),
            poisoned((len(logits),), torch.float32),
        )
        row_slots = range(len(logits)) if row_slots is None else row_slots
        sample_triton(
            logits.to(device()),
            torch.tensor(list(row_slots), dtype=torch.int32, device=device()),
            torch.tensor(list(indices), dtype=torch.int32, device=device()),
            self.slots,
            out,
            self.workspace,
            allowed_mask=None if allowed_mask is None else allowed_mask.to(device()),
            any_random=any_random,
            any_filtered=any_filtered,
            tile=self.tile,
        )
        return out

    def expected(
        self,
        logits: torch.Tensor,
        indices: Sequence[int],
        allowed_mask: torch.Tensor | None = None,
    ) -> list[int]:
        slots = np.arange(len(logits), dtype=np.int32)
        result = self.sampler.sample(logits, slots, np.array(indices, np.int32), allowed_mask)
        tokens: list[int] = result.token_ids.tolist()
        return tokens


def make_logits(seed: int, num_rows: int, vocab_size: int, scale: float) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(num_rows, vocab_size)).astype(np.float32) * scale)
