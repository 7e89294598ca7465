"""Load a model and its pool: everything a worker's engine thread needs to run steps."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from paceline.engine.cpu.model_runner import CpuModelRunner
from paceline.engine.cpu.sampler import Sampler
from paceline.engine.kv_pool import (
    TORCH_DTYPES,
    KvPool,
    available_memory_bytes,
    num_blocks_that_fit,
)
from paceline.engine.model_config import ModelConfig, read_model_config
from paceline.engine.model_source import ModelFolder
from paceline.engine.models.llama import LlamaModel
from paceline.engine.parallel import ParallelContext
from paceline.engine.settings import ModelSettings
from paceline.engine.weights import dummy_weights, load_weights
from paceline.errors import ConfigError
from paceline.kv_layout import KvLayout, attention_layout

OnStep = Callable[[str, float], None]
"""Called with (what is being done, share of it that is done); 1.0 ends each."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedEngine:
    """A model ready to run."""

    config: ModelConfig
    runner: CpuModelRunner
    pool: KvPool
    model_revision: str
    max_model_len: int
    """Tokens of prompt and output together."""

    @property
    def layout(self) -> KvLayout:
        return self.pool.layout

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks


def load_engine(
    model: ModelSettings,
    folder: ModelFolder,
    *,
    block_tokens: int,
    num_kv_blocks: int | None,
    kv_cache_bytes: int,
    max_num_seqs: int,
    num_threads: int | None,
    allocate: Callable[[int], torch.Tensor],
    on_step: OnStep,
    parallel: ParallelContext = ParallelContext(),  # noqa: B008 (frozen)
) -> LoadedEngine:
    """Load weights, then allocate the pool.

    `allocate` returns that many bytes of zeroed memory, uint8 [num_bytes]; it stays the caller's.
    Sets the number of torch's threads in this process (None leaves it). Raises ConfigError and
    CapacityError.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    config = read_model_config(folder.path)
    dtype = _dtype(model, config)
    max_model_len = _max_model_len(model, config, folder.path)
    layout = attention_layout(
        num_layers=config.num_layers,
        num_kv_heads=parallel.share(config.num_kv_heads, "key-value heads"),
        head_dim=config.head_dim,
        block_tokens=block_tokens,
        dtype=dtype,
    )

    def on_bytes(done: int, total: int) -> None:
        on_step("Loading weights", done / total)

    if model.load_format == "dummy":
        weights = dummy_weights(config, TORCH_DTYPES[dtype], parallel, on_bytes)
    else:
        weights = load_weights(folder.path, config, TORCH_DTYPES[dtype], parallel, on_bytes)
    on_step("Allocating the KV pool", 0.0)
    num_blocks = num_blocks_that_fit(
        layout,
        num_kv_blocks=num_kv_blocks,
        kv_cache_bytes=kv_cache_bytes,
        available_bytes=available_memory_bytes(),
    )
    memory = allocate(num_blocks * layout.block_bytes)
    pool = KvPool(layout, memory.view(num_blocks, layout.block_bytes))
    runner = CpuModelRunner(
        config,
        LlamaModel(config, weights, parallel),
        Sampler(max_num_seqs, config.vocab_size, config.eos_token_ids, "cpu"),
        pool,
        max_num_slots=max_num_seqs,
        max_model_len=max_model_len,
    )
    on_step("Allocating the KV pool", 1.0)
    return LoadedEngine(config, runner, pool, f"{folder.revision}-{dtype}", max_model_len)


def _dtype(model: ModelSettings, config: ModelConfig) -> str:
    if model.dtype != "auto":
        return model.dtype
    if config.dtype == "float16":
        raise ConfigError(
            "The model's own dtype is float16, and CPUs compute it slowly and with overflows. "
            "Set model.dtype to float32 or bfloat16."
        )
    return config.dtype


def _max_model_len(model: ModelSettings, config: ModelConfig, folder: Path) -> int:
    limit = config.max_position_embeddings
    if model.max_model_len is not None and model.max_model_len > limit:
        raise ConfigError(
            f"model.max_model_len is {model.max_model_len}, and the model in {folder} was made for "
            f"{limit} positions (max_position_embeddings). Set max_model_len to at most {limit}."
        )
    return model.max_model_len or limit
