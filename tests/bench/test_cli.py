"""`paceline bench` against a real router with workers that compute nothing."""

import asyncio
import json
from pathlib import Path
from typing import Any

import typer
from click.testing import Result
from router_deployment import RouterDeployment, router_deployment
from typer.testing import CliRunner

from paceline.bench.cli import bench

PROMPT_TOKENS = 32


async def run(deployment: RouterDeployment, *arguments: str) -> Result:
    command = typer.Typer()
    command.command()(bench)
    sizes = ("--requests", "4", "--input-tokens", str(PROMPT_TOKENS), "--output-tokens", "3")
    address = ("--address", deployment.router.address, "--timeout-s", "20")
    result = await asyncio.to_thread(
        CliRunner().invoke, command, [*address, *sizes, "--json", *arguments]
    )
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
