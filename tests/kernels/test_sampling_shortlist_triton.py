"""Rows of which few tokens can be kept are drawn at once, and as the sampler draws."""

import math

import numpy as np
import pytest
import torch
from sampling_driver import Case, SamplingDriver, make_logits

from paceline.kernels.sampling_floor_triton import DONE, DRAWN, KEPT_END, MODE
from paceline.sampling_params import SamplingParams

VOCAB_SIZE = 1000
TILE = 256
CHUNK = 16
NUM_CHUNKS = 63
"""Of the vocabulary; the last has eight tokens."""


def make_driver(given: list[SamplingParams], max_short: int = 64) -> SamplingDriver:
    cases = [Case(sampling, prompt=(1, 2), output=(3,)) for sampling in given]
    return SamplingDriver(cases, VOCAB_SIZE, TILE, 128, CHUNK, max_short)


def check(driver: SamplingDriver, logits: torch.Tensor) -> list[bool]:
    """Sample, compare with the sampler, and tell which rows were drawn at once."""
    indices = list(range(len(logits)))
    out = driver.sample(logits, indices)
    assert out.token_ids.tolist() == driver.expected(logits, indices)
    modes = driver.workspace.states[:, MODE.value].tolist()
    assert set(modes) <= {DONE.value, DRAWN.value}
    return [mode == DRAWN.value for mode in modes]


@pytest.mark.parametrize("scale", [0.3, 6.0])
def test_rows_of_all_kinds_in_one_launch_are_the_samplers(scale: float) -> None:
    given = [
        (SamplingParams(temperature=0.0), False),
        (SamplingParams(seed=1), False),
        (SamplingParams(seed=2, top_k=1), True),
        (SamplingParams(seed=3, top_k=7, top_p=0.6), True),
        (SamplingParams(seed=4, top_k=7, temperature=40.0), True),
        (SamplingParams(seed=5, top_k=5, presence_penalty=0.5, logit_bias=((999, 9.0),)), True),
        (SamplingParams(seed=6, top_k=20, top_p=0.9, min_p=0.3), True),
        (SamplingParams(seed=7, top_k=900), False),
        (SamplingParams(seed=8, top_k=900, top_p=0.8), False),
        (SamplingParams(seed=9, top_p=0.999), False),
    ]
    driver = make_driver([sampling for sampling, _ in given])
    drawn = check(driver, make_logits(1, len(given), VOCAB_SIZE, scale))
    assert drawn == [at_once for _, at_once in given]


@pytest.mark.parametrize("top_k", [NUM_CHUNKS - 1, NUM_CHUNKS, NUM_CHUNKS + 1])
def test_as_many_tokens_as_chunks_and_one_more(top_k: int) -> None:
    # The best token of each chunk is far over all others, and all of them are listed.
    logits = make_logits(2, 6, VOCAB_SIZE, 0.3)
    logits[:, ::CHUNK] += 3.0
    driver = make_driver([SamplingParams(seed=seed, top_k=top_k) for seed in range(6)], 1024)
    assert check(driver, logits) == [True] * 6
    for row in range(6):
        keys = (logits[row] - logits[row].max()).abs().view(torch.int32)
        kept = keys < int(driver.workspace.states[row, KEPT_END.value])
        best = torch.topk(logits[row], top_k + 1).values
        assert torch.equal(kept, logits[row] >= best[-2])
        # One more would be noticed.
        assert not torch.equal(kept, logits[row] >= best[-1])


@pytest.mark.parametrize(("num_ties", "at_once"), [(31, False), (30, True)])
def test_ties_at_the_bound_are_all_listed_or_none(num_ties: int, at_once: bool) -> None:
    # Equal tokens, of which top_k ends at the second, in two chunks; two better ones.
    max_short = 32
    logits = torch.full((3, VOCAB_SIZE), -2.0)
    logits[:, 320 : 320 + num_ties] = 1.0
    logits[:, 7] = logits[:, 990] = 1.5
    driver = make_driver([SamplingParams(seed=seed, top_k=4) for seed in range(3)], max_short)
    assert check(driver, logits) == [at_once] * 3


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_chunks_without_an_allowed_token_are_skipped(filters: dict[str, float]) -> None:
    logits = torch.full((4, VOCAB_SIZE), -math.inf)
    logits[0, 999] = 0.5
    logits[1, [0, 500, 991]] = torch.tensor([1.0, 0.9, 0.8])
    logits[2, 300:330] = make_logits(3, 1, 30, 1.0)[0]
    logits[3, ::100] = 2.0
    driver = make_driver([SamplingParams(seed=seed, **filters) for seed in range(4)])
    assert check(driver, logits) == ["min_p" not in filters] * 4


def test_few_chunks_of_a_tile_race_as_all_of_it_does() -> None:
    # By min_p, without a list: one to all sixteen chunks of a tile have a token over the floor.
    rng = np.random.default_rng(4)
    logits = make_logits(5, 12, VOCAB_SIZE, 0.2)
    for row in range(12):
        logits[row, rng.permutation(VOCAB_SIZE)[: 2 + 6 * row]] += 4.0
    driver = make_driver([SamplingParams(seed=seed, min_p=0.2) for seed in range(12)])
    assert check(driver, logits) == [False] * 12


def test_best_of_chunks_are_those_of_the_vocabulary() -> None:
    logits = make_logits(6, 1, VOCAB_SIZE, 1.0)
    driver = make_driver([SamplingParams(seed=1, top_k=1)])
    assert check(driver, logits) == [True]
    best = logits[0, :992].view(-1, CHUNK).amax(1)
    assert torch.equal(driver.workspace.chunk_best[0, :62].cpu(), best)
    assert driver.workspace.chunk_best[0, 62] == logits[0, 992:].max()
    assert driver.workspace.chunk_best[0, 63] == -math.inf
