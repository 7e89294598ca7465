"""Which rows of a step decode, and the tiles of the rest."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from paceline.engine.model_config import ModelConfig
from paceline.engine.step_plan import StepPlan
from paceline.kernels.prefill_tiles import (
    PrefillTiles,
    choose_tiles,
    is_faster_specialized,
    make_tile_table,
    why_not_specialized,
)

LONGEST_CHUNKS = (16, 64, 1024, 1 << 20)
"""Tiles are chosen for a step's longest chunk rounded up to one of these: each is a compilation."""


class PrefillPlan(NamedTuple):
    """How a step's rows that do not decode are cut."""

    tiles: PrefillTiles
    entries: npt.NDArray[np.int32]
    """[N, 2]"""


class PrefillPlanner:
    """Cuts steps into tiles."""

    def __init__(self, config: ModelConfig, num_heads: int, kv: torch.Tensor) -> None:
        model = (num_heads, kv.shape[2], config.head_dim, kv.dtype)
        self._choices = [choose_tiles(*model, longest) for longest in LONGEST_CHUNKS]
        self._specialized = None
        if kv.is_cuda and why_not_specialized(kv) is None:
            self._specialized = choose_tiles(*model, LONGEST_CHUNKS[-1], specialized=True)

    def plan(self, plan: StepPlan, num_decode_rows: int) -> PrefillPlan | None:
        """Cut the rows behind the first `num_decode_rows`; None if there are none."""
        if num_decode_rows == len(plan.slots):
            return None
        counts = plan.num_new_tokens.copy()
        counts[:num_decode_rows] = 0
        longest = int(counts.max())
        number = next(i for i, limit in enumerate(LONGEST_CHUNKS) if longest <= limit)
        tiles = self._choices[number]
        most_keys = int((plan.starts + counts)[num_decode_rows:].max())
        if self._specialized is not None and is_faster_specialized(longest, most_keys):
            tiles = self._specialized
        table = make_tile_table(plan.starts, counts, tiles)
        return PrefillPlan(tiles, table.entries.numpy())


def count_decode_rows(plan: StepPlan) -> int:
    """Return how many rows of one token lead the step."""
    longer = np.flatnonzero(plan.num_new_tokens > 1)
    return int(longer[0]) if len(longer) else len(plan.slots)
