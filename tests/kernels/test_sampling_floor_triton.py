"""top_k and top_p keep what the reference keeps, however flat a row is and however many tie."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sampling_driver import Case, SamplingDriver, make_logits

from paceline.kernels import sampling_triton
from paceline.kernels.sampling import lowest_kept
from paceline.kernels.sampling_finish_triton import STATUS_NONE_DRAWN, STATUS_OK
from paceline.kernels.sampling_floor_triton import DONE, DRAWN, KEPT_END, MODE
from paceline.sampling_params import SamplingParams

VOCAB_SIZE = 300
TILE = 256
SETTINGS = [
    {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    for top_k, top_p, min_p in (
        (1, 1.0, 0.0),
        (7, 1.0, 0.0),
        (50, 0.9, 0.0),
        (VOCAB_SIZE - 1, 1.0, 0.0),
        (VOCAB_SIZE - 1, 0.8, 0.0),
        (VOCAB_SIZE + 5, 0.7, 0.0),
        (0, 1e-9, 0.0),
        (0, 0.9, 0.0),
        (0, 0.999999, 0.0),
        (40, 0.95, 0.4),
        (250, 0.6, 1e-3),
    )
]


def flat(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    return rng.normal(size=VOCAB_SIZE).astype(np.float32) * 0.3


def peaked(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    return rng.normal(size=VOCAB_SIZE).astype(np.float32) * 8


def all_equal(_: np.random.Generator) -> npt.NDArray[np.float32]:
    return np.full(VOCAB_SIZE, -3.25, np.float32)


def two_values(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    return rng.choice([1.0, 0.7], VOCAB_SIZE).astype(np.float32)


def few_values(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    return rng.choice([5.0, 3.5, 3.4921875, 3.484375, -1.0], VOCAB_SIZE).astype(np.float32)


def bf16(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    return torch.from_numpy(flat(rng) + 12).bfloat16().float().numpy()


def neighbours(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """All but one within 400 units in the last place, so that only whole keys tell them apart."""
    values = (2.0 + rng.integers(0, 400, VOCAB_SIZE) * 2.0**-22).astype(np.float32)
    values[17] = 3.0
    return values


def tiny(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Of all magnitudes that a float32 has, and nearly of one weight."""
    return -np.exp(rng.uniform(-85, -2, VOCAB_SIZE)).astype(np.float32)


def few_allowed(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    return np.where(rng.random(VOCAB_SIZE) < 0.1, flat(rng), -np.inf).astype(np.float32)


ROWS = [flat, peaked, all_equal, two_values, few_values, bf16, neighbours, tiny, few_allowed]


def kept_by_reference(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> list[bool]:
    distances = ((logits - logits.max()) / torch.tensor(temperature)).unsqueeze(0)
    floor = lowest_kept(distances, np.array([top_k]), np.array([top_p]), np.array([min_p]))
    kept: list[bool] = ((distances >= floor) & (distances > -math.inf))[0].tolist()
    return kept


def kept_by_kernels(
    driver: SamplingDriver, row: int, logits: torch.Tensor, temperature: float
) -> list[bool]:
    state = driver.workspace.states[row].tolist()
    assert state[MODE.value] in (DONE.value, DRAWN.value)
    distances = ((logits - logits.max()) / torch.tensor(temperature)).abs()
    kept: list[bool] = (distances.view(torch.int32) < state[KEPT_END.value]).tolist()
    return kept


# Eight listed at most: most rows are searched key by key.
@pytest.mark.parametrize(
    ("temperature", "max_listed"),
    [(0.8, 8), *(pytest.param(*rest, marks=pytest.mark.slow) for rest in [(0.8, 512), (100.0, 8)])],
)
@pytest.mark.parametrize("make_row", ROWS)
def test_kept_are_those_of_the_reference(
    make_row: Callable[[np.random.Generator], npt.NDArray[np.float32]],
    temperature: float,
    max_listed: int,
) -> None:
    rng = np.random.default_rng(5)
    logits = torch.from_numpy(np.stack([make_row(rng) for _ in SETTINGS]))
    cases = [
        Case(SamplingParams(temperature=temperature, seed=row, **settings))
        for row, settings in enumerate(SETTINGS)
    ]
    driver = SamplingDriver(cases, VOCAB_SIZE, TILE, max_listed)
    out = driver.sample(logits, [3] * len(cases))
    for row, settings in enumerate(SETTINGS):
        kept = kept_by_kernels(driver, row, logits[row], temperature)
        assert kept == kept_by_reference(logits[row], temperature, **settings), settings
    assert out.token_ids.tolist() == driver.expected(logits, [3] * len(cases))


@pytest.mark.parametrize("make_row", [flat, two_values])
def test_one_token_more_or_another_share_is_noticed(
    make_row: Callable[[np.random.Generator], npt.NDArray[np.float32]],
) -> None:
    logits = torch.from_numpy(make_row(np.random.default_rng(1)))
    best = int((logits == logits.max()).sum())
    driver = SamplingDriver(
        [Case(SamplingParams(seed=1, top_k=best)), Case(SamplingParams(seed=1, top_p=0.1))],
        VOCAB_SIZE,
        TILE,
    )
    driver.sample(logits.expand(2, -1), [0, 0])
    assert kept_by_kernels(driver, 0, logits, 1.0) == kept_by_reference(logits, 1.0, best, 1, 0)
    assert kept_by_kernels(driver, 0, logits, 1.0) != kept_by_reference(logits, 1.0, best + 1, 1, 0)
    assert kept_by_kernels(driver, 1, logits, 1.0) == kept_by_reference(logits, 1.0, 0, 0.1, 0)
    assert kept_by_kernels(driver, 1, logits, 1.0) != kept_by_reference(logits, 1.0, 0, 0.9, 0)


# A program for each tile of 256, or for all four of a row.
@pytest.mark.parametrize(("dtype", "num_programs"), [(torch.float32, 1), (torch.bfloat16, 512)])
def test_rows_of_all_kinds_in_one_launch_are_as_alone(
    dtype: torch.dtype, num_programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling_triton, "_NUM_PROGRAMS", num_programs)
    vocab_size = 1000
    given = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_k=3),
        SamplingParams(seed=3, top_p=0.95, temperature=2.0),
        SamplingParams(seed=4, min_p=0.1),
        SamplingParams(seed=5, top_k=700, top_p=0.9, min_p=1e-4, temperature=5.0),
        SamplingParams(seed=6, top_k=20, top_p=0.9, repetition_penalty=1.2, presence_penalty=0.4),
        SamplingParams(temperature=0.0, presence_penalty=0.4),
        SamplingParams(seed=7, top_p=0.5, logit_bias=((5, 3.0),)),
    ]
    cases = [Case(sampling, prompt=(4, 9), output=(8,)) for sampling in given]
    logits = make_logits(1, len(cases), vocab_size, 1.0).to(dtype)
    driver = SamplingDriver(cases, vocab_size, tile=256)
    slots = [3, -1, 0, 6, 8, -1, 5, 2, 4]
    rows = logits[[max(slot, 0) for slot in slots]]
    for index in range(3):
        out = driver.sample(rows, [index] * len(slots), row_slots=slots)
        # Counts in all slots, which matters to none but the one with a row.
        expected = driver.expected(logits.float(), [index] * len(cases))
        assert out.token_ids.tolist() == [expected[slot] if slot >= 0 else -7 for slot in slots]


def test_a_launch_that_promises_no_filters_gives_the_same_tokens() -> None:
    cases = [Case(SamplingParams(seed=seed, min_p=0.01)) for seed in range(3)]
    logits = make_logits(2, 3, VOCAB_SIZE, 1.0)
    driver = SamplingDriver(cases, VOCAB_SIZE, TILE)
    out = driver.sample(logits, [0] * 3, any_filtered=False)
    assert out.token_ids.tolist() == driver.expected(logits, [0] * 3)


@pytest.mark.parametrize(
    ("promise", "broken"),
    [
        ({"any_random": False}, [False, True, True, True, True]),
        ({"any_filtered": False}, [False, False, True, True, False]),
    ],
)
def test_a_row_that_breaks_a_promise_gets_no_token(
    promise: dict[str, bool], broken: list[bool]
) -> None:
    changes: list[dict[str, float]] = [
        {"temperature": 0.0},
        {},
        {"top_k": 5},
        {"top_p": 0.9},
        {"top_k": VOCAB_SIZE},
    ]
    cases = [Case(SamplingParams(seed=1, **change)) for change in changes]  # type: ignore[arg-type]
    logits = make_logits(2, len(cases), VOCAB_SIZE, 1.0)
    driver = SamplingDriver(cases, VOCAB_SIZE, TILE)
    out = driver.sample(logits, [0] * len(cases), **promise)
    expected = driver.expected(logits, [0] * len(cases))
    assert out.status.tolist() == [STATUS_NONE_DRAWN if bad else STATUS_OK for bad in broken]
    assert out.token_ids.tolist() == [
        -1 if bad else token for bad, token in zip(broken, expected, strict=True)
    ]


@pytest.mark.parametrize("tile", [2, 96, 8192])
def test_tiles_that_the_kernels_cannot_use_are_refused(tile: int) -> None:
    driver = SamplingDriver([Case(SamplingParams(seed=1))], VOCAB_SIZE, tile)
    with pytest.raises(ValueError, match=f"power of two from 4 to 4096, got {tile}"):
        driver.sample(make_logits(1, 1, VOCAB_SIZE, 1.0), [0])
