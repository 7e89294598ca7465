"""Bugs that were put back on purpose, one at a time: the simulations have to report each."""

import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from fake_worker import arithmetic_oracle, expected_output
from interleaved_world import run_world
from router_requests import make_active_request
from simulated_pair import SimulatedCluster

from paceline.decode_worker.attempts import Attempt
from paceline.decode_worker.departures import Departures
from paceline.decode_worker.roster import Roster
from paceline.kv_transfer.lease import LeaseTable
from paceline.router.attempt import Attempt as RouterAttempt
from paceline.router.dispatch import Dispatcher
from paceline.router.route_health import RouteHealth
from paceline.router.setbacks import Setbacks
from paceline.router.worker_view import Role
from paceline.silence import Silence

ORACLE = arithmetic_oracle(500)
NUM_RUNS = 6
"""As many as the simulations' own tests have at most."""
Run = Callable[[int, pytest.MonkeyPatch], Awaitable[None]]
Patch = Callable[[pytest.MonkeyPatch], None]


class SeededBug(NamedTuple):
    put_back: Patch
    run: Run
    """One run of a simulation, by seed."""
    report: str
    """What the simulation has to say, as a pattern."""


# The simulations.


async def crowded_world(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    await run_world(
        seed,
        num_blocks=14,
        fault_share=0.04,
        num_steps=1500,
        monkeypatch=monkeypatch,
        num_requests=15,
        max_tokens=28,
    )


async def expired_leases(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    await run_world(
        seed,
        num_blocks=12,
        fault_share=0.03,
        num_steps=800,
        monkeypatch=monkeypatch,
        num_requests=20,
        max_tokens=10,
        faults=("expire",),
    )


async def short_requests(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    await run_world(
        seed,
        num_blocks=40,
        fault_share=0.1,
        num_steps=1000,
        monkeypatch=monkeypatch,
        num_requests=25,
        max_tokens=1,
        faults=("refuse", "cancel"),
        num_steps_to_settle=3000,
    )


async def frozen_workers(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    await run_world(
        seed,
        num_blocks=40,
        fault_share=0.01,
        num_steps=500,
        monkeypatch=monkeypatch,
        faults=("freeze",),
        num_steps_to_settle=3500,
    )


def make_square() -> SimulatedCluster:
    cluster = SimulatedCluster(ORACLE)
    for number in range(2):
        cluster.join(f"prefill-{number}", Role.PREFILL, 0.0)
        cluster.join(f"decode-{number}", Role.DECODE, 0.0)
    return cluster


def assert_complete(request: Any) -> None:
    assert request.error is None, str(request.error)
    for choice in request.journal.choices:
        prompt, num_tokens = request.journal.prompt.tolist(), request.journal.sampling.max_tokens
        assert choice.output == expected_output(ORACLE, prompt, num_tokens, choice.choice)


async def one_broken_pair(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests one after the other; one of four pairs cannot connect."""
    cluster, now = make_square(), 0.0
    cluster.broken_pairs.add((f"prefill-{seed % 2}", f"decode-{seed // 2 % 2}"))
    for number in range(60):
        request = make_active_request(str(number), max_tokens=3, arrived_s=now)
        cluster.dispatcher.submit(request, now)
        for _ in range(10):
            cluster.deliver_all(now)
            for worker in cluster.workers.values():
                worker.step()
            cluster.deliver_all(now)
            now = cluster.pass_time(now, 0.05)
        assert request.num_attempts <= 4, f"{request.num_attempts} attempts of one request"
        assert_complete(request)
    assert cluster.num_broken_attempts <= 12, "a broken pair attracts work"


async def only_broken_pairs(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pair can connect: a request has to fail soon."""
    cluster, now = make_square(), 0.0
    cluster.broken_pairs |= {(f"prefill-{i}", f"decode-{j}") for i in (0, 1) for j in (0, 1)}
    request = make_active_request()
    cluster.dispatcher.submit(request, now)
    while not request.is_done:
        cluster.deliver_all(now)
        now = cluster.pass_time(now, 0.05)
        assert now < 5.0, "a request bounces without end"


async def rolling_restart(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every decode worker is drained and stopped in turn, before it has given a token."""
    cluster = make_square()
    request = make_active_request()
    cluster.dispatcher.submit(request, 0.0)
    for number in range(10):
        worker_id = f"decode-{number % 2}"
        load = replace(cluster.workers[worker_id].load(), draining=True)
        cluster.dispatcher.load_changed(worker_id, load, float(number))
        cluster.kill(worker_id, float(number))
        cluster.join(worker_id, Role.DECODE, float(number))
    cluster.run(10.0, 20)
    assert_complete(request)


# The bugs.


def confirm_always(monkeypatch: pytest.MonkeyPatch) -> None:
    confirm = LeaseTable.confirm

    def held(self: LeaseTable, lease_id: int, reader: str, now: float) -> bool:
        confirm(self, lease_id, reader, now)
        return True

    monkeypatch.setattr(LeaseTable, "confirm", held)


def free_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What steps in flight may still use is freed before they have ended."""
    add = Departures.add

    def add_and_settle(self: Departures, departure: Any) -> None:
        add(self, departure)
        self.settle(departure.after_step)

    monkeypatch.setattr(Departures, "add", add_and_settle)


def free_under_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads may still write to is freed with its attempt."""
    close = Roster._close

    def close_as_read(self: Roster, attempt: Attempt, now: float) -> None:
        attempt.reads_ended = True
        close(self, attempt, now)

    monkeypatch.setattr(Roster, "_close", close_as_read)


def forget_the_prefill_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first token that is the last one cancels nothing there, and heartbeats renew all."""
    tokens = Dispatcher.tokens

    def take_tokens(self: Dispatcher, worker_id: str, columns: Any, now: float) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RouterAttempt, "workers", lambda attempt: (attempt.decode_id,))
            tokens(self, worker_id, columns, now)

    renew_named = LeaseTable.renew

    def renew(self: LeaseTable, reader: str, now: float, lease_ids: Any) -> None:
        renew_named(self, reader, now, list(self._by_id))

    monkeypatch.setattr(Dispatcher, "tokens", take_tokens)
    monkeypatch.setattr(LeaseTable, "renew", renew)


def never_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RouteHealth, "failed", lambda *values, **named: 0.0)


def bear_all_setbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Setbacks, "why_too_many", lambda setbacks, settings: None)


def count_every_death(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned stops, too, and without a run alone before the request fails."""
    lost = Dispatcher.worker_lost

    def unplanned(self: Dispatcher, worker_id: str, now: float, **_: bool) -> None:
        view = self.placement.workers[worker_id]
        view.load = replace(view.load, draining=False)
        lost(self, worker_id, now)

    monkeypatch.setattr(Dispatcher, "worker_lost", unplanned)
    monkeypatch.setattr(
        Setbacks,
        "why_too_many",
        lambda self, settings: (
            "workers died" if len(self.deaths) >= settings.max_worker_deaths else None
        ),
    )


def never_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Silence, "is_too_long", lambda silence, now: False)


SEEDED_BUGS = {
    "every confirmation is HELD": SeededBug(
        confirm_always, expired_leases, "its KV is wrong|a wrong token"
    ),
    "deferred frees happen at once": SeededBug(
        free_at_once, crowded_world, "wrote blocks that nobody holds"
    ),
    "blocks are freed under reads": SeededBug(
        free_under_reads, crowded_world, "a read writes block"
    ),
    "nobody ends a lease at the prefill worker": SeededBug(
        forget_the_prefill_worker, short_requests, "still holds something"
    ),
    "no route rests": SeededBug(never_rest, one_broken_pair, "attempts of one request|attracts"),
    "setbacks have no bound": SeededBug(bear_all_setbacks, only_broken_pairs, "bounces"),
    "every death counts": SeededBug(count_every_death, rolling_restart, "workers died"),
    "the silence limit never fires": SeededBug(never_silent, frozen_workers, "hang"),
}


@pytest.mark.parametrize("name", SEEDED_BUGS)
async def test_the_simulation_reports_a_bug_that_was_put_back(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug = SEEDED_BUGS[name]
    bug.put_back(monkeypatch)
    reports = []
    for seed in range(NUM_RUNS):
        try:
            await bug.run(seed, monkeypatch)
        except Exception as error:  # whatever a simulation notices with
            reports.append(f"{type(error).__name__}: {error}")
            if re.search(bug.report, reports[-1]):
                return
    raise AssertionError(f"{NUM_RUNS} runs have not found it; they reported {reports}")


@pytest.mark.parametrize("run", sorted({bug.run for bug in SEEDED_BUGS.values()}, key=repr))
async def test_the_simulation_reports_nothing_without_a_bug(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run(0, monkeypatch)
