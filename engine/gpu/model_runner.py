"""Run planned steps on a GPU, launched ahead: nothing in a step waits for the device.

    launch(n + 1)   CPU  | pack, copy, replay |            result(n): wait, read pinned memory
                    GPU  ...step n............|prepare|layers|sample|copy to pinned|event

What sequences keep from step to step lives on the device by slot: block tables, the last sampled
token, sampling parameters. Sampling behind a decode step replays a CUDA graph of the kind that its
slots need, as the layers do; behind the others it is launched kernel by kernel.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from paceline.engine.gpu.device_clock import DeviceClock
from paceline.engine.gpu.graphs import PROMPT_TOKENS, StepGraphs
from paceline.engine.gpu.sampler import SAMPLING_KINDS, GpuSampler, SamplingKind
from paceline.engine.gpu.step_inputs import ChangeUpload, PinnedRing
from paceline.engine.gpu.step_layers import Computed, SlotState, StepLayers
from paceline.engine.kv_pool import KvPool
from paceline.engine.model_config import ModelConfig
from paceline.engine.step_kernels import StepModel
from paceline.engine.step_plan import EMPTY, FinishedStep, StepHandle, StepPlan, StepResult
from paceline.kernels.block_copy_triton import block_copy_triton
from paceline.kernels.step_inputs_triton import keep_samples_triton, set_table_entries_triton


class LaunchedStep(NamedTuple):
    """A step on its way. Implements `StepHandle`."""

    event: torch.cuda.Event | None
    clock: DeviceClock
    finish: Callable[[float], StepResult]
    """Given when it ended"""

    def done(self) -> bool:
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def result(self) -> StepResult:
        return self.finish(time.monotonic() if self.event is None else self.clock.wait(self.event))


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

        max_padded_tokens: a step with prompts of more tokens is launched kernel by kernel.
        """
        device = pool.blocks.device
        self.max_num_slots = max_num_slots
        self._config = config
        self._model = model
        self._sampler = sampler
        self._pool: KvPool | None = pool
        self._device = device
        self._max_num_tokens = max(max_num_tokens, max_num_slots)
        self._max_model_len = max_model_len
        num_columns = -(-max_model_len // pool.layout.block_tokens)
        self._slots = SlotState(
            torch.zeros((max_num_slots, num_columns), dtype=torch.int32, device=device),
            torch.zeros(max_num_slots, dtype=torch.int32, device=device),
        )
        self._layers = StepLayers(
            config,
            model,
            self._slots,
            pool,
            num_heads=num_heads,
            max_num_tokens=self._max_num_tokens,
            max_num_samples=sampler.max_num_samples,
            max_model_len=max_model_len,
            max_padded_tokens=max_padded_tokens,
        )
        self._samplings: dict[SamplingKind, StepGraphs[int, None]] = {
            kind: StepGraphs(self._layers.decode_sizes, device) for kind in SAMPLING_KINDS
        }
        self._changes = ChangeUpload(device)
        self._clock = DeviceClock()
        self._results = PinnedRing(sampler.num_result_words, device)

    def graph_rows(self, *, decodes: bool) -> list[int]:
        """Return the rows of logits that each captured graph of layers keeps."""
        return self._layers.graph_rows(decodes=decodes)

    def num_graphs(self, *, decodes: bool) -> int:
        """Say how many `capture_graphs` captures."""
        num_samplings = len(self._samplings) * len(self._layers.decode_sizes) if decodes else 0
        return len(self.graph_rows(decodes=decodes)) + num_samplings

    def capture_graphs(
        self, on_captured: Callable[[], None] = lambda: None, *, decodes: bool = True
    ) -> None:
        """Capture steps with prompts, and decode steps; from then on they are replayed.

        Called before the first step. Raises what the device raises, its lack of memory for one.
        """
        with torch.inference_mode():
            self._layers.capture(on_captured, decodes=decodes)
            if decodes:
                for kind, graphs in self._samplings.items():
                    graphs.capture(partial(self._sampling_of, kind), on_captured)

    def launch_padded(self) -> None:
        """Launch the layers of every shape that can be captured, of rows that do nothing."""
        with torch.inference_mode():
            self._layers.launch_padded()

    def launch_largest_prompts(self) -> None:
        """Launch the layers of the largest step with prompts that can be captured, if any can."""
        with torch.inference_mode():
            self._layers.launch_largest_prompts()

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
        for graphs in self._samplings.values():
            graphs.close()
        self._layers.close()
        self._pool = None

    def _launch(self, plan: StepPlan) -> LaunchedStep:
        pool = self._pool
        if pool is None:
            raise RuntimeError(f"step {plan.step_id} was launched after the runner was closed")
        self._check(plan)
        self._apply_changes(plan, pool)
        if not len(plan.slots):
            return self._launched(lambda ended_s: StepResult(plan.step_id, EMPTY, {}, ended_s))
        return self._read_back(plan, self._compute(plan))

    def _read_back(self, plan: StepPlan, computed: Computed) -> LaunchedStep:
        """Copy what the step sampled to pinned memory, behind it."""
        sampler, slots = self._sampler, plan.sample_slots
        with_logprobs = sampler.wants_logprobs(slots)
        if with_logprobs:
            sampler.logprobs(computed.logits, computed.sample_slots)
        words = sampler.result_words(with_logprobs=with_logprobs)
        pinned = self._results.next()[: words.shape[0]]
        pinned.copy_(words, non_blocking=True)

        def finish(ended_s: float) -> StepResult:
            samples = sampler.results(pinned, slots, with_logprobs=with_logprobs)
            return StepResult(
                plan.step_id, samples.token_ids, samples.logprobs, ended_s, samples.failures
            )

        return self._launched(finish)

    def _launched(self, finish: Callable[[float], StepResult]) -> LaunchedStep:
        event = self._clock.record() if self._device.type == "cuda" else None
        return LaunchedStep(event, self._clock, finish)

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
        places = (
            plan.table_slots.astype(np.int64) * self._slots.tables.shape[1] + plan.table_columns
        )
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
        set_table_entries_triton(self._slots.tables, *tables)
        if len(plan.copy_sources):
            block_copy_triton(pool.blocks, sources, targets)

    def _compute(self, plan: StepPlan) -> Computed:
        kind = self._sampler.kind_of(plan.sample_slots)
        if _only_decodes(plan):
            computed, graph = self._layers.compute_decodes(plan)
            if graph is not None:
                self._samplings[kind].replay(graph)
                return computed
        else:
            computed = self._layers.compute(plan)
        self._sample(computed, kind)
        return computed

    def _sampling_of(self, kind: SamplingKind, size: int) -> Callable[[], None]:
        """Return the launch of the sampling behind the layers of that size."""
        self._layers.pad_decodes(size)
        return lambda: self._sample(self._layers.captured_decodes(size), kind)

    def _sample(self, computed: Computed, kind: SamplingKind) -> None:
        """Choose the tokens, and keep them for the steps to come."""
        samples = self._sampler.sample(*computed, kind)
        keep_samples_triton(self._slots.last_samples, computed.sample_slots, samples.token_ids)


def _only_decodes(plan: StepPlan) -> bool:
    """Whether every row has one token and its slot samples behind it."""
    num_rows = len(plan.slots)
    return (
        plan.num_tokens == num_rows == len(plan.sample_slots)
        and np.array_equal(plan.sample_slots, plan.slots)
        and np.array_equal(plan.sample_positions, np.arange(num_rows))
    )
