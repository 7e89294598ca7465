"""The controller over processes that do what the test says: no Ray, no gRPC."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

import pytest
from fake_launcher import FakeLauncher, FakeProcess

from paceline.cluster import controller as controller_module
from paceline.cluster import supervised
from paceline.cluster.controller import Controller
from paceline.cluster.process_state import ProcessState, Role
from paceline.cluster.settings import DeploymentSettings
from paceline.errors import CapacityError, ConfigError, InvalidRequestError, UnavailableError


def make_settings(**parts: object) -> DeploymentSettings:
    controller = {"poll_interval_s": 0.01, "first_back_off_s": 0.02, "drain_timeout_s": 5.0}
    given = parts.pop("controller", {})
    assert isinstance(given, dict)
    tree = {"model": {"path": "x"}, "controller": controller | given}
    return DeploymentSettings.model_validate(tree | parts)


@contextlib.asynccontextmanager
async def running(controller: Controller) -> AsyncIterator[None]:
    await controller.adopt()
    task = asyncio.create_task(controller.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.002)


def states(controller: Controller) -> dict[str, ProcessState]:
    return {p.name.worker_id: p.state for p in controller.processes}


def all_ready(controller: Controller, num_processes: int) -> Callable[[], bool]:
    def check() -> bool:
        found = states(controller)
        return len(found) == num_processes and set(found.values()) == {ProcessState.READY}

    return check


def members(process: FakeProcess) -> set[str]:
    return {m.worker_id for m in process.memberships[-1].members} if process.memberships else set()


async def test_everything_wanted_becomes_ready_and_the_router_learns_of_it() -> None:
    launcher = FakeLauncher()
    controller = Controller(make_settings(), launcher)
    async with running(controller):
        await until(all_ready(controller, 3))
        await until(lambda: members(launcher.living("router-0")) == {"prefill-0", "decode-0"})
        await until(lambda: members(launcher.living("decode-0")) == {"prefill-0", "decode-0"})


async def test_a_cancellation_ends_the_main_loop_even_when_it_has_just_been_woken() -> None:
    controller = Controller(make_settings(controller={"poll_interval_s": 60.0}), FakeLauncher())
    for num_passes in range(8):  # one pass of the event loop later each time
        task = asyncio.create_task(controller.run())
        await passes(20)
        controller._wake.set()
        await passes(num_passes)
        task.cancel()
        await asyncio.wait([task], timeout=5.0)
        assert task.cancelled(), f"still runs when cancelled {num_passes} passes after a wake-up"


async def passes(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_dead_worker_leaves_the_membership_before_its_replacement_starts() -> None:
    launcher = FakeLauncher()
    controller = Controller(make_settings(), launcher)
    async with running(controller):
        await until(all_ready(controller, 3))
        router, old = launcher.living("router-0"), launcher.living("decode-0")
        await until(lambda: "decode-0" in members(router))
        launcher.can_start = False
        old.die("killed by SIGKILL")
        await until(lambda: len(launcher.launched) == 4)
        assert members(router) == {"prefill-0"}
        new = launcher.living("decode-0")
        assert new.name.incarnation > old.name.incarnation
        assert any("killed by SIGKILL" in event.message for event in controller.events)
        new.started.set()
        await until(lambda: members(router) == {"prefill-0", "decode-0"})
        incarnations = {m.worker_id: m.incarnation for m in router.memberships[-1].members}
        assert incarnations["decode-0"] == new.name.incarnation


async def test_a_membership_that_a_burial_and_the_main_loop_have_is_sent_once() -> None:
    launcher = FakeLauncher()
    controller = Controller(make_settings(), launcher)
    async with running(controller):
        await until(all_ready(controller, 3))
        router = launcher.living("router-0")
        await until(lambda: members(router) == {"prefill-0", "decode-0"})
        router.can_update.clear()
        launcher.living("decode-0").die("killed by SIGKILL")
        await until(lambda: states(controller)["decode-0"] is ProcessState.DEAD)
        await asyncio.sleep(0.1)  # the main loop comes round meanwhile
        router.can_update.set()
        await until(lambda: len(launcher.launched) == 4)
        await until(lambda: members(router) == {"prefill-0", "decode-0"})
    versions = [m.version for m in router.memberships]
    assert versions == sorted(set(versions))


async def test_a_worker_with_work_and_no_step_is_killed_and_replaced() -> None:
    launcher = FakeLauncher()
    controller = Controller(make_settings(), launcher)
    async with running(controller):
        await until(all_ready(controller, 3))
        old = launcher.living("decode-0")
        old.is_busy, old.stalled_s = True, 16.5
        await until(lambda: len(launcher.launched) == 4)
        assert old.was_killed
        await until(all_ready(controller, 3))
        assert any("finished no step for 16.5 s" in event.message for event in controller.events)


async def test_a_worker_without_work_may_be_without_progress() -> None:
    launcher = FakeLauncher()
    controller = Controller(make_settings(controller={"worker_silence_limit_s": 0.05}), launcher)
    async with running(controller):
        await until(all_ready(controller, 3))
        decode = launcher.living("decode-0")
        decode.stalled_s = 100.0
        heard = controller.processes[2].last_heard_s
        await until(lambda: controller.processes[2].last_heard_s > heard + 0.1)
        assert decode.lives


async def test_a_worker_that_does_not_answer_is_killed_and_replaced() -> None:
    launcher = FakeLauncher()
    controller = Controller(make_settings(controller={"worker_silence_limit_s": 0.2}), launcher)
    async with running(controller):
        await until(all_ready(controller, 3))
        old = launcher.living("decode-0")
        old.is_silent = True
        await until(lambda: len(launcher.launched) == 4)
        assert old.was_killed
        await until(all_ready(controller, 3))


async def test_scaling_up_starts_and_scaling_down_drains_before_it_stops() -> None:
    launcher = FakeLauncher()
    controller = Controller(make_settings(), launcher)
    async with running(controller):
        await until(all_ready(controller, 3))
        assert (await controller.scale({"decode": 2}))[Role.DECODE] == 2
        await until(all_ready(controller, 4))
        second = launcher.living("decode-1")
        second.is_busy = True
        await controller.scale({"decode": 1})
        await until(lambda: second.is_draining)
        assert states(controller)["decode-1"] is ProcessState.DRAINING
        await until(lambda: members(launcher.living("router-0")) >= {"decode-1"})
        second.is_busy = False
        await until(lambda: not second.lives)
        await until(all_ready(controller, 3))
        await until(lambda: "decode-1" not in members(launcher.living("router-0")))


async def test_a_worker_that_is_not_wanted_any_more_when_it_is_launched_ends() -> None:
    launcher = FakeLauncher()
    controller = Controller(make_settings(), launcher)
    async with running(controller):
        await until(all_ready(controller, 3))
        launcher.can_launch.clear()
        await controller.scale({"decode": 2})
        await until(lambda: "decode-1" in states(controller))
        await controller.scale({"decode": 1})
        await until(lambda: states(controller)["decode-1"] is ProcessState.STOPPING)
        launcher.can_launch.set()
        await until(all_ready(controller, 3))
        assert [p.name.worker_id for p in launcher.launched if not p.lives] == ["decode-1"]


async def test_a_drain_ends_at_its_deadline() -> None:
    launcher = FakeLauncher()
    controller = Controller(make_settings(controller={"drain_timeout_s": 0.1}), launcher)
    async with running(controller):
        await until(all_ready(controller, 3))
        await controller.scale({"decode": 2})
        await until(all_ready(controller, 4))
        second = launcher.living("decode-1")
        second.is_busy = True
        await controller.scale({"decode": 1})
        await until(lambda: not second.lives)


async def test_a_drained_worker_is_not_replaced() -> None:
    launcher = FakeLauncher()
    controller = Controller(make_settings(prefill={"replicas": 2}), launcher)
    async with running(controller):
        await until(all_ready(controller, 4))
        await controller.drain("prefill-0")
        await until(lambda: "prefill-0" not in states(controller))
        assert controller.wanted[Role.PREFILL] == 1
        assert launcher.saved is not None
        assert launcher.saved.wanted[Role.PREFILL] == 1


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"gpu": 1}, "there is no pool 'gpu'; the pools are prefill and decode"),
        ({"router": 2}, "there is no pool 'router'"),
        ({"decode": -1}, "is -1"),
        ({"decode": 0}, "nobody could stream tokens"),
    ],
)
async def test_impossible_sizes_are_refused(sizes: dict[str, int], words: str) -> None:
    controller = Controller(make_settings(), FakeLauncher())
    with pytest.raises(InvalidRequestError, match=words):
        await controller.scale(sizes)
    assert controller.wanted[Role.DECODE] == 1


async def test_scaling_prefill_to_zero_needs_local_prefill() -> None:
    controller = Controller(make_settings(), FakeLauncher())
    with pytest.raises(ConfigError, match=r"decode\.local_prefill_tokens is 0"):
        await controller.scale({"prefill": 0})
    colocated = make_settings(decode={"local_prefill_tokens": "unlimited"})
    assert (await Controller(colocated, FakeLauncher()).scale({"prefill": 0}))[Role.PREFILL] == 0


async def test_scaling_up_a_pool_on_another_kind_of_device_is_refused() -> None:
    decode = {"device": "cuda", "local_prefill_tokens": "unlimited"}
    launcher = FakeLauncher()
    launcher.capacity_now = launcher.capacity_now._replace(resources={"GPU": 2.0})
    settings = make_settings(prefill={"replicas": 0}, decode=decode)
    with pytest.raises(ConfigError, match=r"prefill\.device is cpu and decode\.device is cuda"):
        await Controller(settings, launcher).scale({"prefill": 1})
    on_gpu = make_settings(prefill={"replicas": 0, "device": "cuda"}, decode=decode)
    assert (await Controller(on_gpu, launcher).scale({"prefill": 1}))[Role.PREFILL] == 1


async def test_more_memory_than_is_free_is_refused_with_the_numbers() -> None:
    controller = Controller(make_settings(decode={"kv_cache_bytes": 2 << 30}), FakeLauncher())
    with pytest.raises(
        CapacityError, match=r"10 decode × 2\.6 GiB.*8\.0 GiB of 16\.0 GiB are free"
    ):
        await controller.scale({"decode": 10, "prefill": 1})


async def test_more_resources_than_the_cluster_has_are_refused_with_the_numbers() -> None:
    controller = Controller(make_settings(decode={"resources": {"CPU": 1}}), FakeLauncher())
    with pytest.raises(CapacityError, match=r"need 3 CPU \(3 decode × 1\), .* has 2"):
        await controller.scale({"decode": 3})


async def test_a_process_that_cannot_start_says_why_and_is_tried_again_later() -> None:
    launcher = FakeLauncher()
    launcher.can_start = False
    controller = Controller(make_settings(), launcher)
    async with running(controller):
        for num_failures in range(1, 4):
            await until(lambda n=num_failures: len(starts_of(launcher, "decode-0")) == n)
            launcher.living("decode-0").die("the model folder /x does not exist")
            await until(lambda: message_of(controller, "decode-0"))
            assert message_of(controller, "decode-0") == "the model folder /x does not exist"
        launcher.can_start = True
        await until(lambda: states(controller).get("decode-0") is ProcessState.READY)
        assert message_of(controller, "decode-0") == ""


def starts_of(launcher: FakeLauncher, worker_id: str) -> list[FakeProcess]:
    return [p for p in launcher.launched if p.name.worker_id == worker_id]


def message_of(controller: Controller, worker_id: str) -> str:
    return next((p.message for p in controller.processes if p.name.worker_id == worker_id), "")


async def test_a_worker_that_does_not_become_ready_in_time_is_replaced() -> None:
    launcher = FakeLauncher()
    launcher.can_start = False
    controller = Controller(make_settings(controller={"start_timeout_s": 0.05}), launcher)
    async with running(controller):
        await until(lambda: len(launcher.launched) > 3)
        assert any("controller.start_timeout_s" in event.message for event in controller.events)


async def test_a_new_controller_adopts_what_lives_and_keeps_the_wanted_sizes() -> None:
    launcher = FakeLauncher()
    first = Controller(make_settings(), launcher)
    async with running(first):
        await until(all_ready(first, 3))
        await first.scale({"decode": 2})
        await until(all_ready(first, 4))
    for task in list(first._tasks):  # its process is gone, and so are its tasks
        task.cancel()
    launcher.living("decode-1").is_draining = True
    second = Controller(make_settings(), launcher)
    async with running(second):
        await until(lambda: second.wanted[Role.DECODE] == 2)
        await until(lambda: "decode-2" in states(second))  # for the one that drained
        await until(all_ready(second, 4))
        assert len(launcher.launched) == 5
        await until(lambda: "decode-2" in members(launcher.living("router-0")))
    versions = [m.version for m in launcher.living("router-0").memberships]
    assert versions == sorted(set(versions))


async def test_a_router_keeps_its_port_whoever_dies_with_it() -> None:
    launcher = FakeLauncher()
    first = Controller(make_settings(), launcher)
    async with running(first):
        await until(all_ready(first, 3))
        port = launcher.living("router-0").port
        launcher.living("decode-0").die("a signal")
        launcher.living("router-0").die("a signal")
        await until(lambda: launcher.living_ids() == {"router-0", "prefill-0", "decode-0"})
        await until(all_ready(first, 3))
        assert launcher.living("router-0").port == port
    for task in list(first._tasks):
        task.cancel()
    launcher.living("router-0").die("the signal that also ended the controller")
    second = Controller(make_settings(), launcher)
    async with running(second):
        await until(all_ready(second, 3))
        assert launcher.living("router-0").port == port


async def test_a_death_of_which_ray_does_not_tell_is_seen_and_repaired_when_ray_is_back() -> None:
    launcher = FakeLauncher()
    controller = Controller(make_settings(), launcher)
    async with running(controller):
        await until(all_ready(controller, 3))
        launcher.problem_now = "Ray's GCS does not answer"
        await until(lambda: controller.problem)
        launcher.living("decode-0").end_seen_by_launcher = "its process 7 ended"
        await until(lambda: states(controller)["decode-0"] is ProcessState.DEAD)
        await until(lambda: members(launcher.living("router-0")) == {"prefill-0"})
        await until_planned_again(controller)
        assert len(launcher.launched) == 3
        launcher.problem_now = ""
        await until(all_ready(controller, 3))
        assert any("decode-0 has died: its process 7 ended" in e.message for e in controller.events)


async def test_a_start_that_ends_while_ray_is_away_is_seen() -> None:
    launcher = FakeLauncher()
    launcher.can_start = False
    controller = Controller(make_settings(), launcher)
    async with running(controller):
        await until(lambda: len(launcher.launched) == 3)
        launcher.problem_now = "Ray's GCS does not answer"
        launcher.living("decode-0").end_seen_by_launcher = "its process 7 ended"
        await until(lambda: states(controller)["decode-0"] is ProcessState.DEAD)


async def test_sizes_do_not_change_while_nothing_can_be_started() -> None:
    launcher = FakeLauncher()
    controller = Controller(make_settings(), launcher)
    async with running(controller):
        await until(all_ready(controller, 3))
        launcher.problem_now = "Ray's GCS does not answer"
        await until(lambda: controller.problem)
        for change in (controller.scale({"decode": 2}), controller.drain("decode-0")):
            with pytest.raises(UnavailableError, match=r"sizes cannot change now: Ray's GCS"):
                await change
        assert controller.wanted[Role.DECODE] == 1
        assert states(controller)["decode-0"] is ProcessState.READY


async def until_planned_again(controller: Controller) -> None:
    """Wait for a whole round of the main loop."""
    rounds: list[None] = []
    look = controller._look_at_launcher

    async def counted() -> None:
        rounds.append(None)
        await look()

    controller._look_at_launcher = counted  # type: ignore[method-assign]
    await until(lambda: len(rounds) > 2)


@contextlib.asynccontextmanager
async def adopting(launcher: FakeLauncher) -> AsyncIterator[Controller]:
    """Let a controller bring a deployment up, and another one take over after its death."""
    first = Controller(make_settings(), launcher)
    async with running(first):
        await until(all_ready(first, 3))
        router = launcher.living("router-0")
        await until(lambda: members(router) == {"prefill-0", "decode-0"})
    for task in list(first._tasks):
        task.cancel()
    launcher.living("decode-0").started.clear()  # it answers the next one later
    second = Controller(make_settings(), launcher)
    async with running(second):
        await until(lambda: states(second).get("prefill-0") is ProcessState.READY)
        yield second


async def test_a_new_controller_sends_no_membership_without_a_worker_that_serves() -> None:
    launcher = FakeLauncher()
    async with adopting(launcher) as controller:
        router, decode = launcher.living("router-0"), launcher.living("decode-0")
        num_before = len(router.memberships)
        launcher.living("prefill-0").die("killed by SIGKILL")
        await until(lambda: len(launcher.launched) == 4)  # a death meanwhile changes nothing
        await until(lambda: states(controller)["prefill-0"] is ProcessState.READY)
        decode.started.set()
        await until(all_ready(controller, 3))
        newest = launcher.living("prefill-0").name.incarnation
        await until(
            lambda: newest in [m.incarnation for m in router.memberships[-1].members],
        )
    assert [len(m.members) for m in router.memberships[num_before:]] == [2]


@pytest.mark.parametrize("cause", ["it dies", "it stays silent"])
async def test_a_new_controller_does_not_wait_for_a_worker_that_never_answers(
    cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "ADOPTION_TIMEOUT_S", 60.0 if cause == "it dies" else 0.1)
    launcher = FakeLauncher()
    async with adopting(launcher) as controller:
        launcher.can_start = False
        decode = launcher.living("decode-0")
        if cause == "it dies":
            decode.die("killed by SIGKILL")
        router = launcher.living("router-0")
        await until(lambda: members(router) == {"prefill-0"})
        assert states(controller)["decode-0"] is not ProcessState.READY


async def test_shutting_down_ends_routers_first_and_leaves_nothing() -> None:
    launcher = FakeLauncher()
    controller = Controller(make_settings(), launcher)
    async with running(controller):
        await until(all_ready(controller, 3))
        await controller.shut_down()
        assert not any(p.lives for p in launcher.launched)
        await until(lambda: not controller.processes)


async def test_nothing_is_replaced_when_shutting_down_meets_a_membership_on_its_way() -> None:
    launcher = FakeLauncher()
    controller = Controller(make_settings(), launcher)
    async with running(controller):
        await until(all_ready(controller, 3))
        router = launcher.living("router-0")
        await until(lambda: members(router) == {"prefill-0", "decode-0"})
        router.can_update.clear()
        await controller.scale({"decode": 2})
        await until(all_ready(controller, 4))
        await until(lambda: "decode-1" in members(launcher.living("decode-0")))
        await controller.shut_down()
        router.can_update.set()
        await until(lambda: not controller.processes)
    assert len(launcher.launched) == 4
    assert not any(p.lives for p in launcher.launched)


async def test_a_worker_that_becomes_idle_while_a_membership_is_sent_is_stopped_once() -> None:
    launcher = FakeLauncher()
    controller = Controller(
        make_settings(decode={"replicas": 3}, controller={"poll_interval_s": 0.02}), launcher
    )
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, details: failures.append(details))
    async with running(controller):
        await until(all_ready(controller, 5))
        for number in (1, 2):
            launcher.living(f"decode-{number}").is_busy = True
        await controller.scale({"decode": 1})
        await until(lambda: list(states(controller).values()).count(ProcessState.DRAINING) == 2)
        router = launcher.living("router-0")
        router.can_update.clear()
        launcher.living("decode-2").is_busy = False
        await until(lambda: "decode-2" not in launcher.living_ids())
        launcher.living("decode-1").is_busy = False
        await until(lambda: any(p.num_idle_reports > 1 for p in controller.processes))
        router.can_update.set()
        await until(lambda: len(controller.processes) == 3)
    assert failures == []


async def test_shutting_down_takes_a_worker_that_is_being_stopped_already() -> None:
    launcher = FakeLauncher()
    controller = Controller(make_settings(decode={"replicas": 2}), launcher)
    async with running(controller):
        await until(all_ready(controller, 4))
        stopping = launcher.living("decode-1")
        stopping.can_be_stopped.clear()
        await controller.scale({"decode": 1})
        await until(lambda: states(controller)["decode-1"] is ProcessState.STOPPING)
        ending = asyncio.create_task(controller.shut_down())
        await until(lambda: not launcher.living_ids() - {"decode-1"})
        stopping.can_be_stopped.set()
        await ending
    assert launcher.living_ids() == set()


async def test_a_death_is_repaired_though_ray_does_not_take_the_order_to_kill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(controller_module, "KILL_TIMEOUT_S", 0.05)
    launcher = FakeLauncher()
    controller = Controller(make_settings(), launcher)
    async with running(controller):
        await until(all_ready(controller, 3))
        victim = launcher.living("decode-0")
        victim.can_be_killed.clear()
        victim.die("it crashed")
        await until(lambda: len(launcher.launched) == 4)
        await until(all_ready(controller, 3))
    assert any("decode-0 may live still" in event.message for event in controller.events)


async def test_numbers_grow_from_controller_to_controller_whatever_the_clock_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launcher = FakeLauncher()
    first = Controller(make_settings(), launcher)
    async with running(first):
        await until(all_ready(first, 3))
    router = launcher.living("router-0")
    version = router.memberships[-1].version
    newest = max(process.name.incarnation for process in launcher.launched)
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    second = Controller(make_settings(), launcher)
    async with running(second):
        await until(all_ready(second, 3))
        launcher.living("decode-0").die("it crashed")
        await until(lambda: len(launcher.launched) == 4)
        await until(lambda: router.memberships[-1].version > version)
        assert launcher.launched[-1].name.incarnation > newest


async def test_a_controller_that_stood_still_blames_no_worker() -> None:
    launcher = FakeLauncher()
    controller = Controller(
        make_settings(controller={"worker_silence_limit_s": 1.0, "poll_interval_s": 0.05}), launcher
    )
    async with running(controller):
        await until(all_ready(controller, 3))
        for process in launcher.launched:
            process.is_silent = True
        await asyncio.sleep(0.1)  # a report is on its way
        asyncio.get_running_loop().call_soon(time.sleep, 1.5)
        await asyncio.sleep(0)
        for process in launcher.launched:
            process.is_silent = False
        heard_s = [process.last_heard_s for process in controller.processes]
        await until(
            lambda: all(
                process.last_heard_s > before
                for process, before in zip(controller.processes, heard_s, strict=True)
            )
        )
    assert not any(process.was_killed for process in launcher.launched[:3])
