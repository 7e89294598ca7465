"""Engines that `bench.compare` compares, each made to generate for requests with times of arrival.

Every side is greedy, ignores ends of sequences, has random weights of the same shape, and runs in a
process of its own. What a side does not let be set stays at its own default.
"""

import importlib
import importlib.util
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from paceline.bench.load import PlannedRequest
from paceline.bench.record import RequestRecord

TIMEOUT_S = 1800.0
RESULT_TIMEOUT_S = 1.0
"""How often to look whether transformers still runs."""
BLOCK_TOKENS = 16
TRANSFORMERS_BLOCK_TOKENS = 256
"""Its default."""


@dataclass(frozen=True, slots=True)
class SideOptions:
    """What every side is made for."""

    folder: Path
    """Has config.json"""
    device: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    num_kv_blocks: int | None
    """Of BLOCK_TOKENS each; None: what the memory holds"""


class Side(Protocol):
    """An engine that has been loaded."""

    def describe(self) -> dict[str, Any]:
        """Say what a reader of the result wants to know beside the environment."""

    def generate(self, planned: Sequence[PlannedRequest]) -> list[RequestRecord]:
        """Generate for requests in the order of their arrival, each sent when it is due.

        Records are in the same order. Their moments are of any one clock, a token's when it was
        known on the CPU.
        """


class Paceline:
    """This engine, colocated, without router or gRPC."""

    def __init__(self, options: SideOptions) -> None:
        from paceline.bench.offline import OfflineEngine
        from paceline.bench.startup import StartUp
        from paceline.decode_worker.settings import DecodeSettings
        from paceline.engine.settings import ModelSettings

        settings = DecodeSettings.model_validate(
            {
                "device": options.device,
                "num_kv_blocks": options.num_kv_blocks,
                "gpu_memory_utilization": options.gpu_memory_utilization,
                "max_num_seqs": options.max_num_seqs,
                "max_num_batched_tokens": options.max_num_batched_tokens,
                "local_prefill_tokens": "unlimited",
            }
        )
        model = ModelSettings.model_validate(
            {
                "path": str(options.folder),
                "load_format": "dummy",
                "dtype": options.dtype,
                "max_model_len": options.max_model_len,
            }
        )
        self._start_up = StartUp(options.device)
        self._engine = OfflineEngine(self._start_up.load(model, settings, BLOCK_TOKENS), settings)

    def describe(self) -> dict[str, Any]:
        return {"start_up": self._start_up.steps}

    def generate(self, planned: Sequence[PlannedRequest]) -> list[RequestRecord]:
        from paceline.sampling_params import SamplingParams

        sampling = SamplingParams(temperature=0.0, ignore_eos=True, seed=0)
        return [found.record for found in self._engine.generate(planned, sampling, TIMEOUT_S)]


class Transformers:
    """Continuous batching of transformers, in its own choice of attention."""

    def __init__(self, options: SideOptions) -> None:
        import transformers

        config = transformers.AutoConfig.from_pretrained(options.folder)
        make_model: Any = transformers.AutoModelForCausalLM.from_config
        with torch.device(options.device):
            model = make_model(
                config, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
            )
        self._model = model.eval()
        self._batching = transformers.ContinuousBatchingConfig(allow_block_sharing=False)
        if options.num_kv_blocks is not None:  # else both sizes follow from the GPU's memory
            num_tokens = options.num_kv_blocks * BLOCK_TOKENS
            self._batching.num_blocks = -(-num_tokens // TRANSFORMERS_BLOCK_TOKENS)
            self._batching.max_batch_tokens = options.max_num_batched_tokens
        # `generate_batch` hints so too, but cannot send a request later, or one of another length.
        hints: Any = importlib.import_module("transformers.generation.continuous_batching.utils")
        self._hints = hints.WorkloadHints(
            max_prompt_length=options.max_model_len, num_requests=options.max_num_seqs
        )
        self._numbers = itertools.count()

    def describe(self) -> dict[str, Any]:
        import transformers

        return {
            "version": transformers.__version__,
            "attention": self._model.config._attn_implementation,
        }

    def generate(self, planned: Sequence[PlannedRequest]) -> list[RequestRecord]:
        import transformers

        make_config: Any = transformers.GenerationConfig
        names = [str(next(self._numbers)) for _ in planned]
        with self._model.continuous_batching_context_manager(
            generation_config=make_config(do_sample=False, eos_token_id=-1),
            continuous_batching_config=self._batching,
            persistent_manager=True,
            workload_hints=self._hints,
        ) as manager:
            start_s = time.perf_counter()  # its clock
            records = {
                name: RequestRecord.due(request, name, start_s)
                for name, request in zip(names, planned, strict=True)
            }
            for request, record in zip(planned, records.values(), strict=True):
                time.sleep(max(record.scheduled_s - time.perf_counter(), 0.0))
                manager.add_request(
                    list(request.prompt),
                    record.request_id,
                    max_new_tokens=request.max_tokens,
                    record_timestamps=True,
                    eos_token_id=-1,
                )
            num_open = len(planned)
            while num_open:
                output = manager.get_result(timeout=RESULT_TIMEOUT_S)
                if output is None and not manager.is_running():
                    break  # what is missing is an error of the records
                if output is None or not output.is_finished():
                    continue
                num_open -= 1
                record = records[output.request_id]
                record.token_times_s = list(output.timestamps)
                record.ended_s = record.token_times_s[-1] if record.token_times_s else start_s
                record.error = output.error or ""
        return list(records.values())


class Vllm:
    """vLLM in this process, stepped by hand so that each token's time is known."""

    def __init__(self, options: SideOptions) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        if importlib.util.find_spec("flashinfer") is None:  # it is for sampling at random only
            os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        self._vllm: Any = importlib.import_module("vllm")
        self._llm = self._vllm.LLM(
            model=str(options.folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=options.dtype,
            enable_prefix_caching=False,
            block_size=BLOCK_TOKENS,
            num_gpu_blocks_override=options.num_kv_blocks,
            max_model_len=options.max_model_len,
            gpu_memory_utilization=options.gpu_memory_utilization,
            seed=0,
        )
        self._numbers = itertools.count()

    def describe(self) -> dict[str, Any]:
        config = self._llm.llm_engine.vllm_config
        return {
            "version": self._vllm.__version__,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "async_scheduling": config.scheduler_config.async_scheduling,
            "num_kv_blocks": config.cache_config.num_gpu_blocks,
        }

    def generate(self, planned: Sequence[PlannedRequest]) -> list[RequestRecord]:
        engine = self._llm.llm_engine
        arguments = [
            ({"prompt_token_ids": list(request.prompt)}, self._sampling(request.max_tokens))
            for request in planned
        ]
        names = [str(next(self._numbers)) for _ in planned]
        start_s = time.time()
        records = {
            name: RequestRecord.due(request, name, start_s)
            for name, request in zip(names, planned, strict=True)
        }
        coming = deque(zip(records.values(), arguments, strict=True))
        while coming or engine.has_unfinished_requests():
            now = time.time()
            while coming and coming[0][0].scheduled_s <= now:
                record, (prompt, sampling) = coming.popleft()
                engine.add_request(record.request_id, prompt, sampling)
            if coming and not engine.has_unfinished_requests():
                time.sleep(max(coming[0][0].scheduled_s - time.time(), 0.0))
                continue
            outputs = engine.step()  # none after the first launch, when a step overlaps the next
            now = time.time()
            for output in outputs:
                record = records[output.request_id]
                record.token_times_s += [now] * len(output.outputs[0].token_ids)
                record.ended_s = now
        return list(records.values())

    def _sampling(self, max_tokens: int) -> Any:
        return self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )


SIDES: dict[str, Callable[[SideOptions], Side]] = {
    "paceline": Paceline,
    "transformers": Transformers,
    "vllm": Vllm,
}
