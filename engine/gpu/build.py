"""Put a runner on a GPU: measure a step's memory, size the KV pool from it, capture graphs.

Everything that a step may compile is compiled here, so that no request waits for it.
"""

import dataclasses
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch

from paceline.engine.gpu.graphs import PROMPT_TOKENS, TOKENS_STEP, graph_sizes
from paceline.engine.gpu.memory import MemoryPlan
from paceline.engine.gpu.model_runner import GpuModelRunner
from paceline.engine.gpu.prefill_plan import LONGEST_CHUNKS
from paceline.engine.gpu.sampler import GpuSampler
from paceline.engine.kv_pool import TORCH_DTYPES, KvPool
from paceline.engine.model_config import ModelConfig
from paceline.engine.settings import EngineSettings
from paceline.engine.step_kernels import StepModel
from paceline.engine.step_plan import SlotStart, StepPlan
from paceline.kernels.launch import compile_ahead
from paceline.kv_layout import KvLayout
from paceline.sampling_params import SamplingParams

OTHER_CHUNKS = (24, 100, 400)
"""Lengths for which kernels other than attention choose tiles of their own."""
GRAPH_BYTES = 32 << 20
"""Of the graphs of each size beside their tensors: the launches of a few hundred kernels."""

Timed = Callable[[str], AbstractContextManager[None]]
"""Enter around a step of the start-up checklist."""
OnProgress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, eq=False)
class GpuBuild:
    """What a runner is built from."""

    config: ModelConfig
    model: StepModel
    short_model: StepModel
    """Its first two layers, of which only the last is computed for samples alone"""
    num_heads: int
    """Of this rank"""
    layout: KvLayout
    settings: EngineSettings
    max_model_len: int
    device: torch.device

    def make_sampler(self) -> GpuSampler:
        """Allocate the sampler."""
        return GpuSampler(
            self.settings.max_num_seqs,
            self.settings.max_num_seqs,
            self.config.vocab_size,
            TORCH_DTYPES[self.layout.groups[0].planes[0].dtype],
            self.config.eos_token_ids,
            self.device,
        )

    def make_runner(
        self, sampler: GpuSampler, num_blocks: int, *, pads_prompts: bool = True
    ) -> tuple[GpuModelRunner, KvPool]:
        """Allocate a pool and a runner on it; without `pads_prompts`, no step takes a shape."""
        blocks = torch.zeros(
            (num_blocks, self.layout.block_bytes), dtype=torch.uint8, device=self.device
        )
        pool = KvPool(self.layout, blocks)
        runner = GpuModelRunner(
            self.config,
            self.model,
            sampler,
            pool,
            num_heads=self.num_heads,
            max_num_slots=self.settings.max_num_seqs,
            max_num_tokens=self.settings.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            max_padded_tokens=PROMPT_TOKENS[-1] if pads_prompts else 0,
        )
        return runner, pool


def build_runner(
    build: GpuBuild, *, captures: bool, decodes: bool, timed: Timed, on_progress: OnProgress
) -> tuple[GpuModelRunner, KvPool, MemoryPlan]:
    """Build the runner; with `captures` steps become graphs, with `decodes` those of decode, too.

    Raises CapacityError when the pool does not fit.
    """
    settings = build.settings
    weights = _allocated(build.device)
    with timed("compile kernels"):
        sampler = build.make_sampler()
        runner, pool = build.make_runner(sampler, num_blocks=2)
        state = _allocated(build.device) - weights
        compile_ahead(lambda: _run_every_kernel(runner, sampler, build))
    with timed("measure a step"):
        activations = _peak(build.device, lambda: _run_prefills(runner, build))
        decode = _peak(build.device, lambda: _run(runner, [1] * settings.max_num_seqs))
        graphs = _graph_bytes(runner, build, decode, decodes=decodes) if captures else 0
        runner.close()
        del runner, pool
        _run_every_size(build, sampler)
        activations = max(activations, decode)
        # The runner is made anew, so that what it freed just now is not free.
        again = state - sampler.num_bytes
        plan = _plan(build.device, weights, state, activations, graphs, again)
    num_blocks = plan.pool_blocks(
        build.layout,
        num_kv_blocks=settings.num_kv_blocks,
        kv_cache_bytes=settings.kv_cache_bytes,
        gpu_memory_utilization=settings.gpu_memory_utilization,
    )
    pool_gib = num_blocks * build.layout.block_bytes / (1 << 30)
    with timed(f"allocate the KV pool ({num_blocks:,} blocks, {pool_gib:.1f} GiB)"):
        runner, pool = build.make_runner(sampler, num_blocks)
    if captures:
        num_graphs = runner.num_graphs(decodes=decodes)
        with timed(f"capture {num_graphs} CUDA graphs"):
            numbers = itertools.count(1)
            runner.capture_graphs(
                lambda: on_progress("Capturing CUDA graphs", next(numbers) / num_graphs),
                decodes=decodes,
            )
    return runner, pool, plan


def _graph_bytes(runner: GpuModelRunner, build: GpuBuild, decode: int, *, decodes: bool) -> int:
    """Estimate what captured steps keep; `decode`: what the largest decode step takes at most."""
    prompts = _peak(build.device, runner.launch_largest_prompts)
    rows = runner.graph_rows(decodes=decodes)
    dtype_bytes = TORCH_DTYPES[build.layout.groups[0].planes[0].dtype].itemsize
    logits = sum(rows) * build.config.vocab_size * dtype_bytes  # each graph keeps its own
    activations = prompts + decode if decodes else prompts
    return activations + logits + len(rows) * GRAPH_BYTES


def _plan(
    device: torch.device, weights: int, state: int, activations: int, graphs: int, again: int
) -> MemoryPlan:
    if device.type != "cuda":
        return MemoryPlan(1 << 40, 1 << 40, weights, state, activations, graphs)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return MemoryPlan(total, free - again, weights, state, activations, graphs)


def _run_every_kernel(runner: GpuModelRunner, sampler: GpuSampler, build: GpuBuild) -> None:
    sampler.compile_kernels()
    runner.launch_padded()
    _run_prefills(runner, build)


def _run_prefills(runner: GpuModelRunner, build: GpuBuild) -> None:
    """Run a step of each kind of tile, then the one of most tokens and samples."""
    max_tokens = build.settings.max_num_batched_tokens
    for longest in (*LONGEST_CHUNKS, *OTHER_CHUNKS):
        count = min(longest, max_tokens, build.max_model_len)
        _run(runner, [count])
    # Behind the longest prefix, which chooses tiles too.
    count = min(max_tokens, build.max_model_len)
    _run(runner, [count], start=build.max_model_len - count)
    num_rows = min(build.settings.max_num_seqs, max_tokens)
    _run(runner, [min(max_tokens // num_rows, build.max_model_len)] * num_rows)


def _run_every_size(build: GpuBuild, sampler: GpuSampler) -> None:
    """Run all sizes that products of a step without a graph are padded to, samples included.

    cuBLAS loads its kernels by that, of which requests would wait for some.
    """
    short = dataclasses.replace(build, model=build.short_model)
    # Prompts of few tokens have no graph either where their tiles are specialized.
    runner, _ = short.make_runner(sampler, num_blocks=2, pads_prompts=False)
    most, longest = build.settings.max_num_batched_tokens, build.max_model_len
    for num_tokens in (*range(TOKENS_STEP, most, TOKENS_STEP), most):
        whole, rest = divmod(num_tokens, longest)
        counts = [longest] * whole + [rest] * (rest > 0)
        _run(runner, counts[: build.settings.max_num_seqs])
    for size in graph_sizes(build.settings.max_num_seqs):
        _run(runner, [1] * size)
    runner.close()


def _run(runner: GpuModelRunner, counts: list[int], start: int = 0) -> None:
    """Run a step of rows with so many new tokens, and every change; all tables name block 0."""
    num_rows = len(counts)
    slots = np.arange(num_rows, dtype=np.int32)
    num_new = np.array(counts, dtype=np.int32)
    tokens = np.zeros(int(num_new.sum()), dtype=np.int32)
    # At random, so that every part of the sampler runs.
    sampling = SamplingParams(temperature=1.0, top_k=5, top_p=0.9, seed=0, presence_penalty=0.5)
    empty = np.empty(0, np.int32)
    plan = StepPlan(
        step_id=0,
        slots=slots,
        starts=np.full(num_rows, start, dtype=np.int32),
        num_new_tokens=num_new,
        from_last_sample=np.zeros(num_rows, dtype=np.bool_),
        tokens=tokens,
        sample_positions=(np.cumsum(num_new) - 1).astype(np.int32),
        sample_slots=slots,
        sample_indices=np.zeros(num_rows, dtype=np.int32),
        slot_starts=[SlotStart(slot, sampling, 0, empty, empty) for slot in range(num_rows)],
        table_slots=slots[:1],
        table_columns=slots[:1],
        table_blocks=slots[:1],
        copy_sources=slots[:1],
        copy_targets=slots[:1] + 1,
    )
    runner.launch(plan).result()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak(device: torch.device, run: Callable[[], None]) -> int:
    """Bytes that a call took at most, beyond what was allocated before it."""
    before = _allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
