"""Kill a worker of a deployment at a named moment, and compare what clients got with an undisturbed
run.
"""

import asyncio
from pathlib import Path
from typing import Any

from deployment import Deployment, Output, run_deployment, token_request
from reference import greedy_tokens
from tiny_models import VOCAB_SIZE, prepare, write_tiny_model

NUM_TOKENS = 24
LENGTHS = (150, 90, 120)

MOMENTS = {
    # moment: (role whose process passes it, failpoint)
    "prefill queued": ("prefill", "queued"),
    "admit queued": ("decode", "queued"),
    "first chunk": ("prefill", "chunk@1"),
    "middle chunk": ("prefill", "chunk@4"),
    "published": ("prefill", "published"),
    "reader told of progress": ("decode", "progressed"),
    "reader told of the end": ("decode", "published"),
    "reading": ("decode", "reading"),
    "read done": ("decode", "read_done"),
    "confirm sent": ("decode", "confirm_sent"),
    "confirm received": ("prefill", "confirm_received"),
    "token 0": ("decode", "token@1"),
    "token 1": ("decode", "token@2"),
    "middle token": ("decode", "token@12"),
    "last tokens": ("decode", f"token@{NUM_TOKENS - 1}"),
}
QUICK = {"middle chunk", "reading", "confirm sent", "middle token"}


def make_prompts(scenario: int) -> list[list[int]]:
    """Prompts of one scenario: no other shares a block with them, so none is cached."""
    return [
        [
            3 + (7 * position + 31 * scenario + 11 * length) % (VOCAB_SIZE - 3)
            for position in range(length)
        ]
        for length in LENGTHS
    ]


async def run_requests(deployment: Deployment, scenario: int) -> list[Output]:
    """Greedy, seeded, and seeded with several choices, at the same time."""
    seeded = {"temperature": 0.8, "seed": 1234, "top_p": 0.95}
    first, second, third = make_prompts(scenario)
    requests = [
        token_request(first, max_tokens=NUM_TOKENS),
        token_request(second, max_tokens=NUM_TOKENS, **seeded),
        token_request(third, max_tokens=NUM_TOKENS, n=3, repetition_penalty=1.2, **seeded),
    ]
    return list(await asyncio.gather(*map(deployment.generate, requests)))


async def kill(
    deployment: Deployment, moment: str, victim_role: str, scenario: int
) -> list[Output]:
    """Run a scenario's requests through a kill; give what their clients got."""
    role, failpoint = MOMENTS[moment]
    passer, victim = deployment.worker(role), deployment.worker(victim_role)
    name, _, count = failpoint.partition("@")
    action = "kill" if victim is passer else f"kill={victim.pid}"
    passer.ask("arm", specification=f"{name}:{action}@{count or 1}")
    outputs = asyncio.create_task(run_requests(deployment, scenario))
    await deployment.eventually(lambda: not victim.is_alive, f"{victim_role} killed")
    await deployment.replace(victim)
    got = await outputs
    await deployment.assert_nothing_left()
    live = {f"{worker.worker_id}.{worker.incarnation}" for worker in deployment.workers}
    for worker in deployment.workers:
        assert set(worker.ask("resources")["pools"]) <= live
    return got


async def check_moments(
    path: Path,
    moments: list[str],
    victims: tuple[str, ...] = ("prefill", "decode"),
    *,
    pool: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Kill each victim at each moment; the streams must end as they would have, and leave nothing.

    pool: settings of both pools; options: of the deployment.
    """
    reference = write_tiny_model(path)
    model, folder = prepare(path, path / "cache")
    scenarios = list(enumerate((m, v) for m in moments for v in victims))
    small_steps = {"max_num_batched_tokens": 32}
    options |= {
        "prefill": small_steps | (pool or {}),
        "decode": (pool or {}) | options.get("decode", {}),
    }
    async with run_deployment(
        model, folder, path, path / "undisturbed.log", **options
    ) as undisturbed:
        expected = [await run_requests(undisturbed, number) for number, _ in scenarios]
    greedy = greedy_tokens(reference, make_prompts(0)[0], NUM_TOKENS)
    assert expected[0][0].tokens[0] == greedy
    async with run_deployment(model, folder, path, path / "killed.log", **options) as deployment:
        for number, (moment, victim) in scenarios:
            print(f"kill {victim} at {moment}", flush=True)
            outputs = await kill(deployment, moment, victim, number)
            for output, wanted in zip(outputs, expected[number], strict=True):
                assert output.tokens == wanted.tokens
                assert output.finish_reasons == wanted.finish_reasons
