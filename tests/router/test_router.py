"""One router with fake workers over real gRPC: streams, failures, and what is left behind."""

import asyncio
import logging
import time
from pathlib import Path

import grpc
import pytest
from fake_worker import FakeWorker, expected_output, script_oracle
from router_deployment import RouterDeployment, router_deployment, until
from tiny_tokenizer import BOS_ID, EOS_ID, byte_ids

from paceline.errors import ConfigError
from paceline.request import FailureReason
from paceline.router.capacity import UNLIMITED_LOCAL_PREFILL
from paceline.router.model import ServedModel
from paceline.router.server import Router
from paceline.router.settings import RouterSettings
from paceline.router.worker_view import Role
from paceline.v1 import inference_pb2 as pb


def make_request(
    text: str = "hello", *, max_tokens: int = 12, n: int = 1, **fields: object
) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=max_tokens, n=n)
    return pb.GenerateRequest(text=text, sampling=sampling, **fields)  # type: ignore[arg-type]


def wanted(deployment: RouterDeployment, text: str, num_tokens: int, choice: int = 0) -> list[int]:
    return expected_output(deployment.oracle, byte_ids(text), num_tokens, choice)


async def test_tokens_text_usage_and_times_come_in_order(tmp_path: Path) -> None:
    script = byte_ids("Grüße, 😀!")
    async with router_deployment(tmp_path, oracle=script_oracle(script)) as deployment:
        request = make_request(max_tokens=len(script), include_timeline=True, request_id="mine")
        answer = await deployment.generate(request)
        assert answer.tokens == {0: script}
        assert answer.texts == {0: "Grüße, 😀!"}
        assert answer.finish_reasons == {0: pb.FINISH_REASON_LENGTH}
        assert {message.request_id for message in answer.messages} == {"mine"}
        assert answer.last.usage.prompt_tokens == 5
        assert answer.last.usage.completion_tokens == len(script)
        assert answer.last.usage.resumed == 0
        assert answer.last.phase_times.prefill_s > 0
        assert answer.last.phase_times.decode_s > 0
        assert [span.phase for span in answer.last.timeline] == ["queue", "prefill", "decode"]
        assert not any(message.HasField("usage") for message in answer.messages[:-1])
        await deployment.idle()


async def test_the_wait_at_the_worker_is_a_phase_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with router_deployment(tmp_path) as deployment:
        deployment.workers["prefill-0"].prefill_s = 1e-6
        answer = await deployment.generate(make_request(include_timeline=True))
        times = answer.last.phase_times
        assert times.prefill_s == pytest.approx(1e-6, abs=5e-7)  # Unix seconds in a double
        assert times.wait_s > 10 * times.prefill_s
        wait = next(span for span in answer.last.timeline if span.phase == "wait")
        queue = next(span for span in answer.last.timeline if span.phase == "queue")
        assert wait.start_s == pytest.approx(queue.end_s, abs=1e-3)
        assert wait.end_s - wait.start_s == pytest.approx(times.wait_s, abs=1e-5)
        await deployment.idle()
    [line] = [r.getMessage() for r in caplog.records if r.getMessage().startswith("request_end")]
    assert f" wait_s={times.wait_s:.4f} prefill_s=" in line


async def test_a_proxy_in_the_environment_does_not_come_between_router_and_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with router_deployment(tmp_path, workers=False) as deployment:
        await deployment.channel.channel_ready()
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.delenv("no_proxy", raising=False)
        for role in Role:
            await deployment.add(FakeWorker(role, deployment.oracle, deployment.fabric))
        await deployment.connected()


async def test_choices_end_one_by_one_and_only_the_last_message_has_usage(tmp_path: Path) -> None:
    script = (byte_ids("abcdef"), byte_ids("uv!"))
    async with router_deployment(tmp_path, oracle=script_oracle(*script)) as deployment:
        request = make_request(max_tokens=6, n=2)
        request.sampling.stop_token_ids.append(byte_ids("!")[0])
        answer = await deployment.generate(request)
        assert answer.texts == {0: "abcdef", 1: "uv"}
        assert answer.tokens == {0: script[0], 1: script[1]}
        assert answer.finish_reasons == {0: pb.FINISH_REASON_LENGTH, 1: pb.FINISH_REASON_STOP}
        assert sum(message.HasField("usage") for message in answer.messages) == 1
        assert answer.last.usage.completion_tokens == 9
        await deployment.idle()


async def test_many_requests_share_small_pools_without_overdrawing_credit(tmp_path: Path) -> None:
    async with router_deployment(tmp_path, num_blocks=12) as deployment:
        texts = [f"prompt {number} " * 2 for number in range(30)]
        answers = await asyncio.gather(
            *(deployment.generate(make_request(text, n=1 + len(text) % 2)) for text in texts)
        )
        for text, answer in zip(texts, answers, strict=True):
            for choice, tokens in answer.tokens.items():
                assert tokens == wanted(deployment, text, 12, choice)
        await deployment.idle()
        assert deployment.decode.num_sessions == 1


async def test_colocated_worker_serves_alone(tmp_path: Path) -> None:
    async with router_deployment(tmp_path, workers=False) as deployment:
        await deployment.add(
            FakeWorker(
                Role.DECODE,
                deployment.oracle,
                deployment.fabric,
                local_prefill_tokens=UNLIMITED_LOCAL_PREFILL,
            )
        )
        answer = await deployment.generate(make_request())
        assert answer.tokens[0] == wanted(deployment, "hello", 12)


@pytest.mark.parametrize(
    ("victim", "hold_at"),
    [("prefill-0", 0), ("decode-0", 0), ("decode-0", 1), ("decode-0", 6), ("decode-0", 11)],
)
@pytest.mark.parametrize("n", [1, 3])
async def test_streams_go_on_at_a_replacement_when_a_worker_dies(
    tmp_path: Path, victim: str, hold_at: int, n: int
) -> None:
    async with router_deployment(tmp_path) as deployment:
        worker = deployment.workers[victim]
        worker.hold_at = hold_at
        call = asyncio.create_task(deployment.generate(make_request(n=n)))
        await until(
            lambda: any(
                sequence.output[hold_at - 1 :] or not hold_at
                for running in worker.running.values()
                for sequence in running.sequences
            ),
            f"the request is held at {hold_at}",
        )
        await worker.kill()
        await until(lambda: deployment.router.status().num_waiting > 0, "work is back in the queue")
        await deployment.replace(victim)
        answer = await call
        for choice in range(n):
            assert answer.tokens[choice] == wanted(deployment, "hello", 12, choice)
        assert answer.last.usage.resumed >= 1
        await deployment.idle()


async def test_worker_that_comes_back_under_the_same_incarnation_is_reached_again(
    tmp_path: Path,
) -> None:
    async with router_deployment(tmp_path) as deployment:
        deployment.decode.hold_at = 5
        call = asyncio.create_task(deployment.generate(make_request()))
        await until(lambda: bool(deployment.decode.running), "the request runs")
        await deployment.decode.kill()
        deployment.decode.hold_at = None
        await deployment.decode.start()
        assert (await call).tokens[0] == wanted(deployment, "hello", 12)


async def test_request_under_which_workers_go_on_dying_fails(tmp_path: Path) -> None:
    async with router_deployment(tmp_path) as deployment:
        deployment.decode.hold_at = 0
        call = asyncio.create_task(deployment.generate(make_request()))
        for _ in range(5):
            await until(lambda: bool(deployment.decode.running), "the request runs")
            await deployment.decode.kill()
            await until(lambda: not deployment.router.status().can_serve, "the death is seen")
            (await deployment.replace("decode-0")).hold_at = 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.ABORTED
        assert "router.max_lone_deaths 3" in str(caught.value.details())
        await deployment.idle()


@pytest.mark.parametrize("reason", set(FailureReason), ids=lambda reason: reason.name)
@pytest.mark.parametrize("role", list(Role), ids=lambda role: role.value)
async def test_work_that_a_worker_gives_back_goes_on(
    tmp_path: Path, role: Role, reason: FailureReason
) -> None:
    async with router_deployment(tmp_path) as deployment:
        worker = deployment.workers[f"{role.value}-0"]
        worker.failures.append((0 if role is Role.PREFILL else 4, reason))
        answer = await deployment.generate(make_request(n=2))
        assert not worker.failures
        for choice in range(2):
            assert answer.tokens[choice] == wanted(deployment, "hello", 12, choice)
        await deployment.idle()


async def test_refused_work_is_sent_again(tmp_path: Path) -> None:
    async with router_deployment(tmp_path) as deployment:
        deployment.decode.num_refusals_left = 3
        deployment.prefill.num_refusals_left = 1
        answer = await deployment.generate(make_request())
        assert answer.tokens[0] == wanted(deployment, "hello", 12)
        assert answer.last.usage.resumed == 0
        await deployment.idle()


async def test_message_larger_than_grpcs_default_reaches_the_workers(tmp_path: Path) -> None:
    """A message that they refused would end the streams, and with them all other requests."""
    ids = [200] * 2_200_000  # two bytes each
    settings = RouterSettings(grpc_port=0, drain_timeout_s=0.0, max_request_bytes=8 << 20)
    async with router_deployment(
        tmp_path, settings=settings, max_model_len=1 << 22, num_blocks=1 << 18
    ) as deployment:
        deployment.decode.hold_at = 1
        other = asyncio.create_task(deployment.generate(make_request(max_tokens=2)))
        await until(lambda: bool(deployment.decode.running), "another request runs")
        large = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=ids), sampling=pb.SamplingParams(max_tokens=1)
        )
        assert large.ByteSize() > 4 << 20
        answer = await deployment.generate(large)
        assert len(answer.tokens[0]) == 1
        deployment.decode.hold_at = None
        assert (await other).last.usage.resumed == 0
        assert deployment.decode.num_sessions == deployment.prefill.num_sessions == 1


async def test_request_larger_than_the_setting_ends_alone(tmp_path: Path) -> None:
    settings = RouterSettings(grpc_port=0, drain_timeout_s=0.0, max_request_bytes=1024)
    async with router_deployment(tmp_path, settings=settings) as deployment:
        deployment.decode.hold_at = 1
        other = asyncio.create_task(deployment.generate(make_request(max_tokens=2)))
        await until(lambda: bool(deployment.decode.running), "another request runs")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await deployment.generate(make_request("x" * 2000))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        deployment.decode.hold_at = None
        assert (await other).last.usage.resumed == 0


async def test_worker_that_does_not_say_how_many_sequences_it_runs_is_not_used(
    tmp_path: Path,
) -> None:
    async with router_deployment(tmp_path, workers=False) as deployment:
        await deployment.add(
            FakeWorker(Role.DECODE, deployment.oracle, deployment.fabric, max_num_seqs=0)
        )
        await until(
            lambda: "lacks max_num_seqs" in deployment.router.status().workers[0].message,
            "the refusal is in the status",
        )


async def test_more_choices_than_a_worker_runs_at_once_wait_for_each_other(tmp_path: Path) -> None:
    async with router_deployment(tmp_path, workers=False) as deployment:
        for role in Role:
            await deployment.add(
                FakeWorker(role, deployment.oracle, deployment.fabric, max_num_seqs=3)
            )
        await deployment.connected()
        answers = await asyncio.gather(
            *(deployment.generate(make_request(n=1 + number % 3)) for number in range(9))
        )
        for answer in answers:
            for choice, tokens in answer.tokens.items():
                assert tokens == wanted(deployment, "hello", 12, choice)
        with pytest.raises(grpc.aio.AioRpcError, match=r"sampling\.n: 4 choices"):
            await deployment.generate(make_request(n=4))
        await deployment.idle()


@pytest.mark.parametrize("held", ["prefill-0", "decode-0"])
async def test_client_that_goes_away_frees_both_workers(tmp_path: Path, held: str) -> None:
    async with router_deployment(tmp_path) as deployment:
        deployment.workers[held].hold_at = 0 if held == "prefill-0" else 4
        call = asyncio.create_task(deployment.generate(make_request()))
        await until(lambda: all(w.received for w in deployment.workers.values()), "it runs")
        call.cancel()
        await deployment.idle()


async def test_client_that_goes_away_leaves_the_queue(tmp_path: Path) -> None:
    async with router_deployment(tmp_path, workers=False) as deployment:
        call = asyncio.create_task(deployment.generate(make_request()))
        await until(lambda: deployment.router.status().num_waiting == 1, "it waits")
        call.cancel()
        await deployment.idle()


@pytest.mark.parametrize("by", ["timeout_s", "the call's deadline"])
@pytest.mark.parametrize("hold", [True, False])
async def test_deadline_ends_the_request_and_frees_everything(
    tmp_path: Path, by: str, hold: bool
) -> None:
    async with router_deployment(tmp_path, workers=hold) as deployment:
        for worker in deployment.workers.values():
            worker.hold_at = 0
        seconds = 0.3
        own = by == "timeout_s"
        request = make_request(timeout_s=seconds if own else 0.0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await deployment.generate(request, deadline_s=None if own else seconds)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        if own:
            assert "the limit was timeout_s, 0.3 s" in str(caught.value.details())
        await deployment.idle()


async def test_stop_string_ends_the_stream_and_the_work(tmp_path: Path) -> None:
    script = byte_ids("one two STOP three " * 20)
    async with router_deployment(tmp_path, oracle=script_oracle(script)) as deployment:
        request = make_request(max_tokens=300)
        request.sampling.stop.append("STOP")
        answer = await deployment.generate(request)
        assert answer.texts == {0: "one two "}
        assert answer.tokens == {0: byte_ids("one two STOP")}
        assert answer.finish_reasons == {0: pb.FINISH_REASON_STOP}
        assert answer.last.usage.completion_tokens == len("one two STOP")
        await deployment.idle()


@pytest.mark.parametrize("end", [[BOS_ID], byte_ids("<bos>")])
async def test_stop_string_that_is_a_special_token_stops_at_the_token_and_where_it_is_spelled(
    tmp_path: Path, end: list[int]
) -> None:
    script = [*byte_ids("one"), *end, *byte_ids(" two")]
    async with router_deployment(tmp_path, oracle=script_oracle(script)) as deployment:
        request = make_request(max_tokens=len(script))
        request.sampling.stop.append("<bos>")
        answer = await deployment.generate(request)
        assert answer.texts == {0: "one"}
        assert answer.tokens == {0: [*byte_ids("one"), *end]}
        assert answer.finish_reasons == {0: pb.FINISH_REASON_STOP}
        await deployment.idle()


async def test_end_of_sequence_token_is_reported_without_text(tmp_path: Path) -> None:
    script = [*byte_ids("ab"), EOS_ID]
    async with router_deployment(tmp_path, oracle=script_oracle(script)) as deployment:
        request = make_request()
        request.sampling.stop_token_ids.append(EOS_ID)
        answer = await deployment.generate(request)
        assert answer.tokens == {0: script}
        assert answer.texts == {0: "ab"}


async def test_logprobs_come_with_every_token_when_asked_for(tmp_path: Path) -> None:
    async with router_deployment(tmp_path) as deployment:
        request = make_request()
        request.sampling.logprobs = 1
        answer = await deployment.generate(request)
        tokens = [token for message in answer.messages for token in message.tokens]
        assert len(tokens) == 12
        assert all(token.logprob == -0.5 for token in tokens)
        assert all(token.top_logprobs[0].token_id == token.token_id for token in tokens)


async def test_draining_worker_finishes_its_streams_and_gets_no_new_work(tmp_path: Path) -> None:
    async with router_deployment(tmp_path) as deployment:
        draining = deployment.decode
        draining.hold_at = 3
        call = asyncio.create_task(deployment.generate(make_request()))
        await until(lambda: bool(draining.running), "the first request runs")
        second = FakeWorker(
            Role.DECODE, deployment.oracle, deployment.fabric, worker_id="decode-1", num_blocks=50
        )
        await deployment.add(second)
        await deployment.connected()
        draining.draining = True
        draining.hold_at = 4
        await until(
            lambda: any(link.is_draining for link in deployment.router.status().workers),
            "the router knows",
        )
        num_received = len(draining.received)
        await deployment.generate(make_request("another"))
        draining.hold_at = None
        assert (await call).tokens[0] == wanted(deployment, "hello", 12)
        assert len(draining.received) == num_received
        assert len(second.received) == 1


async def test_work_of_a_worker_that_membership_drops_goes_elsewhere(tmp_path: Path) -> None:
    async with router_deployment(tmp_path) as deployment:
        deployment.decode.hold_at = 3
        call = asyncio.create_task(deployment.generate(make_request()))
        await until(lambda: bool(deployment.decode.running), "the request runs")
        second = FakeWorker(Role.DECODE, deployment.oracle, deployment.fabric, worker_id="decode-1")
        await second.start()
        await deployment.announce([deployment.prefill.member, second.member])
        assert (await call).tokens[0] == wanted(deployment, "hello", 12)
        await until(lambda: deployment.decode.num_sessions == 0, "the old stream is closed")
        await second.kill()


async def test_older_membership_changes_nothing(tmp_path: Path) -> None:
    async with router_deployment(tmp_path) as deployment:
        await deployment.router.update_membership(deployment.version, [])
        await deployment.router.update_membership(0, [])
        assert len(deployment.router.status().workers) == 2
        assert deployment.router.status().can_serve


async def test_stale_incarnation_gets_no_work_and_is_named_in_the_status(tmp_path: Path) -> None:
    async with router_deployment(tmp_path, workers=False) as deployment:
        worker = FakeWorker(
            Role.DECODE, deployment.oracle, deployment.fabric, local_prefill_tokens=1000
        )
        await worker.start()
        deployment.workers["decode-0"] = worker
        meant = worker.member
        worker.incarnation = 2
        await deployment.announce([meant])
        await until(
            lambda: "this is incarnation 2" in deployment.router.status().workers[0].message,
            "the refusal is in the status",
        )
        call = asyncio.create_task(deployment.generate(make_request()))
        await until(lambda: deployment.router.status().num_waiting == 1, "the request waits")
        await deployment.announce([worker.member])
        assert (await call).tokens[0] == wanted(deployment, "hello", 12)


async def test_silent_worker_counts_as_lost(tmp_path: Path) -> None:
    settings = RouterSettings(grpc_port=0, drain_timeout_s=0.0, worker_silence_limit_s=1.0)
    async with router_deployment(tmp_path, settings=settings) as deployment:
        deployment.decode.is_silent = True
        await until(
            lambda: any(
                "router.worker_silence_limit_s" in link.message
                for link in deployment.router.status().workers
            ),
            "the silence is noticed",
        )


async def test_worker_that_a_frozen_router_did_not_hear_is_not_lost(tmp_path: Path) -> None:
    settings = RouterSettings(grpc_port=0, drain_timeout_s=0.0, worker_silence_limit_s=1.0)
    async with router_deployment(tmp_path, settings=settings, workers=False) as deployment:
        oracle, fabric = deployment.oracle, deployment.fabric
        await deployment.add(
            FakeWorker(Role.DECODE, oracle, fabric, local_prefill_tokens=UNLIMITED_LOCAL_PREFILL)
        )
        await deployment.connected()
        call = asyncio.create_task(deployment.generate(make_request(max_tokens=200)))
        await until(lambda: bool(deployment.decode.running), "the request runs")
        for _ in range(2):
            asyncio.get_running_loop().call_soon(time.sleep, 1.5)
            await asyncio.sleep(0)
        answer = await call
        assert len(answer.tokens[0]) == 200
        assert answer.last.usage.resumed == 0


async def test_membership_may_drop_the_workers_of_a_request_again_and_again(
    tmp_path: Path,
) -> None:
    """A planned stop is no death, however often it happens."""
    async with router_deployment(tmp_path) as deployment:
        deployment.decode.hold_at = 0
        call = asyncio.create_task(deployment.generate(make_request()))
        for _ in range(6):
            old = deployment.decode
            await until(lambda o=old: bool(o.running), "the request runs")
            (await deployment.replace("decode-0")).hold_at = 0
            await old.kill()
        deployment.decode.hold_at = None
        assert (await call).tokens[0] == wanted(deployment, "hello", 12)
        await deployment.idle()


async def test_stop_ends_what_still_runs_and_says_so(tmp_path: Path) -> None:
    async with router_deployment(tmp_path) as deployment:
        deployment.decode.hold_at = 3
        call = asyncio.create_task(deployment.generate(make_request()))
        await until(lambda: bool(deployment.decode.running), "the request runs")
        await deployment.router.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await until(lambda: not deployment.decode.running, "the worker is free")


async def test_port_in_use_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    async with router_deployment(tmp_path) as deployment:
        port = int(deployment.router.address.rsplit(":", 1)[1])
        model = ServedModel("tiny", 512, 260, (), tmp_path)
        second = Router(RouterSettings(grpc_port=port), model)
        with pytest.raises(ConfigError, match=r"cannot listen on .*change router\.grpc_port"):
            await second.start()
        await second.stop()


def stop_watching(router: Router) -> None:
    """Keep the real loop's lag out of what a test says of it."""
    assert router._lag_task is not None
    router._lag_task.cancel()


async def test_a_first_token_that_waits_for_a_busy_router_is_no_prefill(tmp_path: Path) -> None:
    async with router_deployment(tmp_path) as deployment:
        prefill, decode, router = deployment.prefill, deployment.decode, deployment.router
        stop_watching(router)
        prefill.late_s = decode.late_s = 0.0
        await deployment.generate(make_request())  # its messages are the fastest
        now = asyncio.get_running_loop().time()
        router._lag.tick(0.02, 0.12, 0.12, now)  # busy, though hardly any timer is late
        # Either of them may be the first to report the first token.
        prefill.late_s = decode.late_s = 0.3
        prefill.hold_at = 0
        call = asyncio.create_task(deployment.generate(make_request(include_timeline=True)))
        await until(lambda: bool(prefill.running), "the prompt is at its worker")
        began_s = time.monotonic()
        await until(lambda: time.monotonic() > began_s + 0.4, "the token could be that late")
        prefill.hold_at = None
        answer = await call
        times = answer.last.phase_times
        assert times.router_s > 0.25
        [wait] = [span for span in answer.last.timeline if span.phase == "router"]
        assert wait.end_s - wait.start_s == pytest.approx(times.router_s, abs=1e-5)
        assert router.status().lag.max_s >= times.router_s - 1e-5


async def test_a_router_that_is_late_refuses_new_requests_and_goes_on_with_others(
    tmp_path: Path,
) -> None:
    async with router_deployment(tmp_path) as deployment:
        router, decode = deployment.router, deployment.decode
        stop_watching(router)
        decode.hold_at = 3
        running = asyncio.create_task(deployment.generate(make_request()))
        await until(lambda: bool(decode.running), "it runs")
        now = asyncio.get_running_loop().time()
        for number in range(3):
            router._lag.tick(1.5, 1.6, 1.6, now + 0.01 * number)
        assert router.status().lag.mean_s == pytest.approx(1.5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await deployment.generate(make_request())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "1.50 s behind" in str(caught.value.details())
        assert "router.max_lag_s is 1." in str(caught.value.details())
        assert "router.replicas" in str(caught.value.details())
        decode.hold_at = None
        assert len((await running).tokens[0]) == 12
