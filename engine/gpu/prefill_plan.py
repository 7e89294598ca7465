"""Which rows of a step decode, and the tiles of the rest."""

from bisect import bisect_left

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


class PrefillPlanner:
    """Cuts the rows of steps that do not decode into tiles."""

    def __init__(self, config: ModelConfig, num_heads: int, kv: torch.Tensor) -> None:
        model = (num_heads, kv.shape[2], config.head_dim, kv.dtype)
        self._choices = [choose_tiles(*model, longest) for longest in LONGEST_CHUNKS]
        self._specialized = None
        if kv.is_cuda and why_not_specialized(kv) is None:
            self._specialized = choose_tiles(*model, LONGEST_CHUNKS[-1], specialized=True)

    def tiles_for(self, longest: int) -> PrefillTiles:
        """Return the tiles for chunks of up to so many tokens, whatever is ahead of them."""
        return self._choices[bisect_left(LONGEST_CHUNKS, longest)]

    def choose(self, plan: StepPlan, num_decode_rows: int) -> PrefillTiles | None:
        """Return the tiles for the rows behind the first `num_decode_rows`; None without any."""
        counts = plan.num_new_tokens[num_decode_rows:]
        if not len(counts):
            return None
        longest = int(counts.max())
        most_keys = int((plan.starts[num_decode_rows:] + counts).max())
        if self._specialized is not None and is_faster_specialized(longest, most_keys):
            return self._specialized
        return self.tiles_for(longest)

    def cut(
        self, plan: StepPlan, num_decode_rows: int, tiles: PrefillTiles
    ) -> npt.NDArray[np.int32]:
        """Cut these rows; return the table's entries, [N, 2]."""
        counts = plan.num_new_tokens.copy()
        counts[:num_decode_rows] = 0
        entries: npt.NDArray[np.int32] = make_tile_table(plan.starts, counts, tiles).entries.numpy()
        return entries


def count_decode_rows(plan: StepPlan) -> int:
    """Return how many rows of one token lead the step."""
    longer = np.flatnonzero(plan.num_new_tokens > 1)
    return int(longer[0]) if len(longer) else len(plan.slots)
