"""Run planned steps on this process's device: block tables and last samples live here, by slot."""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from paceline.engine.cpu.step_batch import make_step_batch
from paceline.engine.cpu.step_kernels import CpuStepKernels
from paceline.engine.kv_pool import KvPool
from paceline.engine.model_config import ModelConfig
from paceline.engine.step_kernels import StepModel
from paceline.engine.step_plan import FinishedStep, Int32Array, SlotStart, StepPlan, StepResult
from paceline.kernels.block_copy import block_copy
from paceline.request import TopLogprobs


class Sampled(Protocol):
    """What a sampler returns."""

    @property
    def token_ids(self) -> torch.Tensor:
        """[S]"""

    @property
    def logprobs(self) -> dict[int, TopLogprobs]:
        """By sample number."""

    @property
    def failures(self) -> dict[int, str]:
        """By sample number."""


class StepSampler(Protocol):
    """A sampler as the runner sees it: keeps each slot's parameters and tokens."""

    def start(self, slot_start: SlotStart) -> None:
        """A sequence takes a slot."""

    def sample(self, logits: torch.Tensor, slots: Int32Array, indices: Int32Array) -> Sampled:
        """Choose a token for each row of logits; may overwrite them."""


class CpuModelRunner:
    """ModelRunner that computes each step within `launch`, as CPUs do."""

    def __init__(
        self,
        config: ModelConfig,
        model: StepModel,
        sampler: StepSampler,
        pool: KvPool,
        *,
        max_num_slots: int,
        max_model_len: int,
    ) -> None:
        block_tokens = pool.layout.block_tokens
        self.max_num_slots = max_num_slots
        self._config = config
        self._windows = frozenset(config.windows)
        self._model = model
        self._sampler = sampler
        self._pool: KvPool | None = pool
        num_columns = -(-max_model_len // block_tokens)
        self._tables: Int32Array = np.zeros((max_num_slots, num_columns), np.int32)
        self._last_samples: npt.NDArray[np.int64] = np.zeros(max_num_slots, np.int64)

    def launch(self, plan: StepPlan) -> FinishedStep:
        """Run the step. An error is kept for `result`."""
        try:
            with torch.inference_mode():
                return FinishedStep(self._run(plan))
        except Exception as error:
            return FinishedStep(error)

    def close(self) -> None:
        """Let go of the pool's memory."""
        self._pool = None

    def _run(self, plan: StepPlan) -> StepResult:
        pool = self._pool
        if pool is None:
            raise RuntimeError(f"step {plan.step_id} was launched after the runner was closed")
        for slot_start in plan.slot_starts:
            self._sampler.start(slot_start)
        self._tables[plan.table_slots, plan.table_columns] = plan.table_blocks
        if len(plan.copy_sources):
            block_copy(
                pool.blocks,
                torch.from_numpy(plan.copy_sources.astype(np.int64)),
                torch.from_numpy(plan.copy_targets.astype(np.int64)),
            )
        if not len(plan.slots):
            return StepResult(plan.step_id, np.empty(0, np.int32))
        batch = make_step_batch(plan, self._tables, self._last_samples, pool.kv, self._windows)
        logits = self._model.forward(CpuStepKernels(self._config, batch, pool.kv))
        if not len(plan.sample_slots):
            return StepResult(plan.step_id, np.empty(0, np.int32))
        sampled = self._sampler.sample(
            logits.to(torch.float32), plan.sample_slots, plan.sample_indices
        )
        token_ids = sampled.token_ids.numpy()
        self._last_samples[plan.sample_slots] = token_ids
        return StepResult(
            plan.step_id,
            token_ids.astype(np.int32),
            sampled.logprobs,
            failures=sampled.failures,
        )
