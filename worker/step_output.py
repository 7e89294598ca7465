"""What a step gave to one router, in columns: element i of each array belongs to token i."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from paceline.request import TopLogprobs

Uint32Array = npt.NDArray[np.uint32]
EMPTY = np.empty(0, dtype=np.uint32)


@dataclass(frozen=True, slots=True, eq=False)
class StepOutput:
    """New tokens of the requests of one router."""

    stream_ids: Uint32Array = field(default_factory=lambda: EMPTY)
    """[N] which (attempt, choice)"""
    indices: Uint32Array = field(default_factory=lambda: EMPTY)
    """[N] output index"""
    token_ids: Uint32Array = field(default_factory=lambda: EMPTY)
    """[N]"""
    finished_stream_ids: Uint32Array = field(default_factory=lambda: EMPTY)
    """[F] choices that ended with their token in this output"""
    finish_reasons: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    """[F] FinishReason values"""
    logprobs: dict[int, TopLogprobs] = field(default_factory=dict)
    """By position in the columns, only of the tokens whose request asked."""
