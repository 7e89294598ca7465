"""The offline engine gives the model's tokens, whatever it must wait for."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from reference import Reference
from tiny_models import VOCAB_SIZE, write_tiny_model

from paceline.bench.load import PlannedRequest
from paceline.bench.offline import Generation, OfflineEngine
from paceline.bench.startup import StartUp
from paceline.decode_worker.settings import DecodeSettings
from paceline.engine.settings import ModelSettings
from paceline.sampling_params import SamplingParams

BLOCK_TOKENS = 8
TIMEOUT_S = 60.0
SAMPLING = SamplingParams(temperature=0.0, ignore_eos=True, seed=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder, Reference(write_tiny_model(folder))


def make_engine(folder: Path, *, num_blocks: int = 200, max_num_seqs: int = 8) -> OfflineEngine:
    settings = DecodeSettings(
        num_kv_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=32,
        local_prefill_tokens="unlimited",
        watermark_blocks=0,
    )
    model = ModelSettings(path=str(folder), dtype="float32", max_model_len=200)
    return OfflineEngine(StartUp("cpu").load(model, settings, BLOCK_TOKENS), settings)


@pytest.fixture
def offline(model: tuple[Path, Reference]) -> Iterator[OfflineEngine]:
    engine = make_engine(model[0])
    yield engine
    engine.close()


def make_requests(
    count: int, length: int = 30, max_tokens: int = 20, gap_s: float = 0.0
) -> list[PlannedRequest]:
    random = Random(count)
    return [
        PlannedRequest(
            number * gap_s,
            tuple(random.randrange(3, VOCAB_SIZE) for _ in range(length)),
            max_tokens,
        )
        for number in range(count)
    ]


def check(found: list[Generation], requests: list[PlannedRequest], reference: Reference) -> None:
    for generation, request in zip(found, requests, strict=True):
        assert len(generation.token_ids) == request.max_tokens
        reference.check(list(request.prompt), generation.token_ids)
        record = generation.record
        assert record.num_output_tokens == request.max_tokens
        assert record.token_times_s == sorted(record.token_times_s)
        assert record.sent_s == record.scheduled_s < record.token_times_s[0]
        assert record.ended_s == record.token_times_s[-1]


def test_requests_get_their_tokens_in_order(
    offline: OfflineEngine, model: tuple[Path, Reference]
) -> None:
    for count in (3, 1):  # an engine is used again
        requests = make_requests(count)
        check(offline.generate(requests, SAMPLING, TIMEOUT_S), requests, model[1])


def test_no_request_begins_before_it_is_due(
    offline: OfflineEngine, model: tuple[Path, Reference]
) -> None:
    late = make_requests(4, gap_s=0.02)
    requests = [*make_requests(2, max_tokens=3), *late]
    found = offline.generate(requests, SAMPLING, TIMEOUT_S)
    check(found, requests, model[1])
    first_s = found[0].record.scheduled_s
    due_s = [generation.record.scheduled_s - first_s for generation in found]
    assert due_s == pytest.approx([0, 0, 0, 0.02, 0.04, 0.06], abs=1e-6)


def test_more_requests_than_slots_wait_for_their_turn(model: tuple[Path, Reference]) -> None:
    engine = make_engine(model[0], max_num_seqs=2)
    requests = make_requests(7)
    check(engine.generate(requests, SAMPLING, TIMEOUT_S), requests, model[1])
    engine.close()


def test_preempted_sequences_go_on_where_they_were(model: tuple[Path, Reference]) -> None:
    # Each needs 4 blocks at first and 7 in the end: all fit to start with, not to grow.
    engine = make_engine(model[0], num_blocks=21)
    requests = make_requests(4)
    found = engine.generate(requests, SAMPLING, TIMEOUT_S)
    check(found, requests, model[1])
    assert sum(generation.record.resumed for generation in found) > 0
    engine.close()


def test_a_request_may_be_as_long_as_the_model(
    offline: OfflineEngine, model: tuple[Path, Reference]
) -> None:
    requests = make_requests(1, length=180)
    check(offline.generate(requests, SAMPLING, TIMEOUT_S), requests, model[1])


def test_what_can_never_be_served_is_refused_with_the_reason(offline: OfflineEngine) -> None:
    with pytest.raises(RuntimeError, match="max_model_len, is 200"):
        offline.generate(make_requests(1, length=200), SAMPLING, TIMEOUT_S)


def test_an_engine_that_fails_says_why_and_waits_for_no_later_arrival(
    offline: OfflineEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(plan: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(offline._engine.runner, "launch", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        offline.generate(make_requests(2, gap_s=1e6), SAMPLING, TIMEOUT_S)
