"""`paceline bench` against a real router with workers that compute nothing."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from router_deployment import RouterDeployment, router_deployment
from typer.testing import CliRunner

from paceline.bench.cli import bench
from paceline.errors import ConfigError

PROMPT_TOKENS = 32


def invoke(*arguments: str) -> Any:
    command = typer.Typer()
    command.command()(bench)
    return CliRunner().invoke(command, arguments)


async def run(deployment: RouterDeployment, *arguments: str) -> Any:
    """Send four short requests."""
    sizes = ("--requests", "4", "--output-tokens", "3")
    if "trace" not in arguments:
        sizes = (*sizes, "--input-tokens", str(PROMPT_TOKENS))
    address = ("--address", deployment.router.address, "--timeout-s", "20")
    result = await asyncio.to_thread(invoke, *address, *sizes, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return result


def prompts(deployment: RouterDeployment) -> list[tuple[int, ...]]:
    """Take the prompts that the prefill worker has received."""
    received = deployment.prefill.received
    taken = sorted(tuple(work.prompt.tolist()) for work in received)
    received.clear()
    return taken


async def test_each_run_has_prompts_of_its_own_and_its_seed_repeats_them(tmp_path: Path) -> None:
    async with router_deployment(tmp_path) as deployment:
        first: dict[str, Any] = json.loads((await run(deployment)).stdout)
        first_prompts = prompts(deployment)
        await run(deployment)
        assert not set(prompts(deployment)) & set(first_prompts)
        seed = str(first["config"]["seed"])
        again = json.loads((await run(deployment, "--seed", seed)).stdout)
        assert prompts(deployment) == first_prompts
        assert again["config"] == first["config"]


async def test_what_was_cached_before_the_load_is_reported_and_warned_of(tmp_path: Path) -> None:
    async with router_deployment(tmp_path) as deployment:
        result = await run(deployment)
        assert json.loads(result.stdout)["summary"]["cached_share"] == 0.0
        assert "warning" not in result.stderr
        deployment.prefill.num_cached_tokens = 16
        result = await run(deployment)
        assert json.loads(result.stdout)["summary"]["cached_share"] == 0.5
        assert "warning: 50.0% of prompt tokens were cached" in result.stderr


@pytest.mark.parametrize(
    ("load", "option", "belongs"),
    [
        ("closed", "--rate", "--load open"),
        ("closed", "--speed", "--load trace"),
        ("open", "--concurrency", "--load closed"),
        ("trace", "--input-tokens", "--load closed or --load open"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(
    load: str, option: str, belongs: str
) -> None:
    error = invoke("--load", load, option, "5").exception
    assert isinstance(error, ConfigError)
    assert f"{option} changes nothing in a load that is {load}" in str(error)
    assert f"belongs to {belongs}." in str(error)


async def test_requests_of_a_trace_that_are_cut_are_counted(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lengths = ((20, 3), (900, 2), (10, 3), (10, 8))
    trace.write_text(
        "".join(
            json.dumps({"timestamp": 0, "input_length": inputs, "output_length": outputs}) + "\n"
            for inputs, outputs in lengths
        )
    )
    async with router_deployment(tmp_path) as deployment:
        result = await run(deployment, "--load", "trace", "--trace", str(trace))
        assert "warning: 2 of 4 requests are longer in the trace" in result.stderr
        assert {"rate", "concurrency", "input_tokens"}.isdisjoint(
            json.loads(result.stdout)["config"]
        )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--load", "trace", "--trace", "no-such-file"), "'no-such-file' does not exist"),
        (("--seed", "-1"), "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_used_is_refused_before_a_router_is_asked(
    arguments: tuple[str, ...], words: str
) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("option", ["--output", "--page"])
def test_a_result_that_could_not_be_kept_is_refused_before_the_load(
    option: str, tmp_path: Path
) -> None:
    error = invoke(option, str(tmp_path / "absent" / "file")).exception
    assert isinstance(error, ConfigError)
    assert "absent/file cannot be written: No such file or directory" in str(error)
