"""Random bits as a pure function of (seed, choice, index, draw): any worker, on any device, in
any batch, gets the same ones, so that any worker can continue any request.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC
2011): ten rounds turn a 128-bit counter and a 64-bit key into four 32-bit words.

    key     = seed (low word, high word)
    counter = (draw // 4, index, choice, 0)
    word    = philox(key, counter)[draw % 4]

PyTorch multiplies no unsigned 32-bit words, so each word is an int64 below 2**32. The product of
two words wraps around in int64, but its 64 bits are the right ones: a shift and a mask take them
apart.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10
MASK = 0xFFFFFFFF

MAX_DRAWS = 2**32
"""Draws of one (seed, choice, index); far more than any vocabulary has tokens."""

_LANES = 8192
"""Lanes computed at once, so that the intermediate words stay in a core's cache."""

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox4x32(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Mix int64 tensors of 32-bit words, all of one shape, into four tensors of random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        low, high = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((high >> 32) ^ c1 ^ k0) & MASK,
            high & MASK,
            ((low >> 32) ^ c3 ^ k1) & MASK,
            low & MASK,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


@dataclass(frozen=True, slots=True, eq=False)
class RandomStreams:
    """The random streams of R samples; every tensor is int64 [R], of 32-bit words."""

    seed_low: torch.Tensor
    seed_high: torch.Tensor
    choices: torch.Tensor
    indices: torch.Tensor

    @classmethod
    def of(
        cls,
        seeds: npt.NDArray[np.uint64],
        choices: npt.NDArray[np.integer],
        indices: npt.NDArray[np.integer],
        device: torch.device,
    ) -> "RandomStreams":
        """Key R streams; each array is [R]."""
        words = np.stack(
            (
                (seeds & np.uint64(MASK)).astype(np.int64),
                (seeds >> np.uint64(32)).astype(np.int64),
                choices.astype(np.int64),
                indices.astype(np.int64),
            )
        )
        return cls(*torch.from_numpy(words).to(device).unbind())

    def words(self, rows: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return word number draws[i] of stream rows[i], int64 [N] below 2**32.

        Draws are below MAX_DRAWS. Neighbours in the arrays that fall into one block of four share
        its computation, so ascending draws are cheapest.
        """
        places = (rows << 32) | (draws >> 2)
        blocks, block_of = torch.unique_consecutive(places, return_inverse=True)
        mixed = torch.cat([self._mix(chunk) for chunk in blocks.split(_LANES)])
        return mixed[block_of, draws & 3]

    def _mix(self, places: torch.Tensor) -> torch.Tensor:
        rows = places >> 32
        counter = (
            places & MASK,
            self.indices[rows],
            self.choices[rows],
            torch.zeros_like(places),
        )
        key = (self.seed_low[rows], self.seed_high[rows])
        return torch.stack(philox4x32(counter, key), dim=1)

    def uniforms(self, rows: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return numbers in (0, 1), float64 [N]: the middles of 2**32 equal cells."""
        return (self.words(rows, draws).to(torch.float64) + 0.5) * 2.0**-32

    def gumbels(self, rows: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """Return standard Gumbel noise, -log(-log(uniform)), float64 [N], between -3.2 and 22.9."""
        return -torch.log(-torch.log(self.uniforms(rows, draws)))
