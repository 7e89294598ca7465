"""Run planned steps on a GPU, launched ahead: nothing in a step waits for the device.

    launch(n + 1)   CPU  | pack, copy, replay |            result(n): wait, read pinned memory
                    GPU  ...step n............|prepare|layers|sample|copy to pinned|event

What sequences keep from step to step lives on the device by slot: block tables, the last sampled
token, sampling parameters. Steps in which every row decodes are padded to one of a few sizes and
replay two CUDA graphs: of the layers, and of the kind of sampling that they need. Steps with few
tokens of prompts are padded, too, and replay a graph of the layers. The others are launched kernel
by kernel.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from paceline.engine.gpu.graphs import (
    PROMPT_TOKENS,
    PromptShape,
    StepGraphs,
    graph_sizes,
    prompt_shapes,
    shape_for,
    size_for,
)
from paceline.engine.gpu.prefill_plan import PrefillPlanner, count_decode_rows
from paceline.engine.gpu.sampler import SAMPLING_KINDS, GpuSampler, SamplingKind
from paceline.engine.gpu.step_inputs import (
    NO_TILES,
    ChangeUpload,
    PinnedRing,
    RowShape,
    RowUpload,
)
from paceline.engine.gpu.step_kernels import GpuBatch, GpuStepKernels, KernelResources
from paceline.engine.kv_pool import KvPool
from paceline.engine.model_config import ModelConfig
from paceline.engine.step_kernels import StepModel
from paceline.engine.step_plan import FinishedStep, StepHandle, StepPlan, StepResult
from paceline.kernels.block_copy_triton import block_copy_triton
from paceline.kernels.prefill_tiles import PrefillTiles, TileTable, most_tiles
from paceline.kernels.step_inputs_triton import (
    keep_samples_triton,
    resolve_rows_triton,
    set_table_entries_triton,
)

PROMPT_DECODE_SIZE = 4
"""Decode rows that a captured step with prompts has tiles for: more only split less."""


class Computed(NamedTuple):
    """What a step's layers wrote, and for whom it is sampled; on the device."""

    logits: torch.Tensor
    """[S, vocab_size]"""
    sample_slots: torch.Tensor
    """int32 [S]"""
    sample_indices: torch.Tensor
    """int32 [S] in the sequences' outputs"""


class LaunchedStep(NamedTuple):
    """A step on its way. Implements `StepHandle`."""

    event: torch.cuda.Event | None
    finish: Callable[[], StepResult]

    def done(self) -> bool:
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def result(self) -> StepResult:
        if self.event is not None:
            self.event.synchronize()
        return self.finish()


class GpuModelRunner:
    """ModelRunner of one GPU; on a CPU device its kernels run in Triton's interpreter."""

    def __init__(
        self,
        config: ModelConfig,
        model: StepModel,
        sampler: GpuSampler,
        pool: KvPool,
        *,
        num_heads: int,
        max_num_slots: int,
        max_num_tokens: int,
        max_model_len: int,
        max_padded_tokens: int = PROMPT_TOKENS[-1],
    ) -> None:
        """num_heads: of this rank. max_num_tokens: new tokens of a step at most.

        max_padded_tokens: a step with prompts of more tokens is launched as it is.
        """
        device = pool.blocks.device
        self.max_num_slots = max_num_slots
        self._config = config
        self._model = model
        self._sampler = sampler
        self._pool: KvPool | None = pool
        self._device = device
        self._block_tokens = pool.layout.block_tokens
        self._max_num_tokens = max(max_num_tokens, max_num_slots)
        self._max_model_len = max_model_len
        num_columns = -(-max_model_len // self._block_tokens)

        def empty(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._tables = empty(max_num_slots, num_columns)
        self._last_samples = empty(max_num_slots)
        self._row_tables = empty(max_num_slots, num_columns)
        self._token_ids = empty(self._max_num_tokens)
        sizes = graph_sizes(max_num_slots)
        shapes = prompt_shapes(max_num_slots, min(self._max_num_tokens, max_padded_tokens))
        self._layers: StepGraphs[int, Computed] = StepGraphs(sizes, device)
        self._samplings: dict[SamplingKind, StepGraphs[int, None]] = {
            kind: StepGraphs(sizes, device) for kind in SAMPLING_KINDS
        }
        self._prompts: StepGraphs[PromptShape, Computed] = StepGraphs(shapes, device)
        self._resources: KernelResources | None = KernelResources(
            config,
            num_heads,
            pool.kv,
            max_model_len=max_model_len,
            decode_sizes=[(size, size) for size in sizes]
            + [(shape.num_rows, PROMPT_DECODE_SIZE) for shape in shapes],
        )
        self._planner = PrefillPlanner(config, num_heads, pool.kv)
        self._rows = RowUpload(max_num_slots, self._max_num_tokens, sampler.max_num_samples, device)
        self._changes = ChangeUpload(device)
        self._results = PinnedRing(sampler.num_result_words, device)

    def num_graphs(self, *, decodes: bool) -> int:
        """Say how many `capture_graphs` captures."""
        return sum(len(graphs.shapes) for graphs in self._all_graphs(decodes))

    def logits_rows(self, *, decodes: bool) -> list[int]:
        """Return the rows of logits that each graph of layers keeps."""
        rows = [shape.num_rows for shape in self._prompts.shapes]
        return rows + list(self._layers.shapes) if decodes else rows

    def capture_graphs(
        self, on_captured: Callable[[], None] = lambda: None, *, decodes: bool = True
    ) -> None:
        """Capture steps with prompts, and decode steps; from then on they are replayed.

        Called before the first step. Raises what the device raises, its lack of memory for one.
        """
        with torch.inference_mode():
            self._prompts.capture(self._prompts_of, on_captured)
            if decodes:
                self._layers.capture(self._layers_of, on_captured)
                for kind, graphs in self._samplings.items():
                    graphs.capture(partial(self._sampling_of, kind), on_captured)

    def launch_captured_shapes(self) -> None:
        """Launch the layers of every shape that can be captured, of rows that do nothing."""
        with torch.inference_mode():
            for shape in self._prompts.shapes:
                self._prompts_of(shape)()
            for size in self._layers.shapes:
                self._layers_of(size)()

    def _all_graphs(self, decodes: bool) -> Iterator[StepGraphs[Any, Any]]:
        yield self._prompts
        if decodes:
            yield self._layers
            yield from self._samplings.values()

    def launch(self, plan: StepPlan) -> StepHandle:
        """Begin a step. An error before it was begun is kept for `result`."""
        try:
            with torch.inference_mode():
                return self._launch(plan)
        except Exception as error:
            return FinishedStep(error)

    def close(self) -> None:
        """Let go of the pool and of the graphs that read it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for graphs in self._all_graphs(decodes=True):
            graphs.close()
        self._pool = self._resources = None

    def _launch(self, plan: StepPlan) -> LaunchedStep:
        pool = self._pool
        if pool is None:
            raise RuntimeError(f"step {plan.step_id} was launched after the runner was closed")
        self._check(plan)
        self._apply_changes(plan, pool)
        if not len(plan.slots):
            return self._launched(lambda: StepResult(plan.step_id, np.empty(0, np.int32)))
        computed = self._compute_decode(plan) if _only_decodes(plan) else self._compute(plan)
        return self._read_back(plan, computed)

    def _read_back(self, plan: StepPlan, computed: Computed) -> LaunchedStep:
        """Copy what the step sampled to pinned memory, behind it."""
        sampler, slots = self._sampler, plan.sample_slots
        with_logprobs = sampler.wants_logprobs(slots)
        if with_logprobs:
            sampler.logprobs(computed.logits, computed.sample_slots)
        words = sampler.result_words(with_logprobs=with_logprobs)
        pinned = self._results.next()[: words.shape[0]]
        pinned.copy_(words, non_blocking=True)

        def finish() -> StepResult:
            samples = sampler.results(pinned, slots, with_logprobs=with_logprobs)
            return StepResult(plan.step_id, samples.token_ids, samples.logprobs)

        return self._launched(finish)

    def _launched(self, finish: Callable[[], StepResult]) -> LaunchedStep:
        if self._device.type != "cuda":
            return LaunchedStep(None, finish)
        # A wait for it sleeps: the io thread has better use for the core.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        return LaunchedStep(event, finish)

    def _check(self, plan: StepPlan) -> None:
        """Refuse what a kernel would take as an address, before anything is launched."""
        num_rows, num_tokens = len(plan.slots), plan.num_tokens
        if num_rows > self.max_num_slots or num_tokens > self._max_num_tokens:
            raise ValueError(
                f"step {plan.step_id} has {num_rows} rows and {num_tokens} new tokens; the runner "
                f"was made for {self.max_num_slots} and {self._max_num_tokens}"
            )
        if len(plan.tokens) and not 0 <= plan.tokens.min() <= plan.tokens.max() < (
            self._config.vocab_size
        ):
            raise IndexError(
                f"step {plan.step_id} has token ids {plan.tokens.min()} to {plan.tokens.max()}; "
                f"the vocabulary has {self._config.vocab_size}"
            )
        places = plan.table_slots.astype(np.int64) * self._tables.shape[1] + plan.table_columns
        if len(np.unique(places)) < len(places):
            raise ValueError(
                f"step {plan.step_id} sets an entry of a block table twice, and which of the two "
                "would hold is open"
            )
        longest = int((plan.starts + plan.num_new_tokens).max(initial=0))
        if longest > self._max_model_len:  # kernels would leave such a row as it is, silently
            raise ValueError(
                f"step {plan.step_id} makes a sequence of {longest} tokens; the runner was made "
                f"for {self._max_model_len}"
            )

    def _apply_changes(self, plan: StepPlan, pool: KvPool) -> None:
        if not (plan.slot_starts or len(plan.table_slots) or len(plan.copy_sources)):
            return
        *tables, sources, targets, starts = self._changes.pack(
            (
                plan.table_slots,
                plan.table_columns,
                plan.table_blocks,
                plan.copy_sources,
                plan.copy_targets,
                self._sampler.encode_starts(plan.slot_starts),
            )
        )
        if plan.slot_starts:
            self._sampler.start(starts, len(plan.slot_starts))
        set_table_entries_triton(self._tables, *tables)
        if len(plan.copy_sources):
            block_copy_triton(pool.blocks, sources, targets)

    def _compute_decode(self, plan: StepPlan) -> Computed:
        """Compute a step of one sampled token a row, padded to a size that has a graph."""
        size = size_for(self._layers.shapes, len(plan.slots))
        assert size is not None  # the largest is max_num_slots, which was checked
        self._rows.pack(plan, len(plan.slots), _decode_shape(size))
        kind = self._sampler.kind_of(plan.sample_slots)
        if size in self._layers:
            computed = self._layers.replay(size)
            self._samplings[kind].replay(size)
        else:
            computed = self._run_decode(size)
            self._sample(computed, kind)
        return computed

    def _compute(self, plan: StepPlan) -> Computed:
        """Compute a step with prompts, padded to a shape that has a graph if it fits into one.

        Padded without graphs too, so that both give the same bits.
        """
        num_decode_rows = count_decode_rows(plan)
        tiles = self._planner.choose(plan, num_decode_rows)
        shape = shape_for(
            self._prompts.shapes, plan.num_tokens, max(len(plan.slots), len(plan.sample_slots))
        )
        if tiles is None or tiles.specialized or shape is None:
            computed = self._launch_prompts(plan, num_decode_rows, tiles)
        else:
            rows, tiles = self._padded(shape)
            entries = self._planner.cut(plan, num_decode_rows, tiles)
            self._rows.pack(plan, num_decode_rows, rows, entries)
            if shape in self._prompts:
                computed = self._prompts.replay(shape)
            else:
                computed = self._run_prompts(shape)
            computed = Computed(*(tensor[: len(plan.sample_slots)] for tensor in computed))
        self._sample(computed, self._sampler.kind_of(plan.sample_slots))
        return computed

    def _launch_prompts(
        self, plan: StepPlan, num_decode_rows: int, tiles: PrefillTiles | None
    ) -> Computed:
        """Launch the layers of a step as it is, but for samples.

        These are padded to sizes that the head's product has had before: cuBLAS loads a kernel when
        it first takes it, and the launch would wait for the device.
        """
        sizes, num_samples = self._layers.shapes, len(plan.sample_slots)
        entries = NO_TILES if tiles is None else self._planner.cut(plan, num_decode_rows, tiles)
        padded = size_for(sizes, num_samples) if num_samples else None
        rows = RowShape(len(plan.slots), plan.num_tokens, padded or num_samples, len(entries))
        self._rows.pack(plan, num_decode_rows, rows, entries)
        computed = self._run(
            rows,
            tiles,
            num_decode_rows=num_decode_rows,
            decode_size=size_for(sizes, num_decode_rows) or num_decode_rows,
            first_prompt=num_decode_rows,
        )
        return Computed(*(tensor[:num_samples] for tensor in computed))

    def _layers_of(self, size: int) -> Callable[[], Computed]:
        """Return the launch of a decode step's layers, from what is packed by then."""
        self._rows.pad(_decode_shape(size))
        return lambda: self._run_decode(size)

    def _run_decode(self, size: int) -> Computed:
        return self._run(_decode_shape(size), None, num_decode_rows=size, decode_size=size)

    def _sampling_of(self, kind: SamplingKind, size: int) -> Callable[[], None]:
        """Return the launch of the sampling behind the layers of that size."""
        self._rows.pad(_decode_shape(size))
        return lambda: self._sample(self._layers.result(size), kind)

    def _prompts_of(self, shape: PromptShape) -> Callable[[], Computed]:
        """Return the launch of the layers of a step with prompts, from what is packed by then."""
        self._rows.pad(self._padded(shape)[0])
        return lambda: self._run_prompts(shape)

    def _run_prompts(self, shape: PromptShape) -> Computed:
        rows, tiles = self._padded(shape)
        # Which rows decode is not known: each of them may.
        return self._run(
            rows,
            tiles,
            num_decode_rows=shape.num_rows,
            decode_size=PROMPT_DECODE_SIZE,
            first_prompt=0,
        )

    def _padded(self, shape: PromptShape) -> tuple[RowShape, PrefillTiles]:
        num_tokens, num_rows = shape
        tiles = self._planner.tiles_for(num_tokens)
        num_tiles = most_tiles(num_tokens, num_rows, tiles)
        return RowShape(num_rows, num_tokens, num_rows, num_tiles), tiles

    def _sample(self, computed: Computed, kind: SamplingKind) -> None:
        """Choose the tokens, and keep them for the steps to come."""
        samples = self._sampler.sample(*computed, kind)
        keep_samples_triton(self._last_samples, computed.sample_slots, samples.token_ids)

    def _run(
        self,
        shape: RowShape,
        tiles: PrefillTiles | None,
        *,
        num_decode_rows: int,
        decode_size: int,
        first_prompt: int | None = None,
    ) -> Computed:
        """Launch the layers of what is packed in that shape; see `GpuBatch`.

        first_prompt: None where no row has a prompt, and every token is sampled in order.
        """
        arrays = self._rows.arrays(shape)
        row_tables = self._row_tables[: shape.num_rows]
        token_ids = self._token_ids[: shape.num_tokens]
        resolve_rows_triton(
            self._tables,
            self._last_samples,
            arrays.row_slots,
            arrays.lengths,
            arrays.token_rows,
            arrays.given,
            self._block_tokens,
            row_tables,
            token_ids,
        )
        batch = GpuBatch(
            token_ids=token_ids,
            positions=arrays.positions,
            prompt_rows=arrays.prompt_rows,
            row_tables=row_tables,
            lengths=arrays.lengths,
            offsets=arrays.offsets,
            decode_lengths=arrays.decode_lengths[:num_decode_rows],
            decode_size=decode_size,
            first_prompt=first_prompt or 0,
            prefill=None if tiles is None else TileTable(tiles, arrays.tiles.view(-1, 2)),
            sample_positions=None if first_prompt is None else arrays.sample_positions,
        )
        assert self._resources is not None  # a closed runner launches nothing
        logits = self._model.forward(GpuStepKernels(self._resources, batch))
        return Computed(logits, arrays.sample_slots, arrays.sample_indices)


def _decode_shape(size: int) -> RowShape:
    return RowShape(size, size, size)


def _only_decodes(plan: StepPlan) -> bool:
    """Whether every row has one token and its slot samples behind it."""
    num_rows = len(plan.slots)
    return (
        plan.num_tokens == num_rows == len(plan.sample_slots)
        and np.array_equal(plan.sample_slots, plan.slots)
        and np.array_equal(plan.sample_positions, np.arange(num_rows))
    )
