"""Drive a model runner with plans made by hand, and keep the logits it computed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline.engine.cpu.model_runner import CpuModelRunner
from paceline.engine.cpu.sampler import Sampler
from paceline.engine.kv_pool import KvPool
from paceline.engine.model_config import ModelConfig, read_model_config
from paceline.engine.models.llama import LlamaModel
from paceline.engine.parallel import ParallelContext
from paceline.engine.step_kernels import StepKernels, StepModel
from paceline.engine.step_plan import ModelRunner, SlotStart, StepPlan, StepResult
from paceline.engine.weights import load_weights
from paceline.kv_layout import attention_layout
from paceline.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
MAX_GPU_SAMPLES = 256
"""Tests sample every position of a prompt, which workers never do."""


@dataclass
class RecordingModel:
    """Remembers the logits of each step."""

    model: StepModel
    logits: list[torch.Tensor] = field(default_factory=list)

    def forward(self, kernels: StepKernels) -> torch.Tensor:
        logits = self.model.forward(kernels)
        if logits.is_cuda and torch.cuda.is_current_stream_capturing():
            return logits  # they cannot be read, and a replay does not come by here
        self.logits.append(logits.to("cpu", torch.float32, copy=True))
        return logits


@dataclass
class Row:
    """New tokens of a slot; tokens None: one, the slot's last sample."""

    slot: int
    tokens: list[int] | None
    sample: str = "last"
    """last, all or none: the positions whose logits are wanted"""
    sample_slots: list[int] | None = None
    """Slots that sample from the row's last position, instead of its own."""


class RunnerDriver:
    """A runner over a pool whose blocks are handed out in a shuffled order."""

    def __init__(
        self,
        folder: Path,
        *,
        block_tokens: int = 16,
        num_blocks: int = 128,
        num_slots: int = 16,
        dtype: str = "float32",
        seed: int = 0,
        kind: str = "cpu",
        pads_prompts: bool = True,
    ) -> None:
        """kind: cpu, or gpu, which is Triton's interpreter where there is no GPU."""
        self.config: ModelConfig = read_model_config(folder)
        layout = attention_layout(
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            block_tokens=block_tokens,
            dtype=dtype,
        )
        weights = load_weights(
            folder, self.config, getattr(torch, dtype), ParallelContext(), lambda done, total: None
        )
        device = "cpu"
        if kind == "gpu":
            from triton_device import device as triton_device

            device = triton_device()
            weights = {name: tensor.to(device) for name, tensor in weights.items()}
        # Bytes of 0x7b are large finite numbers: reading a slot that was not written shows.
        memory = torch.full((num_blocks, layout.block_bytes), 0x7B, dtype=torch.uint8)
        self.pool = KvPool(layout, memory.to(device))
        self.block_tokens = block_tokens
        self.model = RecordingModel(LlamaModel(self.config, weights))
        self.num_slots = num_slots
        self.runner = (
            self._make_gpu_runner(pads_prompts) if kind == "gpu" else self._make_cpu_runner()
        )
        self.free = list(np.random.default_rng(seed).permutation(num_blocks))
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self._pending_table: dict[tuple[int, int], int] = {}
        self._starts: list[SlotStart] = []
        self._copies: list[tuple[int, int]] = []
        self._step_id = 0

    def _make_cpu_runner(self) -> ModelRunner:
        return CpuModelRunner(
            self.config,
            self.model,
            Sampler(self.num_slots, self.config.vocab_size, (), "cpu"),
            self.pool,
            max_num_slots=self.num_slots,
            max_model_len=self.config.max_position_embeddings,
        )

    def _make_gpu_runner(self, pads_prompts: bool) -> ModelRunner:
        from paceline.engine.gpu.model_runner import GpuModelRunner
        from paceline.engine.gpu.sampler import GpuSampler

        sampler = GpuSampler(
            self.num_slots,
            MAX_GPU_SAMPLES,
            self.config.vocab_size,
            self.pool.kv.dtype,
            (),
            self.pool.blocks.device,
        )
        return GpuModelRunner(
            self.config,
            self.model,
            sampler,
            self.pool,
            num_heads=self.config.num_heads,
            max_num_slots=self.num_slots,
            max_num_tokens=512,
            max_model_len=self.config.max_position_embeddings,
            max_padded_tokens=512 if pads_prompts else 0,
        )

    def start(self, slot: int, *, blocks: list[int] | None = None, num_tokens: int = 0) -> None:
        """Begin a sequence, perhaps on blocks that hold its first tokens already."""
        empty = np.empty(0, np.int32)
        self._starts.append(SlotStart(slot, GREEDY, 0, empty, empty))
        self.tables[slot], self.lengths[slot] = [], num_tokens
        for block in blocks or []:
            self._append_block(slot, block)

    def copy_block(self, slot: int, column: int) -> None:
        """Give the slot a copy of its block, made in the next step."""
        target = int(self.free.pop())
        self._copies.append((self.tables[slot][column], target))
        self.tables[slot][column] = target
        self._pending_table[slot, column] = target

    def _append_block(self, slot: int, block: int) -> None:
        self._pending_table[slot, len(self.tables[slot])] = int(block)
        self.tables[slot].append(int(block))

    def step(self, *rows: Row) -> tuple[StepResult, torch.Tensor]:
        """Run one step; return its result and the logits of its samples [S, vocabulary]."""
        plan: dict[str, list[Any]] = {
            "slots": [],
            "starts": [],
            "num_new_tokens": [],
            "from_last_sample": [],
            "tokens": [],
            "sample_positions": [],
            "sample_slots": [],
        }
        position = 0
        for row in rows:
            count = 1 if row.tokens is None else len(row.tokens)
            start = self.lengths[row.slot]
            while len(self.tables[row.slot]) * self.block_tokens < start + count:
                self._append_block(row.slot, self.free.pop())
            plan["slots"].append(row.slot)
            plan["starts"].append(start)
            plan["num_new_tokens"].append(count)
            plan["from_last_sample"].append(row.tokens is None)
            plan["tokens"] += row.tokens or []
            if row.sample == "all":
                plan["sample_positions"] += range(position, position + count)
                plan["sample_slots"] += [row.slot] * count
            elif row.sample == "last":
                slots = row.sample_slots or [row.slot]
                plan["sample_positions"] += [position + count - 1] * len(slots)
                plan["sample_slots"] += slots
            position += count
            self.lengths[row.slot] = start + count
        self._step_id += 1
        arrays = {name: np.array(values, np.int32) for name, values in plan.items()}
        arrays["from_last_sample"] = arrays["from_last_sample"].astype(np.bool_)
        entries = [(*place, block) for place, block in self._pending_table.items()]
        table = np.array(entries, np.int32).reshape(-1, 3)
        copies = np.array(self._copies, np.int32).reshape(-1, 2)
        result = self.runner.launch(
            StepPlan(
                step_id=self._step_id,
                **arrays,
                sample_indices=np.zeros(len(plan["sample_slots"]), np.int32),
                slot_starts=tuple(self._starts),
                table_slots=table[:, 0],
                table_columns=table[:, 1],
                table_blocks=table[:, 2],
                copy_sources=copies[:, 0],
                copy_targets=copies[:, 1],
            )
        ).result()
        self._pending_table, self._starts, self._copies = {}, [], []
        logits = (
            self.model.logits[-1][: len(plan["sample_slots"])]
            if plan["sample_slots"]
            else torch.empty(0)
        )
        return result, logits
