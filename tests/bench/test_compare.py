"""Sides send requests when they are due, and comparisons keep what there is."""

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import write_tiny_model

from paceline.bench import compare
from paceline.bench.load import PlannedRequest
from paceline.bench.record import RequestRecord
from paceline.bench.side_process import Ended, run_to_end
from paceline.bench.sides import SIDES, SideOptions
from paceline.errors import ConfigError

TIMEOUT_S = 60.0
PLANNED = [
    PlannedRequest(0.0, tuple(range(3, 33)), 6),
    PlannedRequest(0.0, tuple(range(40, 60)), 4),
    PlannedRequest(0.05, tuple(range(70, 95)), 5),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return folder


def side_options(folder: Path) -> SideOptions:
    return SideOptions(
        folder=folder,
        device="cpu",
        dtype="float32",
        max_model_len=64,
        max_num_seqs=3,
        max_num_batched_tokens=64,
        gpu_memory_utilization=0.9,
        num_kv_blocks=64,
    )


def check_arrivals(records: list[RequestRecord]) -> None:
    assert [record.prompt_tokens for record in records] == [30, 20, 25]
    assert [record.num_output_tokens for record in records] == [6, 4, 5]
    start_s = records[0].scheduled_s
    assert records[2].scheduled_s - start_s == pytest.approx(0.05, abs=1e-5)
    for record in records:
        assert record.sent_s == record.scheduled_s <= record.token_times_s[0]
        assert record.token_times_s == sorted(record.token_times_s)
        assert record.ended_s == record.token_times_s[-1]


@pytest.mark.parametrize("name", ["paceline", "transformers"])
def test_sides_send_requests_when_they_are_due(name: str, folder: Path) -> None:
    side = SIDES[name](side_options(folder))
    for _ in range(2):  # a side is used for many loads
        check_arrivals(side.generate(PLANNED))
    assert json.dumps(side.describe())


class FakeVllmEngine:
    """Steps like vLLM's with async scheduling: the tokens of a step come with the next one."""

    def __init__(self) -> None:
        self.open: dict[str, int] = {}
        self.launched: list[str] = []
        self.vllm_config = SimpleNamespace(
            scheduler_config=SimpleNamespace(
                max_num_seqs=1024, max_num_batched_tokens=16384, async_scheduling=True
            ),
            cache_config=SimpleNamespace(num_gpu_blocks=99),
        )

    def add_request(self, name: str, prompt: dict[str, list[int]], sampling: Any) -> None:
        assert prompt["prompt_token_ids"]
        self.open[name] = sampling.max_tokens

    def has_unfinished_requests(self) -> bool:
        return bool(self.open)

    def step(self) -> list[Any]:
        ready, self.launched = self.launched, list(self.open)
        outputs = []
        for name in ready:
            if name in self.open:
                self.open[name] -= 1
                completion = SimpleNamespace(token_ids=[7])
                outputs.append(SimpleNamespace(request_id=name, outputs=[completion]))
        self.open = {name: count for name, count in self.open.items() if count}
        return outputs


def test_vllm_is_stepped_while_there_is_work_and_may_return_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm: Any = SimpleNamespace(
        __version__="0",
        LLM=lambda **options: SimpleNamespace(llm_engine=FakeVllmEngine()),
        SamplingParams=SimpleNamespace,
        sampling_params=SimpleNamespace(RequestOutputKind=SimpleNamespace(DELTA="delta")),
    )
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    side = SIDES["vllm"](side_options(folder))
    for _ in range(2):
        check_arrivals(side.generate(PLANNED))
    described = side.describe()
    assert (described["max_num_seqs"], described["num_kv_blocks"]) == (1024, 99)


def test_a_process_is_followed_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('kept'); sys.stderr.write('shown\\n'); sys.exit(3)"
    ended = run_to_end([sys.executable, "-c", code], TIMEOUT_S)
    assert ended.status == 3
    assert sorted(ended.last_lines.split()) == ["kept", "shown"]
    assert capsys.readouterr() == ("", "shown\n")


def test_a_process_is_killed_at_its_deadline() -> None:
    ended = run_to_end([sys.executable, "-c", "import time; time.sleep(3600)"], 0.01)
    assert ended.status is None


def compare_arguments(folder: Path, output: Path) -> list[str]:
    arguments = f"--model {folder} --device cpu --dtype float32 --num-kv-blocks 64"
    arguments += f" --max-num-batched-tokens 64 --output {output}"
    return arguments.split()


def test_the_command_compares_loads_and_traces_with_transformers_on_a_cpu(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, trace = tmp_path / "compare.json", tmp_path / "trace.jsonl"
    lines = [
        f'{{"timestamp": {at}, "input_length": {length}, "output_length": 4}}\n'
        for at, length in ((0, 20), (50, 100), (90, 25))
    ]
    trace.write_text("".join(lines))
    options = ["--loads", "3x20+5,1x30+4", "--trace", f"{trace}:3@50", "--max-model-len", "60"]
    compare.main([*compare_arguments(folder, output), *options])
    result = json.loads(output.read_text())["result"]
    loads = ["3x20+5", "1x30+4", f"{trace}:3@50"]
    for side in ("paceline", "transformers"):
        [found] = result["rounds"][side]
        assert list(found["loads"]) == loads
        assert result["medians"][side] == found["loads"]
        assert found["loads"][loads[0]]["output_tokens_per_s"] > 0
        traced = found["loads"][loads[2]]
        assert (traced["num_requests"], traced["num_left_out"]) == (2, 1)
        assert traced["ttft"]["p99"] >= traced["ttft"]["p50"] > 0
    rates = [result["medians"][side][loads[1]]["output_tokens_per_s"] for side in result["medians"]]
    assert result["ratios"][loads[1]]["output_tokens_per_s"] == rates[0] / rates[1]
    assert result["failures"] == []
    said = capsys.readouterr().err
    for side in result["rounds"]:
        for load in loads:
            assert f"{side}, {load}: " in said
    assert "1 requests left out, longer than --max-model-len" in said


def test_a_side_that_fails_leaves_the_others_results(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "compare.json"
    arguments = [*compare_arguments(folder, output), "--loads", "2x20+4", "--peer", "vllm"]
    with pytest.raises(SystemExit, match="1 of the sides' runs failed"):
        compare.main(arguments)
    result = json.loads(output.read_text())["result"]
    assert list(result["medians"]["paceline"]) == ["2x20+4"]
    assert result["medians"]["vllm"] == result["ratios"] == {}
    [failure] = result["failures"]
    assert (failure["side"], failure["round"]) == ("vllm", 1)
    assert "No module named 'vllm'" in failure["last_lines"]
    assert "vllm, round 1: ended with status 1. Its last lines:" in capsys.readouterr().err


def test_what_a_side_measured_before_it_failed_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[dict[str, Any]] = []

    def run(command: list[str], timeout_s: float) -> Ended:
        if command[-3] == "paceline":
            found = {"gpu": None, "loads": {"1x8+8": {"rate": 2.0}}}
            Path(command[-1]).write_text(json.dumps(found))
        return Ended(None, "gone")

    monkeypatch.setattr(compare, "run_to_end", run)
    options = argparse.Namespace(sides=["paceline", "vllm"], rounds=2, side_timeout=5.0)
    result = compare.compare(options, [], lambda found: written.append(copy.deepcopy(found)))
    assert [len(found["failures"]) for found in written] == [1, 2, 3, 4]
    assert [len(found["rounds"]["paceline"]) for found in written] == [1, 1, 2, 2]
    assert written[-1] == result
    assert result["medians"] == {"paceline": {"1x8+8": {"rate": 2.0}}, "vllm": {}}
    assert result["failures"][0]["how"] == "was not done after 5 s (--side-timeout)"


def test_what_a_side_measured_before_the_run_was_told_to_stop_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(command: list[str], timeout_s: float) -> Ended:
        found = {"gpu": None, "loads": {"1x8+4": {"duration_s": 2.0}}}
        Path(command[-1]).write_text(json.dumps(found))
        raise SystemExit(143)

    monkeypatch.setattr(compare, "run_to_end", run)
    options = argparse.Namespace(sides=["paceline", "vllm"], rounds=1, side_timeout=TIMEOUT_S)
    written: list[dict[str, Any]] = []
    with pytest.raises(SystemExit):
        compare.compare(options, [], lambda found: written.append(copy.deepcopy(found)))
    assert written[-1]["medians"]["paceline"] == {"1x8+4": {"duration_s": 2.0}}


def test_one_side_alone_has_no_ratio() -> None:
    result = compare.summary({"paceline": [{"gpu": "H200", "loads": {"1x8+8": {"rate": 1.0}}}]}, [])
    assert result["gpu"] == "H200"
    assert result["ratios"] == {}
    assert compare.parse_sides("paceline", "vllm") == ["paceline"]
    assert compare.parse_sides("vllm,paceline", "vllm") == ["vllm", "paceline"]
    for wrong in ("", "transformers", "paceline,paceline"):
        with pytest.raises(ConfigError, match=r"--sides is .* must be paceline, vllm"):
            compare.parse_sides(wrong, "vllm")


def test_wrong_loads_are_said_before_a_side_starts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--loads is"):
        compare.main([*compare_arguments(folder, tmp_path / "c.json"), "--loads", "8x1024"])


def test_neither_ray_nor_grpc_is_needed() -> None:
    code = (
        "import sys, paceline.bench.compare, paceline.bench.offline\n"
        "print({name.split('.')[0] for name in sys.modules} & {'ray', 'grpc', 'google'})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
