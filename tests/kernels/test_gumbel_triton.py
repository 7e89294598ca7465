"""Words of consecutive draws, and noise that is nearly right, against those that count."""

import numpy as np
import torch
from triton_device import device

# isort: split
import triton
import triton.language as tl

from paceline.kernels.gumbel_triton import (
    ROUGH_ERROR,
    consecutive_words,
    random_words,
    rough_gumbels,
)


@triton.jit
def _consecutive_kernel(out, other, first, seed, choice, index, NUM: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, NUM)
    draws = (first + places).to(tl.uint32)
    tl.store(out + places, consecutive_words(first, seed, choice, index, NUM).to(tl.int64))
    tl.store(other + places, random_words(draws, seed, choice, index).to(tl.int64))


@triton.jit
def _rough_kernel(words, rough, NUM: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, NUM)
    tl.store(rough + places, rough_gumbels(tl.load(words + places).to(tl.uint32)))


def test_consecutive_words_are_those_of_each_draw() -> None:
    for first, seed, choice, index in [
        (0, 7, 0, 0),
        (4096, -(2**63) + 5, 3, 9),
        (524_280, 1, 0, 2),
    ]:
        words, expected = (torch.zeros(64, dtype=torch.int64, device=device()) for _ in range(2))
        _consecutive_kernel[(1,)](words, expected, first, seed, choice, index, NUM=64)
        assert torch.equal(words, expected)
        assert len(words.unique()) == 64


def test_rough_noise_is_within_its_error() -> None:
    rng = np.random.default_rng(1)
    edges = [0, 1, 2, 2**32 - 2, 2**32 - 1]
    edges += [2**31, int(2**32 * 15 / 16), int(2**32 * 15 / 16) + 1, int(2**32 / np.e)]
    near = [2**32 - 2**bit for bit in range(32)] + [2**bit for bit in range(32)]
    drawn = np.concatenate([edges, near, rng.integers(0, 2**32, 4096 - 64 - len(edges))])
    words = torch.from_numpy(drawn.astype(np.int64)).to(device())
    rough = torch.zeros(4096, device=device())
    _rough_kernel[(1,)](words, rough, NUM=4096)
    exact = -np.log(-np.log((drawn.astype(np.float64) + 0.5) / 2**32))
    assert np.abs(rough.cpu().numpy() - exact).max() < ROUGH_ERROR.value / 8
