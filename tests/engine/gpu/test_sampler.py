"""The GPU's sampler chooses the tokens of the CPU's, and reports the same, in any mixture."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from triton_device import device

from paceline.engine.cpu.sampler import SampledTokens, Sampler
from paceline.engine.gpu.sampler import SAMPLING_KINDS, GpuSampler, StepSamples
from paceline.engine.step_plan import SlotStart
from paceline.errors import ConfigError
from paceline.kernels.sampling import MAX_VOCAB_SIZE
from paceline.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, SamplingParams

EOS = (2, 3)
VOCAB_SIZE = 2100
NUM_SLOTS = 6
MAX_SAMPLES = 9
GREEDY = SamplingParams(temperature=0.0)
RANDOM = SamplingParams(seed=2**63 + 5)


def make_start(
    slot: int,
    sampling: SamplingParams,
    prompt: Sequence[int] = (1,),
    output: Sequence[int] = (),
    choice: int = 0,
) -> SlotStart:
    prompt_ids, output_ids = (np.array(ids, np.int32) for ids in (prompt, output))
    return SlotStart(slot, sampling, choice, prompt_ids, output_ids)


def make_logits(
    seed: int, num_rows: int, scale: float = 3.0, size: int = VOCAB_SIZE
) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(num_rows, size)).astype(np.float32) * scale)


class Driver:
    """Runs steps as a model runner does."""

    def __init__(self, vocab_size: int = VOCAB_SIZE, dtype: torch.dtype = torch.float32) -> None:
        self.device = torch.device(device())
        self.sampler = GpuSampler(NUM_SLOTS, MAX_SAMPLES, vocab_size, dtype, EOS, self.device)
        # Larger than what is copied, and used for one step after the other.
        self.host = torch.full((self.sampler.num_result_words + 7,), -99, dtype=torch.int32)

    def start(self, *starts: SlotStart) -> None:
        words = self.sampler.encode_starts(starts)
        # Among other things of an upload, in memory that is used again.
        upload = torch.from_numpy(np.concatenate([[7] * 4, words, [7] * 3], dtype=np.int32))
        upload = upload.to(self.device)
        self.sampler.start(upload[4 : 4 + len(words)], len(starts))
        upload.fill_(-(2**30))

    def launch(
        self,
        logits: torch.Tensor,
        slots: Sequence[int],
        indices: Sequence[int],
        num_padded: int = 0,
    ) -> bool:
        rows = torch.cat([logits, logits.new_full((num_padded, logits.shape[1]), math.nan)])
        on_device = rows.to(self.device)
        row_slots, row_indices = (
            torch.tensor([*values, *([padding] * num_padded)], dtype=torch.int32).to(self.device)
            for values, padding in ((slots, -1), (indices, 0))
        )
        named = np.array(slots, np.int32)
        sampled = self.sampler.sample(
            on_device,
            row_slots,
            row_indices,
            self.sampler.kind_of(named),
        )
        assert len(sampled.token_ids) == len(rows)
        with_logprobs = self.sampler.wants_logprobs(named)
        if with_logprobs:
            self.sampler.logprobs(on_device, row_slots)
        assert torch.equal(on_device.cpu().nan_to_num(), rows.nan_to_num())
        return with_logprobs

    def results(self, slots: Sequence[int], with_logprobs: bool) -> StepSamples:
        words = self.sampler.result_words(with_logprobs=with_logprobs)
        self.host[: len(words)].copy_(words)
        named = np.array(slots, np.int32)
        samples = self.sampler.results(self.host, named, with_logprobs=with_logprobs)
        self.host.fill_(-99)
        return samples

    def sample(
        self,
        logits: torch.Tensor,
        slots: Sequence[int],
        indices: Sequence[int],
        num_padded: int = 0,
    ) -> StepSamples:
        return self.results(slots, self.launch(logits, slots, indices, num_padded))


def reference_sample(
    sampler: Sampler, logits: torch.Tensor, slots: Sequence[int], indices: Sequence[int]
) -> SampledTokens:
    named, numbers = (np.array(values, np.int32) for values in (slots, indices))
    return sampler.sample(logits.float(), named, numbers)


def random_sampling(rng: np.random.Generator) -> SamplingParams:
    biased = rng.choice(VOCAB_SIZE, 5, replace=False).tolist()
    bias = tuple((token, float(rng.normal() * 4)) for token in biased)
    # A token may be named twice: both add up.
    bias += bias[:1]
    return SamplingParams(
        temperature=float(rng.choice([0.0, 0.4, 1.0, 1.7, 1e-300])),
        top_k=int(rng.choice([0, 0, 1, 20, VOCAB_SIZE])),
        top_p=float(rng.choice([1.0, 0.95, 0.3])),
        min_p=float(rng.choice([0.0, 0.0, 0.02])),
        seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
        repetition_penalty=float(rng.choice([1.0, 1.0, 1.3, 0.7])),
        presence_penalty=float(rng.choice([0.0, 0.0, 0.9])),
        frequency_penalty=float(rng.choice([0.0, 0.0, 0.4, -0.3])),
        logit_bias=bias if rng.random() < 0.4 else (),
        min_tokens=int(rng.choice([0, 0, 4])),
        stop_token_ids=(5, 6) if rng.random() < 0.5 else (),
        logprobs=[None, None, 0, 3, 20][rng.integers(5)],
    )


def random_tokens(rng: np.random.Generator, length: int) -> list[int]:
    # Few different ones, so that they occur several times, in all tiles.
    tokens: list[int] = (rng.integers(0, 30, length) * (VOCAB_SIZE // 30)).tolist()
    return tokens


def assert_same(samples: StepSamples, expected: SampledTokens, logits: torch.Tensor) -> None:
    assert samples.token_ids.dtype == np.int32
    assert samples.token_ids.tolist() == expected.token_ids.tolist()
    assert samples.logprobs.keys() == expected.logprobs.keys()
    for row, reported in samples.logprobs.items():
        own, token_ids, logprobs = expected.logprobs[row]
        assert reported.logprob == pytest.approx(own, abs=1e-5)
        assert reported.logprobs == pytest.approx(logprobs, abs=1e-5)
        # Of equals, the reference may name any.
        assert len(set(reported.token_ids)) == len(token_ids)
        best, named = logits[row, list(token_ids)], logits[row, list(reported.token_ids)]
        assert torch.equal(best, named)


@pytest.mark.parametrize("seed", range(6))
def test_mixtures_are_those_of_the_cpu_while_slots_are_reused(seed: int) -> None:
    rng = np.random.default_rng(seed)
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    driver, reference = Driver(dtype=dtype), Sampler(NUM_SLOTS, VOCAB_SIZE, EOS, "cpu")
    outputs: dict[int, list[int]] = {}
    for step in range(4):
        # All at first, then some anew: with output, as resumed ones have.
        starts = []
        for slot in range(NUM_SLOTS) if step == 0 else rng.permutation(NUM_SLOTS)[:2].tolist():
            outputs[slot] = random_tokens(rng, int(rng.choice([0, 0, 40])))
            prompt = random_tokens(rng, int(rng.choice([1, 1500])))
            choice = int(rng.integers(64))
            starts.append(make_start(slot, random_sampling(rng), prompt, outputs[slot], choice))
            reference.start(starts[-1])
        driver.start(*starts)
        slots = rng.permutation(NUM_SLOTS)[: int(rng.integers(1, NUM_SLOTS + 1))].tolist()
        logits = make_logits(100 * seed + step, len(slots)).to(dtype)
        logits[:, EOS[0]] += 4.0
        indices = [len(outputs[slot]) for slot in slots]
        samples = driver.sample(logits, slots, indices, num_padded=int(rng.integers(3)))
        assert_same(samples, reference_sample(reference, logits, slots, indices), logits)
        for slot, token in zip(slots, samples.token_ids.tolist(), strict=True):
            outputs[slot].append(token)


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM, dataclasses.replace(RANDOM, top_p=0.8)])
def test_a_sequence_resumed_in_another_slot_continues_with_the_same_tokens(
    sampling: SamplingParams,
) -> None:
    # 300 tokens of nearly equal logits, so that penalties and counts matter.
    sampling = dataclasses.replace(
        sampling, presence_penalty=0.5, frequency_penalty=0.4, repetition_penalty=1.2
    )
    driver = Driver(300)
    logits = make_logits(5, 1, 0.3, 300)
    prompt = [1, 1, 8, 299]
    driver.start(make_start(0, sampling, prompt, choice=3))
    whole = [driver.sample(logits, [0], [index]).token_ids[0] for index in range(8)]
    driver.start(make_start(4, dataclasses.replace(sampling, seed=1), [9] * 20, [7, 8]))
    driver.start(
        make_start(4, sampling, prompt, whole[:5], choice=3),
        make_start(2, sampling, prompt, whole[:4], choice=3),
    )
    rest = [
        driver.sample(logits.expand(2, -1), [4, 2], [index, index - 1]).token_ids.tolist()
        for index in range(5, 8)
    ]
    assert rest == [[whole[index], whole[index - 1]] for index in range(5, 8)]
    assert len(set(whole)) > 4


def test_a_restarted_slot_forgets_everything_of_its_last_sequence() -> None:
    driver, reference = Driver(), Sampler(NUM_SLOTS, VOCAB_SIZE, EOS, "cpu")
    shaped = SamplingParams(
        seed=1,
        top_k=1,
        logit_bias=((5, 50.0),),
        min_tokens=9,
        presence_penalty=2.0,
        repetition_penalty=2.0,
        logprobs=1,
    )
    logits = make_logits(1, 1, 0.1)
    for sampling in (shaped, GREEDY, dataclasses.replace(GREEDY, presence_penalty=2.0)):
        start = make_start(0, sampling, prompt=[1, 2], output=[3] if sampling is shaped else [])
        driver.start(start)
        reference.start(start)
        for index in range(2):
            expected = reference_sample(reference, logits, [0], [index])
            assert_same(driver.sample(logits, [0], [index]), expected, logits)


def test_a_slot_is_given_away_while_its_last_step_is_unfinished() -> None:
    driver = Driver()
    driver.start(make_start(0, dataclasses.replace(GREEDY, logprobs=3)))
    logits = make_logits(2, 2)
    with_logprobs = driver.launch(logits[:1], [0], [0])
    # Before the results of that step are read; as in a runner, its copy was launched already.
    copied = driver.sampler.result_words(with_logprobs=with_logprobs).clone().cpu()
    driver.start(make_start(0, RANDOM))
    assert not driver.launch(logits[1:], [0], [0])
    samples = driver.sampler.results(copied, np.array([0], np.int32), with_logprobs=with_logprobs)
    assert samples.token_ids.tolist() == [int(logits[0].argmax())]
    assert samples.logprobs[0].token_ids == tuple(logits[0].topk(3).indices.tolist())


def test_rows_that_pad_change_nothing() -> None:
    driver = Driver()
    driver.start(make_start(0, dataclasses.replace(GREEDY, presence_penalty=0.1, logprobs=2)))
    logits = make_logits(3, 2)
    first = driver.sample(logits, [0, 1], [0, 0], num_padded=1)
    tensors = (*driver.sampler._slots, driver.sampler._words)
    before = [tensor.clone() for tensor in tensors]
    rows = torch.full((3,), -1, dtype=torch.int32, device=driver.device)
    for kind in SAMPLING_KINDS:
        driver.sampler.sample(logits[[0, 1, 1]].to(driver.device), rows, rows, kind)
    assert all(map(torch.equal, before, tensors))
    driver.sampler.compile_kernels()
    assert all(map(torch.equal, before[:-1], tensors[:-1]))
    again = driver.sample(logits[1:], [1], [0])
    assert again.token_ids[0] == first.token_ids[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("sampling", [GREEDY, RANDOM, dataclasses.replace(RANDOM, logprobs=2)])
def test_failures_are_those_of_the_cpu_and_nothing_is_counted(
    sampling: SamplingParams, bad: float | None
) -> None:
    driver, reference = Driver(), Sampler(NUM_SLOTS, VOCAB_SIZE, EOS, "cpu")
    penalised = dataclasses.replace(sampling, presence_penalty=0.5, min_tokens=1)
    for start in (make_start(1, GREEDY), make_start(4, penalised)):
        driver.start(start)
        reference.start(start)
    logits = make_logits(4, 2)
    if bad is None:
        # What is likely at all is what min_tokens bans.
        logits[1] = -math.inf
        logits[1, EOS[1]] = 1.0
    else:
        logits[1, 1500 if bad != -math.inf else slice(None)] = bad
    wanted = reference_sample(reference, logits, [1, 4], [0, 0])
    found = driver.sample(logits, [1, 4], [0, 0], num_padded=1)
    assert list(found.failures) == [1]
    assert found.failures == wanted.failures
    assert found.token_ids.tolist() == wanted.token_ids.tolist()
    assert found.logprobs.keys() == wanted.logprobs.keys()
    fine = make_logits(5, 1)
    expected = reference_sample(reference, fine, [4], [0])
    assert driver.sample(fine, [4], [0]).token_ids.tolist() == expected.token_ids.tolist()


def test_what_min_tokens_bans_is_allowed_from_then_on() -> None:
    driver = Driver(10)
    sampling = dataclasses.replace(GREEDY, min_tokens=2, stop_token_ids=(5,), ignore_eos=True)
    driver.start(make_start(0, sampling))
    logits = torch.zeros(1, 10)
    logits[0, [EOS[0], EOS[1], 5, 8]] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    tokens = [driver.sample(logits, [0], [index]).token_ids[0] for index in range(4)]
    assert tokens == [8, 8, EOS[0], EOS[0]]


def test_the_smallest_temperatures_draw_among_equals() -> None:
    driver, reference = Driver(100), Sampler(NUM_SLOTS, 100, EOS, "cpu")
    for slot in range(NUM_SLOTS):
        start = make_start(slot, SamplingParams(temperature=1e-300, seed=slot))
        driver.start(start)
        reference.start(start)
    logits = make_logits(9, NUM_SLOTS, size=100)
    logits[:, 90:] = 50.0
    slots = list(range(NUM_SLOTS))
    expected = reference_sample(reference, logits, slots, slots)
    samples = driver.sample(logits, slots, slots)
    assert_same(samples, expected, logits)
    assert len(set(samples.token_ids)) > 1


@pytest.mark.parametrize("rest", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("penalty", [1e-45, 1e-40, 1e-38])
def test_penalties_that_overflow_leave_a_token_of_the_vocabulary(
    penalty: float, rest: dict[str, float]
) -> None:
    """An infinite score once made a token outside it, which became an address."""
    driver, reference = Driver(), Sampler(NUM_SLOTS, VOCAB_SIZE, EOS, "cpu")
    sampling = SamplingParams(temperature=1.0, seed=1, repetition_penalty=penalty, **rest)
    start = make_start(0, sampling, prompt=(7, 8))
    driver.start(start)
    reference.start(start)
    logits = make_logits(3, 1)
    logits[0, 7:9] = torch.tensor([5.0, 6.0])
    expected = reference_sample(reference, logits, [0], [0])
    samples = driver.sample(logits, [0], [0])
    assert samples.token_ids.tolist() == expected.token_ids.tolist()
    assert samples.token_ids[0] in (7, 8)


def test_more_log_probabilities_than_tokens_are_those_of_all_tokens() -> None:
    driver, reference = Driver(7), Sampler(NUM_SLOTS, 7, EOS, "cpu")
    start = make_start(3, dataclasses.replace(GREEDY, logprobs=20))
    driver.start(start)
    reference.start(start)
    logits = make_logits(10, 1, size=7)
    expected = reference_sample(reference, logits, [3], [0])
    assert_same(driver.sample(logits, [3], [0]), expected, logits)


def test_a_count_too_many_is_noticed() -> None:
    driver = Driver(300)
    logits = make_logits(6, 1, 0.3, 300)
    sampling = dataclasses.replace(GREEDY, frequency_penalty=1.0)
    best = int(logits.argmax())
    driver.start(make_start(0, sampling), make_start(1, sampling, output=[best]))
    assert driver.sample(logits.expand(2, -1), [0, 1], [0, 1]).token_ids[0] == best
    assert driver.sample(logits, [1], [1]).token_ids[0] != best


def test_the_noise_of_another_index_or_choice_is_noticed() -> None:
    driver, reference = Driver(), Sampler(NUM_SLOTS, VOCAB_SIZE, EOS, "cpu")
    for slot in range(NUM_SLOTS):
        reference.start(make_start(slot, RANDOM, choice=slot))
        driver.start(make_start(slot, RANDOM, choice=slot))
    logits = make_logits(7, 1, 0.5).expand(NUM_SLOTS, -1)
    slots = list(range(NUM_SLOTS))
    expected = reference_sample(reference, logits, slots, [5] * NUM_SLOTS).token_ids.tolist()
    assert driver.sample(logits, slots, [5] * NUM_SLOTS).token_ids.tolist() == expected
    assert driver.sample(logits, slots, [6] * NUM_SLOTS).token_ids.tolist() != expected
    assert driver.sample(logits, slots[::-1], [5] * NUM_SLOTS).token_ids.tolist() != expected


def test_as_many_edits_as_parameters_may_have_fit_a_slot() -> None:
    driver, reference = Driver(), Sampler(NUM_SLOTS, VOCAB_SIZE, EOS, "cpu")
    logits = make_logits(8, 1)
    likely = logits[0].argsort(descending=True).tolist()
    bias = tuple((token, -50.0) for token in likely[:MAX_LOGIT_BIAS])
    stops = tuple(likely[MAX_LOGIT_BIAS:][:MAX_STOP_TOKEN_IDS])
    sampling = dataclasses.replace(GREEDY, logit_bias=bias, stop_token_ids=stops, min_tokens=1)
    for start in (make_start(5, GREEDY), make_start(0, sampling)):
        driver.start(start)
        reference.start(start)
    expected = reference_sample(reference, logits, [0], [0])
    assert_same(driver.sample(logits, [0], [0]), expected, logits)
    too_many = dataclasses.replace(sampling, logit_bias=(*bias, (0, 1.0)) * 2)
    with pytest.raises(ValueError, match="2050 tokens with a bias and 66 that min_tokens bans"):
        driver.start(make_start(0, too_many))


def test_wrong_arguments_are_errors_with_their_numbers() -> None:
    driver = Driver(100)
    with pytest.raises(ValueError, match="slot 6 is not one of the 6 slots"):
        driver.start(make_start(6, GREEDY))
    with pytest.raises(ValueError, match="slot 1 samples at random and has no seed"):
        driver.start(make_start(0, RANDOM), make_start(1, SamplingParams()))
    assert not driver.sampler.kind_of(np.array([0], np.int32)).any_random
    with pytest.raises(ValueError, match="log-probabilities of 21 tokens, at most 20"):
        driver.start(make_start(0, dataclasses.replace(GREEDY, logprobs=21)))
    with pytest.raises(ValueError, match=r"are torch\.float16, the sampler's torch\.float32"):
        driver.sample(torch.zeros(1, 100, dtype=torch.float16), [0], [0])
    with pytest.raises(ValueError, match="room for 9 rows, and 10 are sampled"):
        driver.sample(torch.zeros(10, 100), [0] * 10, [0] * 10)
    with pytest.raises(ConfigError, match=f"at most {MAX_VOCAB_SIZE}"):
        GpuSampler(1, 1, MAX_VOCAB_SIZE + 1, torch.float32, EOS, driver.device)


def test_memory_held_is_that_of_its_tensors() -> None:
    assert Driver(1000).sampler.num_bytes - Driver(900).sampler.num_bytes >= 100 * (
        NUM_SLOTS * 5 + MAX_SAMPLES * 4
    )


def test_nothing_to_start_or_to_sample_does_nothing() -> None:
    driver = Driver(100)
    driver.start()
    samples = driver.sample(torch.zeros(0, 100), [], [])
    assert (samples.token_ids.tolist(), samples.logprobs) == ([], {})
