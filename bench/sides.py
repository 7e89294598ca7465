"""Engines that `bench.compare` compares, each made to generate for a list of prompts at once.

Every side is greedy, ignores ends of sequences, has random weights of the same shape, and runs in a
process of its own. What a side does not let be set stays at its own default.
"""

import importlib
import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from paceline.bench.record import RequestRecord

TIMEOUT_S = 1800.0
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

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[RequestRecord]:
        """Generate for all prompts at once; moments of a record are of any one clock."""


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

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[RequestRecord]:
        from paceline.sampling_params import SamplingParams

        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, seed=0)
        return [found.record for found in self._engine.generate(prompts, sampling, TIMEOUT_S)]


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

    def describe(self) -> dict[str, Any]:
        import transformers

        return {
            "version": transformers.__version__,
            "attention": self._model.config._attn_implementation,
        }

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[RequestRecord]:
        import transformers

        make_config: Any = transformers.GenerationConfig
        found = self._model.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=make_config(
                max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1
            ),
            continuous_batching_config=self._batching,
            record_timestamps=True,
            persistent_manager=True,
        )
        return [
            RequestRecord(
                request_id=output.request_id,
                prompt_tokens=len(output.prompt_ids),
                max_tokens=num_tokens,
                scheduled_s=output.created_time,
                sent_s=output.created_time,
                token_times_s=list(output.timestamps),
                ended_s=output.timestamps[-1] if output.timestamps else 0.0,
                error=output.error or "",
            )
            for output in found.values()
        ]


class Vllm:
    """vLLM in this process, stepped by hand so that each token's time is known."""

    def __init__(self, options: SideOptions) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
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
        return {"version": self._vllm.__version__}

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[RequestRecord]:
        engine = self._llm.llm_engine
        sampling = self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=num_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )
        sent = time.time()
        records: dict[str, RequestRecord] = {}
        for prompt in prompts:
            name = str(next(self._numbers))
            records[name] = RequestRecord(name, len(prompt), num_tokens, sent, sent)
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, sampling)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.time()
            for output in outputs:
                record = records[output.request_id]
                record.token_times_s += [now] * len(output.outputs[0].token_ids)
                record.ended_s = now
        return list(records.values())


SIDES: dict[str, Callable[[SideOptions], Side]] = {
    "paceline": Paceline,
    "transformers": Transformers,
    "vllm": Vllm,
}
