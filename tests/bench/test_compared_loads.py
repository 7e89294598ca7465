"""Loads are what --loads and --trace say, or a message says what is wrong with them."""

from pathlib import Path

import pytest

from paceline.bench.compared_loads import PlannedLoad, plan_loads
from paceline.bench.load import PlannedRequest, Vocabulary
from paceline.errors import ConfigError

VOCABULARY = Vocabulary(100, frozenset())


def plan(loads: str, trace: str = "", max_model_len: int | None = None) -> list[PlannedLoad]:
    return plan_loads(loads, trace, VOCABULARY, max_model_len, seed=5)


def write_trace(path: Path, lengths: list[tuple[int, int]]) -> Path:
    path.write_text(
        "".join(
            f'{{"timestamp": {number**2 * 100}, "input_length": {i}, "output_length": {o}}}\n'
            for number, (i, o) in enumerate(lengths, start=3)
        )
    )
    return path


def lengths(load: PlannedLoad) -> list[tuple[int, int]]:
    return [(len(request.prompt), request.max_tokens) for request in load.requests]


def test_closed_loads_come_all_at_once() -> None:
    first, second = plan("3x10+4,1x20+5")
    assert (first.name, second.name) == ("3x10+4", "1x20+5")
    assert lengths(first) == [(10, 4)] * 3
    assert (first.max_tokens, second.max_tokens) == (14, 25)
    assert {request.at_s for request in first.requests} == {0.0}


def test_no_prompt_begins_like_another() -> None:
    loads = plan("2x16+4,2x16+5", "azure-conversation:2,azure-conversation:2@1")
    prompts = [request.prompt[:16] for load in loads for request in load.requests]
    prompts += [request.prompt[:16] for load in loads for request in load.warm_up()]
    assert len(set(prompts)) == len(prompts)


def test_traces_keep_their_lengths_and_scale_their_gaps(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", [(7, 3), (9, 1), (5, 2), (6, 6)])
    timed, at_once = plan("", f"{trace}:3@4,{trace}:4")
    assert timed.name == f"{trace}:3@4"
    assert lengths(timed) == [(7, 3), (9, 1), (5, 2)]
    # The gaps, 0.7 and 0.9 s, have the mean of the rate.
    assert [request.at_s for request in timed.requests] == pytest.approx([0, 0.21875, 0.5])
    assert {request.at_s for request in at_once.requests} == {0.0}
    assert len(at_once.requests) == 4


def test_the_committed_trace_has_the_asked_rate() -> None:
    [load] = plan("", "azure-conversation:200@6.5")
    assert load.requests[-1].at_s == pytest.approx(199 / 6.5)
    assert load.num_left_out == 0
    assert load.max_tokens == 4176


def test_what_is_longer_than_the_model_is_left_out_and_counted(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", [(70, 3), (9, 1), (5, 2), (6, 6)])
    [load] = plan("", f"{trace}:4@2", max_model_len=11)
    assert lengths(load) == [(9, 1), (5, 2)]
    assert load.num_left_out == 2
    assert [request.at_s for request in load.requests] == pytest.approx([0, 0.5])


def test_warming_up_is_short_and_of_the_same_kind(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", [(70, 3), (300, 20), (80, 5)])
    [load] = plan("", f"{trace}:3@1")
    warm_up = load.warm_up()
    assert [(len(r.prompt), r.max_tokens) for r in warm_up] == [(64, 3), (300, 8), (64, 5)]
    assert {request.at_s for request in warm_up} == {0.0}
    assert warm_up[1] == PlannedRequest(0.0, load.requests[1].prompt[::-1], 8)


@pytest.mark.parametrize("wrong", ["8x1024", "8*1024+64", "8x1024+0", "0x8+8", "8x8+8x", "ax8+8"])
def test_loads_that_cannot_be_read_are_named(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"--loads is .*REQUESTSxINPUT\+OUTPUT.*8x1024\+64"):
        plan(f"1x8+8,{wrong}")


@pytest.mark.parametrize(
    "wrong", ["azure-conversation", "azure-conversation:0", "azure-conversation:9@0", "a:9@", ":9"]
)
def test_traces_that_cannot_be_read_are_named(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"--trace is .*TRACE:REQUESTS@RATE"):
        plan("", wrong)


def test_what_cannot_be_had_is_refused_with_numbers(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", [(7, 3), (9, 1)])
    with pytest.raises(ConfigError, match="1030 tokens, and --max-model-len is 1000"):
        plan("1x1000+30", max_model_len=1000)
    with pytest.raises(ConfigError, match=r"--trace asks for 3 requests of .* which has 2"):
        plan("", f"{trace}:3")
    with pytest.raises(ConfigError, match="none of its requests fits into --max-model-len"):
        plan("", f"{trace}:2", max_model_len=9)
    with pytest.raises(ConfigError, match="neither a file nor one of azure-conversation"):
        plan("", "azure:3")
    with pytest.raises(ConfigError, match="1 requests that arrive at once have no gaps"):
        plan("", f"{trace}:1@2")
    for loads in ("", "1x8+8,1x8+8"):
        with pytest.raises(ConfigError, match="at least one load, and none twice"):
            plan(loads)
