"""A token depends on its row, parameters and key alone, and is that of a plain reference."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.cpu.random_stream import RandomStreams
from paceline.engine.cpu.sampler import Sampler
from paceline.engine.step_plan import SlotStart
from paceline.errors import ConfigError
from paceline.kernels.sampling import HEAD_NATS, MAX_VOCAB_SIZE, TAIL_DRAW
from paceline.sampling_params import SamplingParams

EOS = (2, 3)
GREEDY = SamplingParams(temperature=0.0)
RANDOM = SamplingParams(seed=1234)


def make_sampler(vocab_size: int, max_num_slots: int = 8) -> Sampler:
    return Sampler(max_num_slots, vocab_size, EOS, "cpu")


def start(
    sampler: Sampler,
    slot: int,
    sampling: SamplingParams,
    prompt: Sequence[int] = (1,),
    output: Sequence[int] = (),
    choice: int = 0,
) -> None:
    sampler.start(
        SlotStart(slot, sampling, choice, np.array(prompt, np.int32), np.array(output, np.int32))
    )


def sample(
    sampler: Sampler,
    logits: torch.Tensor,
    slots: Sequence[int],
    indices: Sequence[int],
    allowed_mask: torch.Tensor | None = None,
) -> list[int]:
    """Sample rows that all have a token."""
    tokens, failures = sample_all(sampler, logits, slots, indices, allowed_mask)
    assert not failures
    return tokens


def sample_all(
    sampler: Sampler,
    logits: torch.Tensor,
    slots: Sequence[int],
    indices: Sequence[int],
    allowed_mask: torch.Tensor | None = None,
) -> tuple[list[int], dict[int, str]]:
    before = logits.clone()
    result = sampler.sample(
        logits, np.array(slots, np.int32), np.array(indices, np.int32), allowed_mask
    )
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    assert result.token_ids.dtype == torch.int32
    tokens: list[int] = result.token_ids.tolist()
    return tokens, result.failures


def make_logits(seed: int, num_rows: int, vocab_size: int, scale: float = 3.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(num_rows, vocab_size)).astype(np.float32) * scale)


def noise(sampling: SamplingParams, choice: int, index: int, draw: int) -> float:
    assert sampling.seed is not None
    streams = RandomStreams.of(
        np.array([sampling.seed], np.uint64),
        np.array([choice]),
        np.array([index]),
        torch.device("cpu"),
    )
    return streams.gumbels(torch.tensor([0]), torch.tensor([draw])).item()


def reference_token(
    logits: npt.NDArray[np.float32],
    sampling: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    choice: int,
) -> int:
    """Choose one token as the documentation says, one token after the other."""
    scores = logits.astype(np.float64)
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    if len(output) < sampling.min_tokens:
        scores[[*EOS, *sampling.stop_token_ids]] = -math.inf
    for token in {*prompt, *output}:
        if scores[token] > 0:
            scores[token] /= sampling.repetition_penalty
        else:
            scores[token] *= sampling.repetition_penalty
    for token in set(output):
        scores[token] -= sampling.presence_penalty
        scores[token] -= sampling.frequency_penalty * output.count(token)
    if sampling.is_greedy:
        return int(scores.argmax())
    scores = (scores - scores.max()) / sampling.temperature
    kept = np.exp(scores) >= sampling.min_p
    if sampling.top_k:
        kept &= scores >= np.sort(scores)[::-1][: sampling.top_k][-1]
    weights = np.where(kept, np.exp(scores), 0.0)
    order = np.argsort(-scores)
    kept[order] &= np.cumsum(weights[order]) - weights[order] < sampling.top_p * weights.sum()
    head = [t for t in range(len(scores)) if kept[t] and scores[t] >= -HEAD_NATS]
    tail = [t for t in range(len(scores)) if kept[t] and scores[t] < -HEAD_NATS]
    index = len(output)

    def noisy(token: int) -> float:
        return float(scores[token]) + noise(sampling, choice, index, token)

    best = max(head, key=noisy)
    tail_weight = sum(math.exp(scores[token]) for token in tail)
    if tail_weight > 0:
        runner = math.log(tail_weight) + noise(sampling, choice, index, TAIL_DRAW)
        if runner > noisy(best):
            return max(tail, key=noisy)
    return best


def samplings() -> st.SearchStrategy[SamplingParams]:
    return st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        top_k=st.sampled_from([0, 0, 1, 5, 20]),
        top_p=st.sampled_from([1.0, 1.0, 0.05, 0.7, 0.95]),
        min_p=st.sampled_from([0.0, 0.0, 0.01, 0.5]),
        seed=st.integers(0, 2**64 - 1),
        repetition_penalty=st.sampled_from([1.0, 0.8, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
        frequency_penalty=st.sampled_from([0.0, 0.7, -0.2]),
        logit_bias=st.sampled_from([(), ((2, 5.0),), ((0, -3.0), (7, 4.5))]),
        min_tokens=st.sampled_from([0, 0, 3]),
        stop_token_ids=st.sampled_from([(), (5, 6)]),
        logprobs=st.sampled_from([None, 0, 3]),
    )


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.3, 3.0]),
    rows=st.lists(st.tuples(samplings(), st.integers(0, 3)), min_size=1, max_size=5),
    num_steps=st.integers(1, 5),
)
def test_tokens_are_those_of_the_reference_in_any_mixture(
    seed: int, scale: float, rows: list[tuple[SamplingParams, int]], num_steps: int
) -> None:
    sampler = make_sampler(30)
    prompt = [1, 4, 4, 9]
    slots = [7 - row for row in range(len(rows))]
    for slot, (sampling, choice) in zip(slots, rows, strict=True):
        start(sampler, slot, sampling, prompt, choice=choice)
    outputs: list[list[int]] = [[] for _ in rows]
    for index in range(num_steps):
        logits = make_logits(seed + index, len(rows), 30, scale)
        tokens = sample(sampler, logits, slots, [index] * len(rows))
        for row, (sampling, choice) in enumerate(rows):
            expected = reference_token(logits[row].numpy(), sampling, prompt, outputs[row], choice)
            assert tokens[row] == expected
            outputs[row].append(expected)


@settings(deadline=None, max_examples=25)
@given(sampling=samplings(), seed=st.integers(0, 1000), resumed_at=st.integers(0, 12))
def test_a_sequence_resumed_at_any_index_continues_with_the_same_tokens(
    sampling: SamplingParams, seed: int, resumed_at: int
) -> None:
    # 12 tokens for 12 steps, so that penalties and counts matter.
    logits = make_logits(seed, 12, 12, 1.0)
    first, second = make_sampler(12), make_sampler(12)
    start(first, 0, sampling, prompt=[1, 1, 8], choice=2)
    whole = [sample(first, logits[i : i + 1], [0], [i])[0] for i in range(12)]
    start(second, 5, dataclasses.replace(RANDOM, presence_penalty=2.0), output=[1, 2, 3])
    start(second, 5, sampling, prompt=[1, 1, 8], output=whole[:resumed_at], choice=2)
    rest = [sample(second, logits[i : i + 1], [5], [i])[0] for i in range(resumed_at, 12)]
    assert rest == whole[resumed_at:]


@pytest.mark.parametrize("vocab_size", [1000, 49_152])
def test_batch_does_not_change_a_row(vocab_size: int) -> None:
    parameters = [
        GREEDY,
        RANDOM,
        dataclasses.replace(RANDOM, top_p=0.9),
        dataclasses.replace(RANDOM, top_k=40, temperature=0.7),
        dataclasses.replace(RANDOM, min_p=0.02, temperature=2.0),
        dataclasses.replace(GREEDY, repetition_penalty=1.5),
        dataclasses.replace(RANDOM, frequency_penalty=1.0, logit_bias=((9, 3.0),)),
        dataclasses.replace(RANDOM, top_p=0.3, temperature=3.0),
    ]
    logits = make_logits(11, 8, vocab_size)
    together, alone = make_sampler(vocab_size), make_sampler(vocab_size)
    for slot, sampling in enumerate(parameters):
        start(together, slot, sampling)
        start(alone, slot, sampling)
    order = [3, 0, 7, 1, 6, 2, 5, 4]
    tokens = sample(together, logits[order], order, [slot * 10 for slot in order])
    for slot, token in zip(order, tokens, strict=True):
        assert sample(alone, logits[slot : slot + 1], [slot], [slot * 10]) == [token]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_lowest_id_of_equals(dtype: torch.dtype) -> None:
    sampler = make_sampler(100)
    start(sampler, 0, GREEDY)
    start(sampler, 1, dataclasses.replace(GREEDY, logit_bias=((50, 0.0),)))
    logits = torch.zeros(2, 100, dtype=dtype)
    logits[:, [40, 50, 60]] = 1.5
    assert sample(sampler, logits, [0, 1], [0, 0]) == [40, 40]


def test_choices_of_one_row_of_logits_differ_and_each_repeats() -> None:
    logits = make_logits(12, 1, 5000, 0.1).repeat(8, 1)
    runs = []
    for _ in range(2):
        sampler = make_sampler(5000)
        for choice in range(8):
            start(sampler, choice, RANDOM, choice=choice)
        runs.append(sample(sampler, logits, range(8), [0] * 8))
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 8


@pytest.mark.parametrize(
    "sampling",
    [
        RANDOM,
        dataclasses.replace(RANDOM, temperature=0.5),
        dataclasses.replace(RANDOM, temperature=5.0),
        dataclasses.replace(RANDOM, top_k=4),
        dataclasses.replace(RANDOM, top_p=0.8),
        dataclasses.replace(RANDOM, min_p=0.1),
        dataclasses.replace(RANDOM, top_k=10, top_p=0.9, min_p=0.05, temperature=1.5),
    ],
)
def test_frequencies_over_many_indices_are_the_probabilities(sampling: SamplingParams) -> None:
    num_draws, vocab_size = 20_000, 20
    sampler = make_sampler(vocab_size)
    start(sampler, 0, sampling)
    logits = make_logits(13, 1, vocab_size, 2.0)
    tokens = sample(sampler, logits.expand(num_draws, -1), [0] * num_draws, range(num_draws))
    scores = logits[0].double().numpy() / sampling.temperature
    weights = np.exp(scores - scores.max())
    weights[weights < sampling.min_p] = 0.0
    order = np.argsort(-weights)
    weights[order[sampling.top_k or vocab_size :]] = 0.0
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= sampling.top_p * weights.sum()]] = 0.0
    expected = weights / weights.sum() * num_draws
    observed = np.bincount(tokens, minlength=vocab_size)
    assert observed[expected == 0].sum() == 0
    likely = expected >= 5
    statistic = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    # The 0.999 quantile of chi-square is under this for 1 to 19 degrees of freedom.
    assert statistic < 2.31 * (likely.sum() - 1) + 10


def test_stop_tokens_are_banned_before_min_tokens_and_allowed_from_then_on() -> None:
    sampler = make_sampler(10)
    start(sampler, 0, dataclasses.replace(GREEDY, min_tokens=2, stop_token_ids=(5,)))
    logits = torch.zeros(1, 10)
    logits[0, [2, 3, 5, 8]] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    assert [sample(sampler, logits, [0], [i])[0] for i in range(4)] == [8, 8, 2, 2]


def test_min_tokens_bans_end_of_sequence_though_it_is_ignored() -> None:
    sampler = make_sampler(10)
    start(sampler, 0, dataclasses.replace(GREEDY, min_tokens=1, ignore_eos=True))
    logits = torch.zeros(1, 10)
    logits[0, 2] = 9.0
    assert sample(sampler, logits, [0], [0]) == [0]


def test_min_tokens_without_stop_tokens_bans_nothing() -> None:
    sampler = Sampler(1, 10, (), "cpu")
    start(sampler, 0, dataclasses.replace(GREEDY, min_tokens=5, logit_bias=((4, 1.0),)))
    assert sample(sampler, torch.zeros(1, 10), [0], [0]) == [4]


def test_only_allowed_tokens_are_sampled_in_every_mode() -> None:
    sampler = make_sampler(40)
    start(sampler, 0, GREEDY)
    start(sampler, 1, RANDOM)
    start(sampler, 2, dataclasses.replace(GREEDY, logit_bias=((0, 100.0),)))
    mask = torch.zeros(3, 2, dtype=torch.int32)
    mask[:, 1] = 1 << 3  # token 35
    mask[0, 0] = -(2**31)  # token 31
    logits = make_logits(14, 3, 40)
    logits[0, 31] = 20.0
    assert sample(sampler, logits, [0, 1, 2], [0, 0, 0], mask) == [31, 35, 35]


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM, dataclasses.replace(RANDOM, top_p=0.5)])
def test_a_row_whose_mask_allows_nothing_fails_alone(sampling: SamplingParams) -> None:
    sampler = make_sampler(40)
    for slot in (0, 1):
        start(sampler, slot, sampling)
    mask = torch.zeros(2, 2, dtype=torch.int32)
    mask[1, 0] = 1 << 7
    tokens, failures = sample_all(sampler, make_logits(1, 2, 40), [0, 1], [0, 0], mask)
    assert tokens == [0, 7]
    assert list(failures) == [0]
    assert "none of the 40 tokens is allowed" in failures[0]


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM, dataclasses.replace(RANDOM, top_p=0.5)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_a_largest_finite_logit_fails_alone(
    sampling: SamplingParams, bad: float, dtype: torch.dtype
) -> None:
    sampler = make_sampler(200)
    start(sampler, 3, sampling)
    start(sampler, 4, dataclasses.replace(sampling, logprobs=1))
    logits = make_logits(15, 2, 200).to(dtype)
    (alone,) = sample(sampler, logits[1:], [4], [0])
    logits[0, 150 if bad != -math.inf else slice(None)] = bad
    tokens, failures = sample_all(sampler, logits, [3, 4], [0, 0])
    assert tokens == [0, alone]
    assert list(failures) == [0]
    assert f"gave {bad} as the largest logit" in failures[0]


def test_nothing_is_counted_for_a_row_that_fails() -> None:
    sampler = make_sampler(10)
    start(sampler, 0, dataclasses.replace(GREEDY, presence_penalty=2.0))
    logits = torch.zeros(1, 10)
    logits[0, 0] = 1.0
    _, failures = sample_all(sampler, torch.full((1, 10), math.nan), [0], [0])
    assert failures
    assert sample(sampler, logits, [0], [0]) == [0]
    assert sample(sampler, logits, [0], [1]) == [1]


def test_some_logits_may_be_minus_infinity() -> None:
    sampler = make_sampler(100)
    start(sampler, 0, RANDOM)
    start(sampler, 1, dataclasses.replace(RANDOM, repetition_penalty=0.5, top_p=0.9), prompt=[7])
    logits = torch.full((2, 100), -math.inf)
    logits[:, 42] = -5.0
    assert sample(sampler, logits, [0, 1], [0, 0]) == [42, 42]


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-9])
def test_the_smallest_temperatures_are_greedy_in_effect(temperature: float) -> None:
    sampler = make_sampler(100)
    start(sampler, 0, dataclasses.replace(RANDOM, temperature=temperature, top_p=0.9))
    logits = make_logits(16, 1, 100, 1e4)
    assert sample(sampler, logits, [0], [0]) == [int(logits.argmax())]


def test_logprobs_are_those_of_the_unmodified_logits() -> None:
    sampler = make_sampler(50)
    start(sampler, 0, GREEDY)
    start(
        sampler,
        1,
        dataclasses.replace(GREEDY, temperature=0.0, logprobs=3, logit_bias=((8, 100.0),)),
    )
    start(sampler, 2, dataclasses.replace(GREEDY, logprobs=0))
    logits = make_logits(17, 3, 50)
    result = sampler.sample(logits, np.array([0, 1, 2], np.int32), np.zeros(3, np.int32))
    assert set(result.logprobs) == {1, 2}
    expected = torch.log_softmax(logits[1], -1)
    assert int(result.token_ids[1]) == 8
    assert result.logprobs[1].logprob == pytest.approx(expected[8].item(), abs=1e-5)
    order = np.argsort(-expected.numpy())[:3]
    assert result.logprobs[1].token_ids == tuple(order.tolist())
    assert result.logprobs[1].logprobs == pytest.approx(expected[order].tolist(), abs=1e-5)
    assert result.logprobs[2].token_ids == ()
    assert result.logprobs[2].logprob == pytest.approx(
        torch.log_softmax(logits[2], -1).max().item(), abs=1e-5
    )


def test_a_restarted_slot_forgets_everything_of_its_last_sequence() -> None:
    sampler = make_sampler(10)
    old = SamplingParams(
        temperature=0.0,
        logit_bias=((5, 50.0),),
        min_tokens=9,
        presence_penalty=2.0,
        repetition_penalty=2.0,
        logprobs=1,
    )
    start(sampler, 0, old, prompt=[1, 2], output=[3])
    start(sampler, 0, GREEDY)
    logits = torch.zeros(1, 10)
    logits[0, 2] = 1.0
    result = sampler.sample(logits, np.array([0], np.int32), np.array([0], np.int32))
    assert (result.token_ids.tolist(), result.logprobs) == ([2], {})
    start(sampler, 0, dataclasses.replace(GREEDY, presence_penalty=2.0))
    assert sample(sampler, logits, [0], [0]) == [2]


def test_more_slots_with_penalties_than_rows_reserved_keep_their_own_counts() -> None:
    sampler = make_sampler(10, max_num_slots=20)
    logits = torch.zeros(1, 10)
    logits[0, 4] = 1.0
    for slot in range(20):
        start(sampler, slot, dataclasses.replace(GREEDY, presence_penalty=2.0))
        assert sample(sampler, logits, [slot], [0]) == [4]
    assert sample(sampler, logits.repeat(20, 1), range(20), [1] * 20) == [0] * 20


def test_a_slot_with_penalties_may_not_have_two_rows() -> None:
    sampler = make_sampler(10)
    start(sampler, 0, dataclasses.replace(GREEDY, presence_penalty=2.0))
    with pytest.raises(ValueError, match="with penalties twice"):
        sample(sampler, torch.zeros(2, 10), [0, 0], [0, 1])


def test_wrong_arguments_are_errors_with_their_numbers() -> None:
    sampler = make_sampler(10)
    with pytest.raises(ValueError, match="slot 8 is not one of the 8 slots"):
        start(sampler, 8, GREEDY)
    with pytest.raises(ValueError, match="slot 1 samples at random and has no seed"):
        start(sampler, 1, SamplingParams())
    start(sampler, 0, GREEDY)
    with pytest.raises(ValueError, match=r"got logits \[1, 11\] for 1 slots"):
        sample(sampler, torch.zeros(1, 11), [0], [0])
    with pytest.raises(ConfigError, match=f"at most {MAX_VOCAB_SIZE}"):
        make_sampler(MAX_VOCAB_SIZE + 1)


def test_an_empty_batch_samples_nothing() -> None:
    assert sample(make_sampler(10), torch.zeros(0, 10), [], []) == []
