"""The offline engine gives the model's tokens, whatever it must wait for; comparisons run."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from reference import Reference
from tiny_models import VOCAB_SIZE, write_tiny_model

from paceline.bench import compare
from paceline.bench.offline import Generation, OfflineEngine
from paceline.bench.record import RequestRecord
from paceline.bench.startup import StartUp
from paceline.decode_worker.settings import DecodeSettings
from paceline.engine.settings import ModelSettings
from paceline.sampling_params import SamplingParams

BLOCK_TOKENS = 8
TIMEOUT_S = 60.0
SAMPLING = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, seed=0)


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


def make_prompts(count: int, length: int = 30) -> list[list[int]]:
    random = Random(count)
    return [[random.randrange(3, VOCAB_SIZE) for _ in range(length)] for _ in range(count)]


def check(found: list[Generation], prompts: list[list[int]], reference: Reference) -> None:
    for generation, prompt in zip(found, prompts, strict=True):
        assert len(generation.token_ids) == SAMPLING.max_tokens
        reference.check(prompt, generation.token_ids)
        record = generation.record
        assert record.num_output_tokens == SAMPLING.max_tokens
        assert record.token_times_s == sorted(record.token_times_s)
        assert record.sent_s < record.token_times_s[0]
        assert record.ended_s == record.token_times_s[-1]


def test_prompts_get_their_tokens_in_order(
    offline: OfflineEngine, model: tuple[Path, Reference]
) -> None:
    for count in (3, 1):  # an engine is used again
        prompts = make_prompts(count)
        check(offline.generate(prompts, SAMPLING, TIMEOUT_S), prompts, model[1])


def test_more_prompts_than_slots_wait_for_their_turn(model: tuple[Path, Reference]) -> None:
    engine = make_engine(model[0], max_num_seqs=2)
    prompts = make_prompts(7)
    check(engine.generate(prompts, SAMPLING, TIMEOUT_S), prompts, model[1])
    engine.close()


def test_preempted_sequences_go_on_where_they_were(model: tuple[Path, Reference]) -> None:
    # Each needs 4 blocks at first and 7 in the end: all fit to start with, not to grow.
    engine = make_engine(model[0], num_blocks=21)
    prompts = make_prompts(4)
    found = engine.generate(prompts, SAMPLING, TIMEOUT_S)
    check(found, prompts, model[1])
    assert sum(generation.record.resumed for generation in found) > 0
    engine.close()


def test_what_can_never_be_served_is_refused_with_the_reason(offline: OfflineEngine) -> None:
    with pytest.raises(RuntimeError, match="max_model_len, is 200"):
        offline.generate(make_prompts(1, length=200), SAMPLING, TIMEOUT_S)


def test_an_engine_that_fails_says_why(
    offline: OfflineEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(plan: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(offline._engine.runner, "launch", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        offline.generate(make_prompts(1), SAMPLING, TIMEOUT_S)


def test_a_side_that_leaves_tokens_out_is_no_result() -> None:
    options = argparse.Namespace(side="vllm", requests=2, output_tokens=3)
    whole = RequestRecord("a", 1, 3, 0.0, token_times_s=[1.0, 2.0, 3.0])
    short = RequestRecord("b", 1, 3, 0.0, token_times_s=[1.0])
    compare.check_complete([whole, whole], options)
    with pytest.raises(RuntimeError, match=r"1 have not 3 tokens \(\[1\]\)"):
        compare.check_complete([whole, short], options)
    with pytest.raises(RuntimeError, match="answered 1 of 2"):
        compare.check_complete([whole], options)


def test_a_side_that_ends_badly_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nowhere"):
        compare.run_in_process_of_its_own("paceline", ["--model", "nowhere"], tmp_path)


def test_the_command_compares_with_transformers_on_a_cpu(
    model: tuple[Path, Reference], tmp_path: Path
) -> None:
    output = tmp_path / "compare.json"
    arguments = f"--model {model[0]} --device cpu --dtype float32 --requests 3 --input 20"
    arguments += " --output-tokens 5 --num-kv-blocks 64 --max-num-batched-tokens 64"
    compare.main([*arguments.split(), "--output", str(output)])
    result = json.loads(output.read_text())["result"]
    assert set(result["rounds"]) == {"paceline", "transformers"}
    for [found] in result["rounds"].values():
        assert found["output_tokens_per_s"] > 0
        assert found["ttft"]["p99"] >= found["ttft"]["p50"] > 0
    rates = result["output_tokens_per_s"]
    assert result["ratio"] == pytest.approx(rates["paceline"] / rates["transformers"])


def test_neither_ray_nor_grpc_is_needed() -> None:
    code = (
        "import sys, paceline.bench.compare, paceline.bench.offline\n"
        "print({name.split('.')[0] for name in sys.modules} & {'ray', 'grpc', 'google'})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
