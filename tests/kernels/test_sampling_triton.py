"""Kernels choose the tokens of the CPU's sampler, from the same logits and random words."""

import math

import numpy as np
import pytest
import torch
from sampling_driver import MAX_EDITS, Case, SamplingDriver, make_logits
from triton_device import device

from paceline.engine.cpu.random_stream import RandomStreams
from paceline.kernels.gumbel_triton import TAIL_DRAW, random_words_triton
from paceline.kernels.sampling_finish_triton import (
    STATUS_NONE_ALLOWED,
    STATUS_NOT_FINITE,
    STATUS_OK,
)
from paceline.kernels.sampling_slots_triton import SamplingSlots
from paceline.sampling_params import SamplingParams

VOCAB_SIZE = 120


def make_mask(seed: int, num_rows: int, vocab_size: int) -> torch.Tensor:
    words = (num_rows, -(-vocab_size // 32))
    bits = np.random.default_rng(seed).integers(-(2**31), 2**31, words)
    return torch.from_numpy(bits.astype(np.int32))


def test_words_and_noise_are_those_of_the_engine() -> None:
    rng = np.random.default_rng(1)
    seeds = rng.integers(0, 2**64, 6, np.uint64)
    seeds[:3] = 0, 2**64 - 1, 2**63
    choices, indices = (rng.integers(0, 2**31, 6).astype(np.int32) for _ in range(2))
    drawn = np.concatenate([np.arange(9), rng.integers(0, 2**32, 50), [TAIL_DRAW]])
    draws = torch.from_numpy(drawn)
    words, noise = random_words_triton(
        draws.to(device()),
        torch.from_numpy(seeds.view(np.int64)).to(device()),
        torch.from_numpy(choices).to(device()),
        torch.from_numpy(indices).to(device()),
    )
    streams = RandomStreams.of(seeds, choices, indices, torch.device("cpu"))
    for row in range(6):
        rows = torch.full_like(draws, row)
        assert torch.equal(words[row].cpu(), streams.words(rows, draws))
        torch.testing.assert_close(
            noise[row].cpu(), streams.gumbels(rows, draws), rtol=1e-13, atol=1e-13
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 2, 64, 65, 1000])
def test_greedy_is_the_first_of_equals(vocab_size: int, dtype: torch.dtype) -> None:
    driver = SamplingDriver([Case(SamplingParams(temperature=0.0))] * 6, vocab_size)
    logits = torch.randint(-2, 3, (6, vocab_size), generator=torch.Generator().manual_seed(1))
    wide = torch.cat([logits.to(dtype), torch.full((6, 3), 9.0, dtype=dtype)], dim=1)
    expected = [row.index(max(row)) for row in logits.tolist()]
    for any_random in (False, True):
        # Rows of another stride than their length.
        out = driver.sample(wide[:, :vocab_size], [0] * 6, any_random=any_random)
        assert out.token_ids.tolist() == expected
        assert out.status.tolist() == [STATUS_OK] * 6


FILTERS = [
    {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    for top_k in (0, 1, 5, 60, 119, 10_000)
    for top_p in (1.0, 0.999999, 0.9, 0.3, 1e-6)
    for min_p in (0.0, 0.02, 1e-5, 1.0)
]


@pytest.mark.parametrize("num_rows", [5, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 2.5, 1e-320])
@pytest.mark.parametrize("scale", [0.3, 3.0, 8.0])
def test_filtered_draws_are_the_samplers(scale: float, temperature: float, num_rows: int) -> None:
    # Lists that hold all, that are too long for their room, and that are too short for top_k.
    seed = int(scale * 10 + temperature * 100)
    chosen = np.random.default_rng(seed).permutation(len(FILTERS))[:num_rows]
    cases = [
        Case(SamplingParams(temperature=temperature, seed=2**63 + seed + i, **FILTERS[i]), choice=i)
        for i in chosen.tolist()
    ]
    logits = make_logits(seed, num_rows, VOCAB_SIZE, scale)
    # Values that tie, at the best and where filters end.
    logits[: num_rows // 2] = logits[: num_rows // 2].round(decimals=0 if scale > 1 else 1)
    driver = SamplingDriver(cases, VOCAB_SIZE)
    indices = list(range(num_rows))
    out = driver.sample(logits, indices)
    assert out.token_ids.tolist() == driver.expected(logits, indices)


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.99}, {"top_k": 101}, {"min_p": 0.0003}])
def test_draws_from_the_tail_are_the_samplers(filters: dict[str, float]) -> None:
    # One likely token, and 200 in the tail that together weigh a sixteenth of it.
    logits = torch.cat([torch.zeros(1), -8.0001 - torch.arange(200) / 1000]).repeat(400, 1)
    seeds = range(400)
    every = [Case(SamplingParams(seed=seed, **filters)) for seed in seeds]
    tokens = SamplingDriver(every, 201).expected(logits, [0] * 400)
    unfiltered = SamplingDriver([Case(SamplingParams(seed=seed)) for seed in seeds], 201)
    whole_tail = unfiltered.expected(logits, [0] * 400)
    # Some where it wins, some where it would win if it were whole, and one where it never does.
    won = [row for row in seeds if tokens[row] > 0][:4]
    lost = [row for row in seeds if tokens[row] == 0 < whole_tail[row]][:3]
    some = [*won, *lost, whole_tail.index(0)]
    out = SamplingDriver([every[row] for row in some], 201).sample(
        logits[: len(some)], [0] * len(some)
    )
    assert out.token_ids.tolist() == [tokens[row] for row in some]
    assert len(won) >= 3
    assert len(lost) >= (1 if filters else 0)


def make_shaped_cases(vocab_size: int) -> list[Case]:
    rng = np.random.default_rng(3)
    cases = []
    for row in range(8):
        given = {
            "temperature": float(rng.choice([0.0, 1.0])),
            "repetition_penalty": float(rng.choice([1.0, 1.3])),
            "presence_penalty": float(rng.choice([0.0, 0.7])),
            "frequency_penalty": float(rng.choice([0.0, 0.4])),
            "min_tokens": int(rng.choice([0, 4])),
            "top_p": float(rng.choice([1.0, 0.8])),
        }
        biased = rng.permutation(vocab_size)[:3].tolist()
        bias = tuple((token, float(rng.normal() * 4)) for token in biased)
        sampling = SamplingParams(
            seed=row, logit_bias=bias if row % 2 else (), stop_token_ids=(7,), max_tokens=9, **given
        )
        prompt, output = (tuple(rng.integers(0, vocab_size, 9).tolist()) for _ in range(2))
        cases.append(Case(sampling, prompt, output[: row % 4]))
    return cases


@pytest.mark.parametrize("with_mask", [False, True])
def test_shaped_rows_are_the_samplers_over_several_steps(with_mask: bool) -> None:
    vocab_size = 100
    cases = make_shaped_cases(vocab_size)
    driver = SamplingDriver(cases, vocab_size)
    for step in range(3):
        # With ties, to see additions in another order.
        logits = make_logits(step, len(cases), vocab_size, 2.0).round(decimals=1)
        logits[:, 2] += 4.0
        mask = make_mask(step, len(cases), vocab_size) if with_mask else None
        indices = [len(case.output) + step for case in cases]
        before = logits.clone()
        out = driver.sample(logits, indices, mask)
        assert torch.equal(before, logits)
        assert out.token_ids.tolist() == driver.expected(logits, indices, mask)


def test_only_the_rows_that_change_are_written_to_scores() -> None:
    plain = SamplingParams(temperature=0.2, seed=1, top_k=1, top_p=0.9)
    biased = SamplingParams(seed=1, logit_bias=((5, 1.0),))
    driver = SamplingDriver([Case(plain), Case(biased), Case(SamplingParams(temperature=0.0))], 100)
    driver.sample(make_logits(1, 3, 100, 3.0), [0, 0, 0])
    unwritten = driver.workspace.scores.isnan().all(dim=1)
    assert unwritten.tolist() == [True, False, True]


def test_rows_without_a_slot_do_nothing_and_others_are_as_alone() -> None:
    cases = make_shaped_cases(150)[:4]
    logits = make_logits(9, 4, 150, 2.0)
    together = SamplingDriver(cases, 150).sample(logits, [3] * 4).token_ids.tolist()
    driver = SamplingDriver(cases, 150)
    counts = driver.slots.counts.clone()
    rows = logits[[0, 2, 1, 0]]
    rows[1] = math.nan
    out = driver.sample(rows, [3] * 4, row_slots=[0, -1, 1, -1])
    assert out.token_ids.tolist() == [together[0], -7, together[1], -7]
    assert torch.equal(driver.slots.counts[2:], counts[2:])


def test_what_is_wrong_with_a_row_is_told_and_nothing_counted() -> None:
    penalised = SamplingParams(seed=1, presence_penalty=0.5)
    driver = SamplingDriver([Case(penalised)] * 5, 100)
    counts = driver.slots.counts.clone()
    logits = make_logits(4, 5, 100, 1.0)
    logits[0, 70] = math.nan
    logits[1, 3] = math.inf
    logits[2] = -math.inf
    logits[4, 9] = -math.inf
    mask = torch.full((5, 4), -1, dtype=torch.int32)
    mask[3] = 0
    out = driver.sample(logits, [0] * 5, mask)
    wrong = STATUS_NOT_FINITE
    assert out.status.tolist() == [wrong, wrong, wrong, STATUS_NONE_ALLOWED, STATUS_OK]
    assert out.token_ids[:4].tolist() == [-1] * 4
    assert torch.equal(driver.slots.counts[:4], counts[:4])
    assert int(driver.slots.counts[4].sum()) == 1
    assert [str(value) for value in out.largest[:3].tolist()] == ["nan", "inf", "-inf"]
    assert out.largest[3:].tolist() == logits[3:].amax(1).tolist()


def test_the_noise_of_a_neighbouring_index_is_noticed() -> None:
    cases = [Case(SamplingParams(seed=seed)) for seed in range(6)]
    logits = make_logits(5, 6, 100, 0.5)
    driver = SamplingDriver(cases, 100)
    wrong = driver.sample(logits, [6] * 6).token_ids.tolist()
    assert wrong != driver.expected(logits, [5] * 6)


def test_what_the_kernels_cannot_do_is_refused() -> None:
    driver = SamplingDriver([Case(SamplingParams(temperature=0.0))] * 2, 100)
    logits = make_logits(1, 2, 100, 1.0)
    with pytest.raises(ValueError, match="workspace is for 2 rows of 100 tokens"):
        driver.sample(logits[:, :90], [0, 0])
    with pytest.raises(ValueError, match="must be \\[R, V\\]"):
        driver.sample(logits.double(), [0, 0])
    with pytest.raises(ValueError, match="indices must be"):
        driver.sample(logits, [0])
    with pytest.raises(ValueError, match="allowed_mask must be"):
        driver.sample(logits, [0, 0], torch.zeros((2, 3), dtype=torch.int32))
    driver.slots = SamplingSlots.allocate(2, 101, MAX_EDITS, device())
    with pytest.raises(ValueError, match="slots are for 101 tokens"):
        driver.sample(logits, [0, 0])
