"""Scaling down, clients that go away, deadlines: nothing fails that need not, nothing is left."""

import asyncio
import time
from pathlib import Path

import grpc
import pytest
from deployment import Deployment, run_deployment, token_request
from reference import greedy_tokens
from tiny_models import prepare, write_tiny_model

PROMPT = [5 + 3 * position % 200 for position in range(70)]


async def test_scaling_a_pool_down_under_load_fails_no_request(tmp_path: Path) -> None:
    reference = write_tiny_model(tmp_path)
    model, folder = prepare(tmp_path, tmp_path / "cache")
    async with run_deployment(
        model, folder, tmp_path, tmp_path / "workers.log", num_prefill=2, num_decode=2
    ) as deployment:
        prompts = [[*PROMPT, number] for number in range(3, 15)]
        running = [
            asyncio.create_task(deployment.generate(token_request(prompt, max_tokens=200)))
            for prompt in prompts
        ]
        await deployment.eventually(
            lambda: all(w.ask("status")["num_steps"] > 0 for w in deployment.workers),
            "every worker at work",
        )
        for role in ("decode", "prefill"):
            await deployment.remove(deployment.worker(role))
        outputs = await asyncio.gather(*running)
        await deployment.assert_nothing_left()
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.tokens[0] == greedy_tokens(reference, prompt, 200)


class Stream:
    """A long request that has given its first token."""

    def __init__(self, deployment: Deployment, **options: float) -> None:
        request = token_request(PROMPT, max_tokens=900, n=2)
        self.call = deployment.stub.Generate(request, **options)
        self.responses = aiter(self.call)

    async def read(self) -> None:
        response = await anext(self.responses)
        assert response.tokens

    async def read_to_the_end(self) -> None:
        async for response in self.responses:
            assert response.request_id


async def test_a_client_that_goes_away_frees_everything_soon(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    model, folder = prepare(tmp_path, tmp_path / "cache")
    async with run_deployment(model, folder, tmp_path, tmp_path / "workers.log") as deployment:
        stream = Stream(deployment)
        await stream.read()
        decode = deployment.worker("decode")
        await deployment.eventually(
            lambda: decode.ask("status")["num_running"] > 0, "running at the decode worker"
        )
        stream.call.cancel()
        cancelled = time.monotonic()
        await deployment.eventually(
            lambda: decode.ask("status")["num_running"] == 0, "empty after a cancel"
        )
        # One step, which takes milliseconds here, plus a second.
        assert time.monotonic() - cancelled < 2.0
        await deployment.assert_nothing_left()


async def test_a_deadline_ends_the_request_and_frees_everything(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    model, folder = prepare(tmp_path, tmp_path / "cache")
    async with run_deployment(model, folder, tmp_path, tmp_path / "workers.log") as deployment:
        stream = Stream(deployment, timeout=1.0)
        await stream.read()
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stream.read_to_the_end()
        assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await deployment.assert_nothing_left()


async def test_requests_wait_for_workers_that_are_still_starting(tmp_path: Path) -> None:
    reference = write_tiny_model(tmp_path)
    model, folder = prepare(tmp_path, tmp_path / "cache")
    async with run_deployment(
        model, folder, tmp_path, tmp_path / "workers.log", num_prefill=0
    ) as deployment:
        waiting = asyncio.create_task(deployment.generate(token_request(PROMPT, max_tokens=5)))
        await deployment.join(deployment.spawn("prefill"))
        output = await waiting
        assert output.tokens[0] == greedy_tokens(reference, PROMPT, 5)
