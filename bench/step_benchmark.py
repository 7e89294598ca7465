"""Measurements of an engine alone: decode steps, greedy and sampled, and prompts. Pairs of methods:
`measure_*` time, `profile_*` trace, which slows steps and may slow what comes after.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from paceline.bench.gpu_rates import Rates
from paceline.bench.gpu_trace import busy_us, kernel_totals, record_device_events
from paceline.bench.model_costs import floor_s, num_bytes, num_flops, step_operations
from paceline.bench.step_driver import GREEDY, StepDriver, StepTimes
from paceline.engine.load import LoadedEngine
from paceline.sampling_params import SamplingParams

PREFILL_WARM_UPS, PREFILL_REPEATS = 2, 5
SAMPLED = SamplingParams(
    temperature=0.8,
    top_k=50,
    top_p=0.95,
    repetition_penalty=1.1,
    presence_penalty=0.5,
    frequency_penalty=0.5,
    ignore_eos=True,
)
"""Sampling in which every parameter has work to do."""
LOGIT_SCALES = {"flat": 1.0, "between": 2.5, "peaked": 8.0}
"""What sampling costs can follow from how many tokens lie near the best one: within 8 nats, with
the 8B shape's random weights, some 90,000, 1,000 and 10.
"""
SAMPLED_ROUNDS = 3
"""Of greedy and sampled steps in turn: their difference is small."""
SAMPLER_KERNELS = (
    "prepare_kernel",
    "shortlist_kernel",
    "divide_kernel",
    "narrow_kernel",
    "race_kernel",
    "finish_kernel",
)
"""Of `kernels.sampling_triton`."""
MAX_KERNELS = 25
"""Kernels named in a profile; the rest is added up."""


class Point(NamedTuple):
    """A decode load."""

    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.context}"


class Benchmark:
    """An engine under measurement."""

    def __init__(self, engine: LoadedEngine, rates: Rates | None, options: argparse.Namespace):
        """rates: None where there is no GPU, and then no floor."""
        self._engine = engine
        self._rates = rates
        self._options = options
        self._driver = StepDriver(engine, overlap=not options.no_overlap)

    def fill_kv(self) -> None:
        """Called before the first measurement."""
        self._driver.fill_kv()

    def measure_decode(self, point: Point) -> dict[str, Any]:
        """Time decode steps; each step's time is between two results."""
        steps, launches = self._decode_steps(point, GREEDY)
        mean_s = statistics.fmean(steps)
        operations = step_operations(
            self._engine.config, [(point.context - 1, 1)] * point.batch, point.batch
        )
        return {
            **point._asdict(),
            "step_ms": 1e3 * mean_s,
            "step_p50_ms": 1e3 * statistics.median(steps),
            "step_p99_ms": 1e3 * float(np.percentile(steps, 99)),
            "tokens_per_s": point.batch / mean_s,
            "launch_p50_us": 1e6 * statistics.median(launches),
            "launch_p99_us": 1e6 * float(np.percentile(launches, 99)),
            **_over_floor(mean_s, floor_s(operations, self._rates) if self._rates else None),
            "bytes": num_bytes(operations),
            "flops": num_flops(operations),
        }

    def measure_sampled(self, point: Point, logit_scale: float) -> dict[str, Any]:
        """Time decode steps with and without sampling, in turn; medians of the rounds' means."""
        means: dict[SamplingParams, list[float]] = {GREEDY: [], SAMPLED: []}
        with self._driver.scaled_logits(logit_scale):
            for _ in range(SAMPLED_ROUNDS):
                for sampling, found in means.items():
                    found.append(statistics.fmean(self._decode_steps(point, sampling).steps))
        greedy_s, sampled_s = map(statistics.median, means.values())
        return {
            "step_ms": 1e3 * greedy_s,
            "sampled_step_ms": 1e3 * sampled_s,
            "difference_ms": 1e3 * (sampled_s - greedy_s),
        }

    def _decode_steps(self, point: Point, sampling: SamplingParams) -> StepTimes:
        warm_up, num_steps = self._options.warm_up, self._options.steps
        plans = self._driver.decode_plans(
            *point, warm_up=warm_up, num_steps=num_steps, sampling=sampling
        )
        times = self._driver.run(plans, warm_up + num_steps)
        return StepTimes(times.steps[warm_up:], times.launches[warm_up:])

    def measure_prefill(self, num_tokens: int) -> dict[str, Any]:
        """Time one prompt, from the launch of its first chunk to the result of its last."""
        chunk = min(self._options.max_num_batched_tokens, num_tokens)
        seconds = []
        for _ in range(PREFILL_WARM_UPS + PREFILL_REPEATS):
            plans = list(self._driver.prefill_plans(num_tokens, chunk))
            seconds.append(sum(self._driver.run(iter(plans), len(plans)).steps))
        median_s = statistics.median(seconds[PREFILL_WARM_UPS:])
        chunks = [(start, min(chunk, num_tokens - start)) for start in range(0, num_tokens, chunk)]
        steps = [
            step_operations(self._engine.config, [part], int(part is chunks[-1])) for part in chunks
        ]
        flops = sum(map(num_flops, steps))
        rates = self._rates
        return {
            "num_tokens": num_tokens,
            "num_chunks": len(chunks),
            "ms": 1e3 * median_s,
            "min_ms": 1e3 * min(seconds[PREFILL_WARM_UPS:]),
            "tflop_per_s": flops / median_s / 1e12,
            "of_matrix_rate": flops / median_s / rates.matrix_flop_per_s if rates else None,
            **_over_floor(median_s, sum(floor_s(s, rates) for s in steps) if rates else None),
            "bytes": sum(map(num_bytes, steps)),
            "flops": flops,
        }

    def profile_decode(self, point: Point, sampling: SamplingParams = GREEDY) -> dict[str, Any]:
        """Say which kernels decode steps consist of, and how long the device is idle."""
        num_steps = self._options.profile_steps
        plans = self._driver.decode_plans(
            *point, warm_up=self._options.warm_up, num_steps=num_steps, sampling=sampling
        )
        self._driver.run(plans, self._options.warm_up)
        return self._profile(lambda: self._driver.run(plans, num_steps))

    def profile_sampled(
        self, point: Point, logit_scale: float, sampled_step_ms: float
    ) -> dict[str, Any]:
        """Say how long the sampler's kernels take, greedy and not, and their share of a step."""
        with self._driver.scaled_logits(logit_scale):
            greedy = self.profile_decode(point, GREEDY)
            sampled = self.profile_decode(point, SAMPLED)
        return {
            "greedy_sampling_us": greedy["sampling_us"],
            "sampling_us": sampled["sampling_us"],
            "sampling_share": sampled["sampling_us"] / (1e3 * sampled_step_ms),
            "profile": sampled,
        }

    def profile_prefill(self, num_tokens: int) -> dict[str, Any]:
        """Say which kernels a prompt's steps consist of."""
        chunk = min(self._options.max_num_batched_tokens, num_tokens)
        plans = list(self._driver.prefill_plans(num_tokens, chunk))
        return self._profile(lambda: self._driver.run(iter(plans), len(plans)))

    def _profile(self, run: Callable[[], StepTimes]) -> dict[str, Any]:
        times: list[StepTimes] = []
        events = record_device_events(lambda: times.append(run()))
        num_steps = len(times[0].steps)
        totals = kernel_totals(events)
        wall_us = 1e6 * sum(times[0].steps) / num_steps
        busy = busy_us(events) / num_steps
        return {
            "num_steps": num_steps,
            "wall_us": wall_us,
            "busy_us": busy,
            "busy_share": busy / wall_us,
            "idle_us": wall_us - busy,
            "sampling_us": sum(total.us for total in totals if total.name in SAMPLER_KERNELS)
            / num_steps,
            "kernels": [
                {"name": name, "us": us / num_steps, "num_calls": num_calls / num_steps}
                for name, us, num_calls in totals[:MAX_KERNELS]
            ],
            "other_us": sum(total.us for total in totals[MAX_KERNELS:]) / num_steps,
        }


def _over_floor(seconds: float, floor: float | None) -> dict[str, Any]:
    if floor is None:
        return {}
    return {"floor_ms": 1e3 * floor, "over_floor": seconds / floor}
