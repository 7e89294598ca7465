"""The random bits are those of the published Philox, and a function of their key alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.cpu.random_stream import RandomStreams, philox4x32

WORD = 2**32

# kat_vectors of Random123, the authors' library: counter, key, result.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def reference_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The paper's definition, in Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, WORD)
        high1, low1 = divmod(0xCD9E8D57 * c2, WORD)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c0, c1, c2, c3


def mix(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3, k0, k1 = (torch.tensor([word]) for word in (*counter, *key))
    return tuple(int(word) for word in philox4x32((c0, c1, c2, c3), (k0, k1)))


def make_streams(seeds: list[int], choices: list[int], indices: list[int]) -> RandomStreams:
    return RandomStreams.of(
        np.array(seeds, np.uint64), np.array(choices), np.array(indices), torch.device("cpu")
    )


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    assert mix(counter, key) == answer
    assert reference_philox(counter, key) == answer


@settings(deadline=None)
@given(st.tuples(*[st.integers(0, WORD - 1)] * 4), st.tuples(*[st.integers(0, WORD - 1)] * 2))
def test_philox_equals_the_definition(counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    assert mix(counter, key) == reference_philox(counter, key)


@settings(deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 63),
    st.integers(0, 2**31 - 1),
    st.lists(st.integers(0, WORD - 1), min_size=1, max_size=20),
)
def test_word_is_the_one_of_its_key_and_draw(
    seed: int, choice: int, index: int, draws: list[int]
) -> None:
    streams = make_streams([1, seed], [2, choice], [3, index])
    words = streams.words(torch.ones(len(draws), dtype=torch.int64), torch.tensor(draws))
    key = (seed % WORD, seed // WORD)
    expected = [reference_philox((draw // 4, index, choice, 0), key)[draw % 4] for draw in draws]
    assert words.tolist() == expected


def test_a_whole_row_equals_its_words_asked_for_one_by_one_and_in_any_order() -> None:
    streams = make_streams([5, 6], [0, 1], [7, 8])
    draws = torch.arange(40_000)  # more than one chunk of lanes
    whole = streams.words(torch.ones_like(draws), draws)
    order = torch.randperm(len(draws), generator=torch.Generator().manual_seed(1))[:5000]
    assert torch.equal(streams.words(torch.ones_like(order), order), whole[order])


def test_seeds_choices_and_indices_have_streams_of_their_own() -> None:
    streams = make_streams([1, 2, 1 + 2**32, 1, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1])
    draws = torch.arange(1000).repeat(5)
    words = streams.words(torch.arange(5).repeat_interleave(1000), draws)
    assert len(set(words.tolist())) > 4990


def test_uniforms_fill_the_open_interval_evenly() -> None:
    draws = torch.arange(64_000)
    uniforms = make_streams([42], [0], [0]).uniforms(torch.zeros_like(draws), draws)
    assert 0.0 < float(uniforms.min()) < float(uniforms.max()) < 1.0
    observed = torch.histc(uniforms, 64, 0.0, 1.0)
    chi_square = float(((observed - 1000) ** 2 / 1000).sum())
    assert chi_square < 103.4  # 63 degrees of freedom, p = 0.001


def test_extreme_words_give_finite_noise() -> None:
    class Extremes(RandomStreams):
        def words(self, rows: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
            return torch.tensor([0, WORD - 1])

    word = torch.zeros(1, dtype=torch.int64)
    noise = Extremes(word, word, word, word).gumbels(word, word)
    assert noise.tolist() == pytest.approx([-3.129, 22.874], abs=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_words_are_the_same_on_a_gpu() -> None:
    draws = torch.arange(100_000)
    seeds = np.array([2**63 + 12345], np.uint64)
    choices, indices = np.array([3]), np.array([77])
    words = [
        RandomStreams.of(seeds, choices, indices, torch.device(device))
        .words(torch.zeros_like(draws).to(device), draws.to(device))
        .cpu()
        for device in ("cpu", "cuda")
    ]
    assert torch.equal(*words)
