"""Each operation against its definition; the draw against the distribution it must have."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paceline.engine.cpu.random_stream import RandomStreams
from paceline.kernels.sampling import (
    HEAD_NATS,
    apply_penalties_,
    ban_disallowed_,
    first_argmax,
    gumbel_race,
    lowest_kept,
)


def make_scores(seed: int, num_rows: int, vocab_size: int, scale: float = 3.0) -> torch.Tensor:
    """Random scores whose best in each row is 0."""
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.normal(size=(num_rows, vocab_size)).astype(np.float32) * scale)
    return scores - scores.amax(-1, keepdim=True)


def chi_square(observed: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64]) -> float:
    """Return Pearson's statistic over its 0.999 quantile: over 1 rejects."""
    expected = probabilities / probabilities.sum() * observed.sum()
    rare = expected < 5
    groups = [(observed[~rare], expected[~rare])]
    if rare.any():
        groups.append((observed[rare].sum(keepdims=True), expected[rare].sum(keepdims=True)))
    seen, wanted = (np.concatenate(arrays) for arrays in zip(*groups, strict=True))
    if wanted[-1] == 0:
        assert seen[-1] == 0
        seen, wanted = seen[:-1], wanted[:-1]
    freedom = len(seen) - 1
    # Wilson and Hilferty's approximation of the quantile.
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    return float(((seen - wanted) ** 2 / wanted).sum() / quantile)


def draw_many(scores: torch.Tensor, floor: float, num_draws: int) -> npt.NDArray[np.int64]:
    """Count tokens over draws of the same row."""
    streams = RandomStreams.of(
        np.full(num_draws, 7, np.uint64),
        np.zeros(num_draws, np.int64),
        np.arange(num_draws),
        torch.device("cpu"),
    )
    rows = scores.expand(num_draws, -1).contiguous()
    tokens = gumbel_race(rows, torch.full((num_draws,), floor), streams.gumbels)
    return np.bincount(tokens.numpy(), minlength=scores.shape[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 2, 31, 1000])
def test_argmax_is_the_first_of_equals(dtype: torch.dtype, vocab_size: int) -> None:
    logits = torch.randint(-2, 3, (8, vocab_size), generator=torch.Generator().manual_seed(1))
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert first_argmax(logits.to(dtype)).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_finds_a_nan_before_anything_else(dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 100, dtype=dtype)
    logits[:, 3] = torch.inf
    logits[1, 70] = torch.nan
    assert first_argmax(logits).tolist() == [3, 70]


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 100])
def test_banned_tokens_are_those_whose_bit_is_zero(vocab_size: int) -> None:
    allowed = np.random.default_rng(2).random((3, vocab_size)) < 0.5
    num_words = -(-vocab_size // 32)
    padded = np.zeros((3, num_words * 32), np.bool_)
    padded[:, :vocab_size] = allowed
    words = np.packbits(padded, axis=-1, bitorder="little").view("<i4")
    scores = torch.ones(3, vocab_size)
    ban_disallowed_(scores, torch.from_numpy(words.astype(np.int32)))
    assert np.array_equal(scores.numpy() == 1.0, allowed)
    assert np.array_equal(scores.numpy() == -np.inf, ~allowed)


def test_penalties_follow_their_formula() -> None:
    scores = torch.tensor([[2.0, -2.0, 2.0, -2.0, 1.0, -math.inf]])
    seen = torch.tensor([[True, True, False, False, True, True]])
    counts = torch.tensor([[0, 1, 0, 0, 3, 1]], dtype=torch.int32)
    column = torch.ones(1, 1)
    apply_penalties_(scores, seen, counts, 2.0 * column, 0.25 * column, 0.5 * column)
    assert scores.tolist() == [[1.0, -4.75, 2.0, -2.0, 0.5 - 1.5 - 0.25, -math.inf]]


def reference_kept(
    scores: npt.NDArray[np.float64], top_k: int, top_p: float, min_p: float
) -> npt.NDArray[np.bool_]:
    """Filter one row, step by step."""
    kept = np.exp(scores) >= min_p
    if top_k:
        kept &= scores >= np.sort(scores)[::-1][min(top_k, len(scores)) - 1]
    if top_p == 1.0:
        return kept  # sums in two orders may differ by the smallest weights
    weights = np.where(kept, np.exp(scores), 0.0)
    order = np.argsort(-scores)
    before = np.cumsum(weights[order]) - weights[order]
    kept[order] &= before < top_p * weights.sum()
    return kept


@settings(deadline=None, max_examples=60)
@example(seed=271, vocab_size=1500, scale=5.0, rows=[*[(0, 0.0001, 0.0)] * 3, (0, 1.0, 0.0)])
@given(
    seed=st.integers(0, 1000),
    vocab_size=st.sampled_from([5, 200, 1500]),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    rows=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 2, 50, 10**6]),
            st.sampled_from([0.0001, 0.1, 0.5, 0.9, 0.99, 0.9999, 1.0]),
            st.sampled_from([0.0, 0.001, 0.1, 0.9]),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_kept_tokens_are_those_of_the_reference(
    seed: int, vocab_size: int, scale: float, rows: list[tuple[int, float, float]]
) -> None:
    scores = make_scores(seed, len(rows), vocab_size, scale)
    top_k, top_p, min_p = (np.array(column) for column in zip(*rows, strict=True))
    floor = lowest_kept(scores, top_k.astype(np.int64), top_p, min_p)
    kept = (scores >= floor.unsqueeze(1)).numpy()
    for row, parameters in enumerate(rows):
        expected = reference_kept(scores[row].double().numpy(), *parameters)
        assert np.array_equal(kept[row], expected)


def test_tokens_that_tie_with_the_last_one_kept_are_kept() -> None:
    scores = torch.tensor([[0.0, -1.0, -1.0, -2.0]]).repeat(2, 1)
    floor = lowest_kept(scores, np.array([2, 0]), np.array([1.0, 0.6]), np.zeros(2))
    assert floor.tolist() == [-1.0, -1.0]


def test_best_token_is_always_kept() -> None:
    scores = make_scores(3, 4, 100)
    floor = lowest_kept(
        scores, np.array([1, 0, 0, 1]), np.array([1.0, 1e-30, 1.0, 1e-9]), np.array([0, 0, 1, 1.0])
    )
    assert floor.tolist() == [0.0] * 4


def test_filters_see_a_row_alike_alone_and_in_a_batch() -> None:
    scores = make_scores(4, 6, 3000, 0.5)
    top_k = np.array([0, 3, 0, 1000, 0, 0])
    top_p = np.array([0.5, 0.5, 0.999, 0.9, 0.01, 1.0])
    min_p = np.array([0, 0, 0, 0, 0.2, 0.3])
    together = lowest_kept(scores, top_k, top_p, min_p)
    for row in range(6):
        each = slice(row, row + 1)
        alone = lowest_kept(scores[each], top_k[each], top_p[each], min_p[each])
        assert torch.equal(alone, together[each])


@pytest.mark.parametrize("scale", [0.2, 2.0, 6.0])
def test_draws_have_the_distribution_of_the_softmax(scale: float) -> None:
    scores = make_scores(5, 1, 40, scale)
    probabilities = torch.softmax(scores[0].double(), -1).numpy()
    assert chi_square(draw_many(scores, -math.inf, 20_000), probabilities) < 1.0


def test_draws_from_the_tail_have_their_probability_each() -> None:
    # One likely token, and 500 that together weigh a sixth of it.
    scores = torch.cat([torch.zeros(1), -HEAD_NATS - torch.linspace(0.01, 0.1, 500)]).unsqueeze(0)
    probabilities = torch.softmax(scores[0].double(), -1).numpy()
    observed = draw_many(scores, -math.inf, 20_000)
    assert chi_square(observed, probabilities) < 1.0
    groups = [slice(0, 1), slice(1, 251), slice(251, 501)]
    seen = np.array([observed[group].sum() for group in groups])
    wanted = np.array([probabilities[group].sum() for group in groups])
    assert chi_square(seen, wanted) < 1.0


@pytest.mark.parametrize("floor", [0.0, -1.0, -HEAD_NATS, -9.0])
def test_draws_stay_over_the_floor(floor: float) -> None:
    scores = torch.linspace(0.0, -12.0, 60).unsqueeze(0)
    probabilities = torch.softmax(scores[0].double(), -1).numpy()
    observed = draw_many(scores, floor, 20_000)
    kept = scores[0].numpy() >= floor
    assert observed[~kept].sum() == 0
    if kept.sum() > 1:
        assert chi_square(observed, np.where(kept, probabilities, 0.0)) < 1.0


def test_chi_square_rejects_a_slightly_wrong_temperature() -> None:
    scores = make_scores(5, 1, 40, 2.0)
    wrong = torch.softmax(scores[0].double() / 1.1, -1).numpy()
    assert chi_square(draw_many(scores, -math.inf, 20_000), wrong) > 1.0


def test_draws_hardly_change_when_scores_change_by_rounding() -> None:
    # 4,000 tokens of about the same probability: an inverse CDF would move to a neighbour.
    rng = np.random.default_rng(6)
    scores = make_scores(7, 1, 4000, 0.1).expand(2000, -1)
    noisy = scores + torch.from_numpy(rng.normal(size=(2000, 4000)).astype(np.float32)) * 1e-6
    streams = RandomStreams.of(
        np.zeros(2000, np.uint64), np.zeros(2000), np.arange(2000), torch.device("cpu")
    )
    floor = torch.full((2000,), -math.inf)
    drawn, again = (gumbel_race(each, floor, streams.gumbels) for each in (scores, noisy))
    assert len(drawn.unique()) > 1000
    assert int((drawn != again).sum()) <= 1
