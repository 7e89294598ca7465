"""Which part of the model a tensor-parallel rank holds."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from paceline.errors import ConfigError


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """One rank of a tensor-parallel group: heads and MLP columns are dealt out evenly, in order."""

    rank: int = 0
    size: int = 1
    all_reduce: Callable[[torch.Tensor], torch.Tensor] = _alone
    """Sum a tensor over all ranks; may work in place. Called by every rank in the same order."""

    def share(self, total: int, what: str) -> int:
        """Return how many of `total` this rank holds."""
        if total % self.size:
            raise ConfigError(
                f"{total} {what} cannot be dealt out to {self.size} ranks evenly. "
                f"Set tensor_parallel_size to a divisor of {total}."
            )
        return total // self.size
