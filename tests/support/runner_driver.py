"""Drive a model runner with plans made by hand, and keep the logits it computed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from paceline.engine.cpu.model_runner import CpuModelRunner
from paceline.engine.kv_pool import KvPool
from paceline.engine.model_config import ModelConfig, read_model_config
from paceline.engine.models.llama import LlamaModel
from paceline.engine.parallel import ParallelContext
from paceline.engine.step_plan import Int32Array, SlotStart, StepPlan, StepResult
from paceline.engine.weights import load_weights
from paceline.kv_layout import attention_layout
from paceline.request import TopLogprobs
from paceline.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


class Chosen(NamedTuple):
    token_ids: torch.Tensor
    logprobs: dict[int, TopLogprobs]


@dataclass
class ArgmaxSampler:
    """Greedy, and remembers the logits."""

    logits: list[torch.Tensor] = field(default_factory=list)

    def start(self, slot_start: SlotStart) -> None:
        pass

    def sample(self, logits: torch.Tensor, slots: Int32Array, indices: Int32Array) -> Chosen:
        self.logits.append(logits.clone())
        return Chosen(logits.argmax(dim=-1), {})


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
    ) -> None:
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
        # Bytes of 0x7b are large finite numbers: reading a slot that was not written shows.
        memory = torch.full((num_blocks, layout.block_bytes), 0x7B, dtype=torch.uint8)
        self.pool = KvPool(layout, memory)
        self.sampler = ArgmaxSampler()
        self.block_tokens = block_tokens
        self.runner = CpuModelRunner(
            self.config,
            LlamaModel(self.config, weights),
            self.sampler,
            self.pool,
            max_num_slots=num_slots,
            max_model_len=self.config.max_position_embeddings,
        )
        self.free = list(np.random.default_rng(seed).permutation(num_blocks))
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self._pending_table: list[tuple[int, int, int]] = []
        self._starts: list[SlotStart] = []
        self._copies: list[tuple[int, int]] = []
        self._step_id = 0

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
        self._pending_table.append((slot, column, target))

    def _append_block(self, slot: int, block: int) -> None:
        self._pending_table.append((slot, len(self.tables[slot]), int(block)))
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
        table = np.array(self._pending_table, np.int32).reshape(-1, 3)
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
        self._pending_table, self._starts, self._copies = [], [], []
        logits = self.sampler.logits[-1] if plan["sample_slots"] else torch.empty(0)
        return result, logits
