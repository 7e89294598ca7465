"""Compute a step's logits: by a CUDA graph where one fits, else kernel by kernel.

    every row decodes        padded to one of a few sizes, replays a graph
    up to 1,024 tokens       padded to one of a few shapes, replays a graph: any row may decode
    more, or Hopper tiles    padded to a multiple of 128, launched kernel by kernel

Padded without graphs too, so that both give the same bits.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from paceline.engine.gpu.graphs import (
    PromptShape,
    StepGraphs,
    graph_sizes,
    padded_tokens,
    prompt_shapes,
    shape_for,
    size_for,
)
from paceline.engine.gpu.prefill_plan import PrefillPlanner, count_decode_rows
from paceline.engine.gpu.step_inputs import NO_TILES, RowShape, RowUpload
from paceline.engine.gpu.step_kernels import (
    MAX_SKINNY_ROWS,
    GpuBatch,
    GpuStepKernels,
    KernelResources,
)
from paceline.engine.kv_pool import KvPool
from paceline.engine.model_config import ModelConfig
from paceline.engine.step_kernels import StepModel
from paceline.engine.step_plan import StepPlan
from paceline.kernels.prefill_tiles import PrefillTiles, TileTable, most_tiles
from paceline.kernels.step_inputs_triton import resolve_rows_triton


class SlotState(NamedTuple):
    """What sequences keep from step to step, on the device; int32."""

    tables: torch.Tensor
    """[slots, columns] block ids"""
    last_samples: torch.Tensor
    """[slots]"""


class Computed(NamedTuple):
    """What a step's layers wrote, and for whom it is sampled; on the device."""

    logits: torch.Tensor
    """[S, vocab_size]"""
    sample_slots: torch.Tensor
    """int32 [S]"""
    sample_indices: torch.Tensor
    """int32 [S] in the sequences' outputs"""

    def first(self, num_samples: int) -> "Computed":
        """Leave out what pads."""
        return Computed(*(tensor[:num_samples] for tensor in self))


class StepLayers:
    """The layers' half of a runner, from the upload of a step's rows to its logits."""

    def __init__(
        self,
        config: ModelConfig,
        model: StepModel,
        slots: SlotState,
        pool: KvPool,
        *,
        num_heads: int,
        max_num_tokens: int,
        max_num_samples: int,
        max_model_len: int,
        max_padded_tokens: int,
    ) -> None:
        """num_heads: of this rank. max_*: of a step; max_padded_tokens: of one that is padded."""
        device, max_num_slots = pool.blocks.device, len(slots.tables)
        self._model = model
        self._slots = slots
        self._max_num_tokens = max_num_tokens
        self._block_tokens = pool.layout.block_tokens
        self._row_tables = torch.zeros_like(slots.tables)
        self._token_ids = torch.zeros(max_num_tokens, dtype=torch.int32, device=device)
        self._rows = RowUpload(max_num_slots, max_num_tokens, max_num_samples, device)
        sizes = graph_sizes(max_num_slots)
        shapes = prompt_shapes(max_num_slots, min(max_num_tokens, max_padded_tokens))
        self._decodes: StepGraphs[int, Computed] = StepGraphs(sizes, device)
        self._prompts: StepGraphs[PromptShape, Computed] = StepGraphs(shapes, device)
        self._planner = PrefillPlanner(config, num_heads, pool.kv)
        self._resources: KernelResources | None = KernelResources(
            config,
            num_heads,
            pool.kv,
            max_model_len=max_model_len,
            decode_sizes=[*sizes, *(shape.num_rows for shape in shapes)],
        )

    @property
    def decode_sizes(self) -> tuple[int, ...]:
        """Rows that decode steps are padded to."""
        return self._decodes.shapes

    def graph_rows(self, *, decodes: bool) -> list[int]:
        """Return the rows of logits that each captured graph keeps."""
        rows = [shape.num_rows for shape in self._prompts.shapes]
        return rows + list(self._decodes.shapes) if decodes else rows

    def capture(self, on_captured: Callable[[], None], *, decodes: bool) -> None:
        """Capture steps with prompts, and with `decodes` decode steps."""
        self._prompts.capture(self._prompts_of, on_captured)
        if decodes:
            self._decodes.capture(self._decodes_of, on_captured)

    def launch_padded(self) -> None:
        """Launch a step of every shape, of rows that do nothing."""
        for shape in self._prompts.shapes:
            self._prompts_of(shape)()
        for size in self._decodes.shapes:
            self._decodes_of(size)()

    def launch_largest_prompts(self) -> None:
        """Launch the largest step with prompts, if there are any, of rows that do nothing."""
        for shape in self._prompts.shapes[-1:]:
            self._prompts_of(shape)()

    def pad_decodes(self, size: int) -> None:
        """Make every row of a decode step one that pads."""
        self._rows.pad(_decode_shape(size))

    def captured_decodes(self, size: int) -> Computed:
        """Return what the captured step of that size writes."""
        return self._decodes.result(size)

    def close(self) -> None:
        """Let go of the pool and of the graphs that read it."""
        self._decodes.close()
        self._prompts.close()
        self._resources = None

    def compute_decodes(self, plan: StepPlan) -> tuple[Computed, int | None]:
        """Compute a step of one sampled token a row; return what it wrote, padded, and the size of
        its graph, if it has one.
        """
        size = size_for(self._decodes.shapes, len(plan.slots))
        assert size is not None  # the largest is the number of slots
        self._rows.pack(plan, len(plan.slots), _decode_shape(size))
        if size in self._decodes:
            return self._decodes.replay(size), size
        return self._run_decodes(size), None

    def compute(self, plan: StepPlan) -> Computed:
        """Compute any other step."""
        num_decode_rows = count_decode_rows(plan)
        tiles = self._planner.choose(plan, num_decode_rows)
        shape = shape_for(
            self._prompts.shapes, plan.num_tokens, max(len(plan.slots), len(plan.sample_slots))
        )
        if tiles is None or tiles.specialized or shape is None:
            computed = self._compute_by_kernels(plan, num_decode_rows, tiles)
        else:
            rows, tiles = self._padded(shape)
            entries = self._planner.cut(plan, num_decode_rows, tiles)
            self._rows.pack(plan, num_decode_rows, rows, entries)
            if shape in self._prompts:
                computed = self._prompts.replay(shape)
            else:
                computed = self._run_prompts(shape)
        return computed.first(len(plan.sample_slots))

    def _compute_by_kernels(
        self, plan: StepPlan, num_decode_rows: int, tiles: PrefillTiles | None
    ) -> Computed:
        """Compute a step kernel by kernel, its products at sizes that start-up has launched."""
        sizes, num_samples = self._decodes.shapes, len(plan.sample_slots)
        entries = NO_TILES if tiles is None else self._planner.cut(plan, num_decode_rows, tiles)
        num_tokens = plan.num_tokens
        if num_tokens > MAX_SKINNY_ROWS:
            num_tokens = padded_tokens(num_tokens, self._max_num_tokens)
        padded = size_for(sizes, num_samples) if num_samples else None
        rows = RowShape(len(plan.slots), num_tokens, padded or num_samples, len(entries))
        self._rows.pack(plan, num_decode_rows, rows, entries)
        return self._run(
            rows,
            tiles,
            num_decode_rows=num_decode_rows,
            first_prompt=num_decode_rows,
        )

    def _decodes_of(self, size: int) -> Callable[[], Computed]:
        """Return the launch of a decode step, from what is packed by then."""
        self.pad_decodes(size)
        return lambda: self._run_decodes(size)

    def _run_decodes(self, size: int) -> Computed:
        return self._run(_decode_shape(size), None, num_decode_rows=size)

    def _prompts_of(self, shape: PromptShape) -> Callable[[], Computed]:
        """Return the launch of a step with prompts, from what is packed by then."""
        self._rows.pad(self._padded(shape)[0])
        return lambda: self._run_prompts(shape)

    def _run_prompts(self, shape: PromptShape) -> Computed:
        rows, tiles = self._padded(shape)
        # Which rows decode is not known: each of them may.
        return self._run(
            rows,
            tiles,
            num_decode_rows=shape.num_rows,
            first_prompt=0,
        )

    def _padded(self, shape: PromptShape) -> tuple[RowShape, PrefillTiles]:
        num_tokens, num_rows = shape
        tiles = self._planner.tiles_for(num_tokens)
        num_tiles = most_tiles(num_tokens, num_rows, tiles)
        return RowShape(num_rows, num_tokens, num_rows, num_tiles), tiles

    def _run(
        self,
        shape: RowShape,
        tiles: PrefillTiles | None,
        *,
        num_decode_rows: int,
        first_prompt: int | None = None,
    ) -> Computed:
        """Launch the layers of what is packed in that shape; see `GpuBatch`.

        first_prompt: None where no row has a prompt, and every token is sampled in order.
        """
        arrays = self._rows.arrays(shape)
        row_tables = self._row_tables[: shape.num_rows]
        token_ids = self._token_ids[: shape.num_tokens]
        resolve_rows_triton(
            *self._slots,
            arrays.row_slots,
            arrays.lengths,
            arrays.token_rows,
            arrays.given,
            self._block_tokens,
            row_tables,
            token_ids,
        )
        assert self._resources is not None  # a closed runner launches nothing
        decode_lengths = arrays.decode_lengths[:num_decode_rows]
        batch = GpuBatch(
            token_ids=token_ids,
            positions=arrays.positions,
            prompt_rows=arrays.prompt_rows,
            row_tables=row_tables,
            lengths=arrays.lengths,
            offsets=arrays.offsets,
            decode_lengths=decode_lengths,
            decode_shares=self._resources.share_rows(decode_lengths),
            first_prompt=first_prompt or 0,
            prefill=None if tiles is None else TileTable(tiles, arrays.tiles.view(-1, 2)),
            sample_positions=None if first_prompt is None else arrays.sample_positions,
        )
        logits = self._model.forward(GpuStepKernels(self._resources, batch))
        return Computed(logits, arrays.sample_slots, arrays.sample_indices)


def _decode_shape(size: int) -> RowShape:
    return RowShape(size, size, size)
