"""Orders of events between real workers that one failpoint makes certain."""

from pathlib import Path

import grpc
import pytest
from deployment import run_deployment, token_request
from tiny_models import prepare, write_tiny_model

PROMPT = [5 + 3 * position % 200 for position in range(40)]


async def test_first_token_keeps_its_log_probability_when_the_echo_comes_first(
    tmp_path: Path,
) -> None:
    """The prefill worker's report is late by a second, the decode worker's echo is not."""
    write_tiny_model(tmp_path)
    model, folder = prepare(tmp_path, tmp_path / "cache")
    async with run_deployment(model, folder, tmp_path, tmp_path / "workers.log") as deployment:
        deployment.worker("prefill").ask("arm", specification="published:delay=1")
        request = token_request(PROMPT, max_tokens=3, logprobs=2)
        tokens = [
            token
            async for response in deployment.stub.Generate(request, timeout=60)
            for token in response.tokens
        ]
    assert len(tokens) == 3
    assert [len(token.top_logprobs) for token in tokens] == [2, 2, 2]


async def test_request_that_ends_with_its_first_token_runs_once_however_late_its_report(
    tmp_path: Path,
) -> None:
    """The lease's end reaches the router, through the decode worker, before the token does."""
    write_tiny_model(tmp_path)
    model, folder = prepare(tmp_path, tmp_path / "cache")
    async with run_deployment(model, folder, tmp_path, tmp_path / "workers.log") as deployment:
        deployment.worker("prefill").ask("arm", specification="published:delay=1")
        output = await deployment.generate(token_request(PROMPT, max_tokens=1))
        await deployment.assert_nothing_left()
    assert len(output.tokens[0]) == 1
    assert output.usage.resumed == 0


async def test_more_choices_than_a_worker_runs_are_refused_at_once_with_the_numbers(
    tmp_path: Path,
) -> None:
    write_tiny_model(tmp_path)
    model, folder = prepare(tmp_path, tmp_path / "cache")
    async with run_deployment(model, folder, tmp_path, tmp_path / "workers.log") as deployment:
        request = token_request(PROMPT, max_tokens=4, n=20)
        responses = aiter(deployment.stub.Generate(request, timeout=3.0))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await anext(responses)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT, failure.value.code()
    assert "max_num_seqs" in (failure.value.details() or "")
