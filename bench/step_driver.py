"""Run a model runner alone, with plans like the schedulers', and time its steps."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from paceline.engine.load import LoadedEngine
from paceline.engine.step_plan import EMPTY, Int32Array, SlotStart, StepHandle, StepPlan
from paceline.engine.step_plan_builder import StepPlanBuilder
from paceline.errors import CapacityError, ConfigError
from paceline.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, seed=0)
KV_DEVIATION = 0.5
"""Of made-up keys and values: attention spreads over the context, as it does in real models."""
FILLED_BLOCKS = 256
"""Blocks filled at once, so that random numbers take little memory beside the pool."""


class StepTimes(NamedTuple):
    """Times of consecutive steps, in seconds."""

    steps: list[float]
    """From one step's result to the next one's."""
    launches: list[float]
    """Within `launch`: the CPU's work, unless the device's queue was full."""


class StepDriver:
    """Gives sequences blocks of an engine's pool, in random order, and runs them."""

    def __init__(self, engine: LoadedEngine, *, overlap: bool, seed: int = 0) -> None:
        """overlap: launch a step before the result of the one before it."""
        self._engine = engine
        self._overlap = overlap
        self._rng = np.random.default_rng(seed)
        self._step_id = 0
        self._block_tokens = engine.layout.block_tokens

    def fill_kv(self) -> None:
        """Put small random values into every block, instead of prompts' keys and values."""
        kv = self._engine.pool.kv
        for start in range(0, len(kv), FILLED_BLOCKS):
            kv[start : start + FILLED_BLOCKS].normal_(std=KV_DEVIATION)
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)

    @contextmanager
    def scaled_logits(self, factor: float) -> Iterator[None]:
        """Multiply all logits meanwhile, in the last norm's weights, which are 1 if random."""
        runner: Any = self._engine.runner  # its weights are nobody else's business
        runner._model._final_norm.mul_(factor)
        try:
            yield
        finally:
            runner._model._final_norm.div_(factor)

    def run(self, plans: Iterator[StepPlan], num_steps: int) -> StepTimes:
        """Run the next plans to their end. The first step's time starts with its launch."""
        launches: list[float] = []
        moments = [time.perf_counter()]
        in_flight: StepHandle | None = None
        for _ in range(num_steps):
            plan = next(plans)
            started = time.perf_counter()
            launched = self._engine.runner.launch(plan)
            launches.append(time.perf_counter() - started)
            ready, in_flight = (in_flight, launched) if self._overlap else (launched, None)
            if ready is not None:
                ready.result()
                moments.append(time.perf_counter())
        if in_flight is not None:
            in_flight.result()
            moments.append(time.perf_counter())
        return StepTimes(np.diff(moments).tolist(), launches)

    def decode_plans(
        self,
        batch: int,
        context: int,
        *,
        warm_up: int,
        num_steps: int,
        sampling: SamplingParams = GREEDY,
    ) -> Iterator[StepPlan]:
        """Plan warm_up and then num_steps decode steps of sequences whose KV is there: `context`
        tokens in the middle of the latter.

        `sampling` is of every sequence, each with a seed of its own. They reach the ends of their
        blocks at different steps, as they do while serving.
        """
        size = self._block_tokens
        spread = np.arange(batch) * size // batch
        starts = context - warm_up - (num_steps + 1) // 2 + spread - round(spread.mean())
        if starts.min() < 1:
            raise ConfigError(
                f"{warm_up} + {num_steps} steps are too many around a context of {context} tokens. "
                "Lower --steps or --warm-up, or lengthen the context."
            )
        num_steps += warm_up
        starts = starts.astype(np.int32)
        num_blocks = -(-starts // size)
        blocks = self._shuffled_blocks(int((-(-(starts + num_steps) // size)).sum()))
        slots = np.arange(batch, dtype=np.int32)
        for step in range(num_steps):
            builder = self._next_plan()
            if step == 0:
                for slot in range(batch):
                    prompt = self._random_tokens(int(starts[slot]))
                    seeded = replace(sampling, seed=slot)
                    builder.start_slot(SlotStart(slot, seeded, 0, prompt, EMPTY))
                    builder.set_blocks(slot, 0, [next(blocks) for _ in range(num_blocks[slot])])
            for slot in np.flatnonzero(starts == num_blocks * size).tolist():
                builder.set_blocks(slot, int(num_blocks[slot]), (next(blocks),))
                num_blocks[slot] += 1
            if step == 0:  # the first tokens came with the KV
                for slot in range(batch):
                    position = builder.add_row(slot, int(starts[slot]), self._random_tokens(1))
                    builder.add_sample(position, slot, 1)
            else:
                builder.add_decode_rows(slots, starts, np.full(batch, step + 1, dtype=np.int32))
            yield builder.build()
            starts = starts + 1

    def prefill_plans(self, num_tokens: int, chunk_tokens: int) -> Iterator[StepPlan]:
        """Plan one prompt in chunks, the first token sampled from the last of them."""
        blocks = self._shuffled_blocks(-(-num_tokens // self._block_tokens))
        prompt = self._random_tokens(num_tokens)
        for start in range(0, num_tokens, chunk_tokens):
            builder = self._next_plan()
            if start == 0:
                builder.start_slot(SlotStart(0, GREEDY, 0, prompt, EMPTY))
                builder.set_blocks(0, 0, list(blocks))
            position = builder.add_row(0, start, prompt[start : start + chunk_tokens])
            if start + chunk_tokens >= num_tokens:
                builder.add_sample(position, 0, 0)
            yield builder.build()

    def _next_plan(self) -> StepPlanBuilder:
        self._step_id += 1
        return StepPlanBuilder(self._step_id)

    def _random_tokens(self, count: int) -> Int32Array:
        return self._rng.integers(0, self._engine.config.vocab_size, count, dtype=np.int32)

    def _shuffled_blocks(self, count: int) -> Iterator[int]:
        num_blocks = self._engine.num_blocks
        if count > num_blocks:
            raise CapacityError(
                f"{count} KV blocks are needed for these sequences, and the pool has {num_blocks}. "
                "Leave out the largest points, or raise --gpu-memory-utilization."
            )
        return iter(self._rng.permutation(num_blocks)[:count].tolist())
