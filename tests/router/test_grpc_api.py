"""What clients see of the public API when nothing is generated: errors, health, the model."""

import asyncio
import math
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from router_deployment import RouterDeployment, router_deployment, until
from tiny_tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE, byte_ids

from paceline.router.server import SERVICE_NAME
from paceline.router.settings import RouterSettings
from paceline.v1 import inference_pb2 as pb


def make_chat(*messages: tuple[str, str]) -> pb.ChatPrompt:
    return pb.ChatPrompt(
        messages=[pb.ChatMessage(role=role, content=content) for role, content in messages]
    )


async def refusal(
    deployment: RouterDeployment, request: pb.GenerateRequest
) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await deployment.generate(request)
    return caught.value


def violations(error: grpc.aio.AioRpcError) -> dict[str, str]:
    bad_request = error_details_pb2.BadRequest()
    status = rpc_status.from_call(_Finished(error))
    assert status is not None
    assert status.details[0].Unpack(bad_request)
    return {v.field: v.description for v in bad_request.field_violations}


class _Finished:
    """What rpc_status wants of a call, from an error of grpc.aio."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self._error = error

    def trailing_metadata(self) -> list[tuple[str, str | bytes]]:
        return list(self._error.trailing_metadata())

    def code(self) -> grpc.StatusCode:
        return self._error.code()

    def details(self) -> str | None:
        return self._error.details()


@pytest.mark.parametrize(
    ("request_", "field", "description"),
    [
        (pb.GenerateRequest(), "prompt", "is missing"),
        (pb.GenerateRequest(text=""), "text", "the prompt is empty"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids", "the prompt is empty"),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, VOCAB_SIZE])),
            "token_ids",
            "the first is 260 at position 1",
        ),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**32 - 1])),
            "token_ids",
            "the first is 4294967295 at position 0",
        ),
        (pb.GenerateRequest(text="x" * 512), "text", "has 512 tokens, and model.max_model_len"),
        (
            pb.GenerateRequest(text="x" * 500, sampling=pb.SamplingParams(max_tokens=13)),
            "sampling.max_tokens",
            "lower max_tokens to at most 12",
        ),
        (pb.GenerateRequest(text="x", timeout_s=-1), "timeout_s", "must be between 0"),
        (pb.GenerateRequest(text="x", timeout_s=math.nan), "timeout_s", "must be between 0"),
        (
            pb.GenerateRequest(text="x", sampling=pb.SamplingParams(stop=["a", "b<eos>"])),
            "sampling.stop[1]",
            "contains '<eos>', a special token",
        ),
        (pb.GenerateRequest(chat=pb.ChatPrompt()), "chat.messages", "at least one message"),
        (pb.GenerateRequest(chat=make_chat(("pirate", "a"))), "chat.messages", "no such role"),
    ],
)
async def test_bad_requests_name_the_field_and_say_why(
    tmp_path: Path, request_: pb.GenerateRequest, field: str, description: str
) -> None:
    async with router_deployment(tmp_path, workers=False) as deployment:
        error = await refusal(deployment, request_)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert description in violations(error)[field]


async def test_all_violations_come_at_once(tmp_path: Path) -> None:
    async with router_deployment(tmp_path, workers=False) as deployment:
        sampling = pb.SamplingParams(temperature=math.nan, top_p=-3, n=10**6, max_tokens=0)
        request = pb.GenerateRequest(text="", sampling=sampling, timeout_s=-5)
        error = await refusal(deployment, request)
        assert set(violations(error)) == {
            "timeout_s",
            "text",
            "sampling.temperature",
            "sampling.top_p",
            "sampling.n",
            "sampling.max_tokens",
        }


async def test_thousands_of_violations_still_fit_into_the_trailers(tmp_path: Path) -> None:
    async with router_deployment(tmp_path, workers=False) as deployment:
        sampling = pb.SamplingParams(logit_bias={10**9 + i: math.inf for i in range(1000)})
        error = await refusal(deployment, pb.GenerateRequest(text="x", sampling=sampling))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "sampling.logit_bias" in violations(error)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (
            pb.GenerateRequest(
                text="x", sampling=pb.SamplingParams(stop_token_ids=[60_000] * 300_000)
            ),
            "sampling.stop_token_ids: has 300000 entries, at most 64",
        ),
        (
            pb.GenerateRequest(text="x", sampling=pb.SamplingParams(stop=["a"] * 200_000)),
            "sampling.stop: has 200000 entries, at most 16",
        ),
        (
            pb.GenerateRequest(chat=pb.ChatPrompt(messages=[pb.ChatMessage()] * 500_000)),
            "chat.messages: has 500000 messages, at most 8192",
        ),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 1_000_000)),
            "token_ids: the prompt has 1000000 tokens, and model.max_model_len is 512",
        ),
        (
            pb.GenerateRequest(text="x", request_id="\n" * 1_000_000),
            "request_id: has 1000000 characters, at most 128",
        ),
        (pb.GenerateRequest(text="x", model="m" * 1_000_000), "(1000000 characters)"),
    ],
)
async def test_what_is_too_much_is_refused_before_it_is_read_and_never_logged_whole(
    tmp_path: Path,
    request_: pb.GenerateRequest,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    async with router_deployment(tmp_path, workers=False) as deployment:
        error = await refusal(deployment, request_)
    assert said in str(error.details())
    assert max(len(record.getMessage()) for record in caplog.records) < 6000


async def test_unknown_model_is_not_found(tmp_path: Path) -> None:
    async with router_deployment(tmp_path, workers=False) as deployment:
        error = await refusal(deployment, pb.GenerateRequest(model="gpt", text="x"))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert "this deployment serves 'tiny'" in str(error.details())


async def test_request_larger_than_every_pool_is_refused_at_once(tmp_path: Path) -> None:
    async with router_deployment(tmp_path, num_blocks=4) as deployment:
        error = await refusal(deployment, pb.GenerateRequest(text="x" * 100))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "largest decode worker has 4" in violations(error)["prompt"]


async def test_full_queue_answers_at_once_with_a_retry_delay(tmp_path: Path) -> None:
    settings = RouterSettings(grpc_port=0, max_queue_requests=1, drain_timeout_s=0)
    async with router_deployment(tmp_path, settings=settings, workers=False) as deployment:
        first = asyncio.create_task(deployment.generate(pb.GenerateRequest(text="x")))
        await until(lambda: deployment.router.status().num_waiting == 1, "the first waits")
        error = await refusal(deployment, pb.GenerateRequest(text="y"))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "router.max_queue_requests is 1" in str(error.details())
        status = rpc_status.from_call(_Finished(error))
        assert status is not None
        retry = error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(retry)
        assert retry.retry_delay.ToNanoseconds() > 0
        first.cancel()
        await deployment.idle()


async def test_a_wait_beyond_the_deadline_is_answered_before_the_prompt_is_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with router_deployment(tmp_path, workers=False) as deployment:
        first = asyncio.create_task(deployment.generate(pb.GenerateRequest(text="x")))
        await until(lambda: deployment.router.status().num_waiting == 1, "the first waits")
        deadlines = deployment.router._dispatcher._deadlines
        for number in range(1, 20):  # work leaves every 10 s
            deadlines._pace.left(1, asyncio.get_running_loop().time() + 10.0 * number)
        deadlines._taken_s = math.inf  # no request gets through whatever its deadline
        monkeypatch.setattr(deployment.router._generations, "_validated_prompt", None)
        error = await refusal(deployment, pb.GenerateRequest(text="y", timeout_s=5.0))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "behind 1 others" in str(error.details())
        status = rpc_status.from_call(_Finished(error))
        assert status is not None
        assert status.details[0].Is(error_details_pb2.RetryInfo.DESCRIPTOR)
        first.cancel()
        await deployment.idle()


async def test_tokenize_gives_the_ids_that_generate_would_use(tmp_path: Path) -> None:
    async with router_deployment(tmp_path, workers=False) as deployment:
        answer = await deployment.stub.Tokenize(pb.TokenizeRequest(text="hi"))
        assert list(answer.token_ids) == byte_ids("hi")
        answer = await deployment.stub.Tokenize(pb.TokenizeRequest(chat=make_chat(("user", "hi"))))
        assert list(answer.token_ids) == [BOS_ID, *byte_ids("[user]hi\n[assistant]")]
        with pytest.raises(grpc.aio.AioRpcError, match="is missing"):
            await deployment.stub.Tokenize(pb.TokenizeRequest())


async def test_model_info_has_the_models_limits(tmp_path: Path) -> None:
    async with router_deployment(tmp_path, workers=False) as deployment:
        info = await deployment.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (info.model, info.max_model_len, info.vocab_size) == ("tiny", 512, VOCAB_SIZE)
        assert list(info.eos_token_ids) == [EOS_ID]
        assert info.has_chat_template


async def test_health_of_the_service_follows_whether_workers_can_serve(tmp_path: Path) -> None:
    async with router_deployment(tmp_path) as deployment:
        health = health_pb2_grpc.HealthStub(deployment.channel)
        serving = health_pb2.HealthCheckResponse.SERVING
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING

        async def status_of(service: str) -> int:
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            return int(answer.status)

        assert await status_of("") == serving
        assert await status_of(SERVICE_NAME) == serving
        await deployment.decode.kill()
        await until(lambda: not deployment.router.status().can_serve, "the death is seen")
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
        async for answer in watch:
            if answer.status == not_serving:
                break
        watch.cancel()
        assert await status_of("") == serving


async def test_reflection_lists_the_public_services(tmp_path: Path) -> None:
    async with router_deployment(tmp_path, workers=False) as deployment:
        stub = reflection_pb2_grpc.ServerReflectionStub(deployment.channel)
        call = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        async for answer in call:
            names = {service.name for service in answer.list_services_response.service}
            assert {SERVICE_NAME, "grpc.health.v1.Health"} <= names
            break
        call.cancel()
