"""Measure what a decode step costs beside the model: `python -m paceline.bench.decode_scheduler`.

Plan, apply and step message for many simulated sequences, without a model: the tokens are made up
and the message is serialized as gRPC does it. Two loads: *steady*, where sequences only grow, each
into a new block once in block_tokens steps, evenly spread; and *churn*, where in every step the
oldest sequence ends and one that was imported takes its place. Writes JSON with hardware and
versions to --output, or prints it.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from paceline.bench.environment import write_result
from paceline.decode_worker.outcomes import Admitted, DecodeStep
from paceline.decode_worker.scheduler import DecodeScheduler
from paceline.engine.block_allocator import BlockAllocator
from paceline.engine.prefix_cache import PrefixCache
from paceline.engine.step_plan import StepPlan, StepResult
from paceline.internal.v1 import worker_pb2
from paceline.kv_transfer.lease import FirstToken
from paceline.request import AttemptKey, Work
from paceline.sampling_params import SamplingParams
from paceline.worker.router_sessions import load_message, step_report

BLOCK_TOKENS = 16
VOCABULARY = 128_000
EOS = VOCABULARY
SESSION = 1
PARTS = ("plan", "apply", "message", "total")


class SimulatedWorker:
    """A scheduler whose steps give random tokens, with one step always in flight."""

    def __init__(self, num_sequences: int, max_tokens: int, prompt_tokens: int) -> None:
        max_model_len = prompt_tokens + BLOCK_TOKENS + max_tokens
        num_blocks = (num_sequences + 2) * (max_model_len // BLOCK_TOKENS + 4)
        allocator = BlockAllocator(num_blocks)
        self._max_tokens = max_tokens
        self._prompt_tokens = prompt_tokens
        self._rng = np.random.default_rng(0)
        self._num_admitted = 0
        self._in_flight: StepPlan | None = None
        self.num_sequences = num_sequences
        self.scheduler = DecodeScheduler(
            allocator,
            PrefixCache(allocator, BLOCK_TOKENS, bytes(32)),
            block_tokens=BLOCK_TOKENS,
            max_num_seqs=num_sequences + 8,
            max_num_batched_tokens=2 * num_sequences,
            local_prefill_tokens=0,
            watermark_blocks=0,
            promise_ttl_s=60.0,
            prefill_age_bound_s=2.0,
            eos_token_ids=(EOS,),
            max_model_len=max_model_len,
        )

    def admit(self, max_tokens: int | None = None) -> None:
        """Take a sequence whose KV has been imported and confirmed."""
        number = self._num_admitted
        self._num_admitted += 1
        # Lengths of every remainder, so that block boundaries are spread over the steps.
        num_tokens = self._prompt_tokens + number % BLOCK_TOKENS
        key = AttemptKey(f"request-{number}", 1)
        work = Work(
            key=key,
            choices=(0,),
            stream_ids=(number,),
            prompt=self._rng.integers(0, VOCABULARY, num_tokens, dtype=np.int32),
            output=np.empty(0, dtype=np.int32),
            sampling=SamplingParams(max_tokens=max_tokens or self._max_tokens, seed=number),
        )
        answer = self.scheduler.admit(work, SESSION, has_source=True, now=0.0)
        if not isinstance(answer, Admitted):
            raise RuntimeError(answer.message)
        self.scheduler.imported(key, (FirstToken(0, 1),), 0.0)
        self.scheduler.confirmed(key, 0.0)
        self.scheduler.import_ended(key)

    def step(self) -> dict[str, float]:
        """Do one round with a step in flight; give the seconds of each part."""
        started = time.perf_counter()
        plan = self.scheduler.plan(0.0)
        planned = time.perf_counter()
        assert plan is not None
        before, self._in_flight = self._in_flight, plan
        if before is None:
            return {}
        token_ids = self._rng.integers(0, VOCABULARY, len(before.sample_slots), dtype=np.int32)
        result = StepResult(before.step_id, token_ids)
        apply_started = time.perf_counter()
        step = self.scheduler.apply(result, 0.0)
        applied = time.perf_counter()
        self._serialize(step)
        ended = time.perf_counter()
        times = (planned - started, applied - apply_started, ended - applied)
        return dict(zip(PARTS, (*times, sum(times)), strict=True))

    def _serialize(self, step: DecodeStep) -> bytes:
        report = step_report(step.outputs[SESSION])
        report.load.CopyFrom(load_message(self.scheduler.load(), 0))
        return worker_pb2.SessionResponse(step=report).SerializeToString()


def measure(worker: SimulatedWorker, num_steps: int, between: Callable[[], None]) -> dict[str, Any]:
    """Time steps; `between` does what else happens in a round, untimed."""
    rounds = []
    gc.collect()
    gc.freeze()  # as a worker does when it is ready
    for _ in range(num_steps):
        between()
        if times := worker.step():
            rounds.append(times)
    rounds = rounds[len(rounds) // 10 :]
    worker.scheduler.check_integrity()
    return {
        part: {
            f"p{quantile}_us": round(
                float(np.percentile([times[part] for times in rounds], quantile)) * 1e6, 1
            )
            for quantile in (50, 90, 99)
        }
        for part in PARTS
    }


def measure_steady(num_sequences: int, num_steps: int) -> dict[str, Any]:
    """Sequences that only grow."""
    worker = SimulatedWorker(num_sequences, num_steps + 100, prompt_tokens=1024)
    for _ in range(num_sequences):
        worker.admit()
    return measure(worker, num_steps, between=lambda: None)


def measure_churn(num_sequences: int, num_steps: int) -> dict[str, Any]:
    """In every step one sequence ends and another one starts."""
    worker = SimulatedWorker(num_sequences, num_sequences, prompt_tokens=1024)
    # The first ones end one after the other, later ones after as many steps as there are sequences.
    for number in range(num_sequences):
        worker.admit(number + 2)
    return measure(worker, num_steps, between=worker.admit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--output", type=Path, help="JSON file; default: standard output")
    options = parser.parse_args()
    sys.setswitchinterval(0.0002)  # as a worker does
    config = {
        "num_sequences": options.sequences,
        "num_steps": options.steps,
        "block_tokens": BLOCK_TOKENS,
        "prompt_tokens": 1024,
    }
    result = {
        "steady": measure_steady(options.sequences, options.steps),
        "churn": measure_churn(options.sequences, options.steps // 4),
    }
    write_result(options.output, "decode_scheduler", config, result)


if __name__ == "__main__":
    main()
