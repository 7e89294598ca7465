"""Load a model and its pool: everything a worker's engine thread needs to run steps."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from paceline.engine.cpu.model_runner import CpuModelRunner
from paceline.engine.cpu.sampler import Sampler
from paceline.engine.host_memory import host_memory
from paceline.engine.kv_pool import TORCH_DTYPES, KvPool, num_blocks_that_fit
from paceline.engine.model_config import ModelConfig, read_model_config
from paceline.engine.model_facts import choose_dtype, choose_model_len
from paceline.engine.model_source import ModelFolder, check_unchanged
from paceline.engine.models.llama import LlamaModel
from paceline.engine.parallel import ParallelContext
from paceline.engine.settings import EngineSettings, ModelSettings
from paceline.engine.step_plan import ModelRunner
from paceline.engine.weights import dummy_weights, load_weights
from paceline.errors import ConfigError
from paceline.kv_layout import KvLayout, attention_layout

if TYPE_CHECKING:
    from paceline.engine.gpu.memory import MemoryPlan  # late: its package needs Triton

MIN_SHARED_MEMORY_BYTES = 160 << 10
"""What the kernels' tiles take at most; smaller GPUs would need other tiles."""

OnStep = Callable[[str, float], None]
"""Called with (step of the checklist, seconds that it took)."""
OnProgress = Callable[[str, float], None]
"""Called with (what is being done, share of it that is done)."""
OnCpu = Callable[[int], torch.Tensor]
"""Returns that many bytes of zeroed CPU memory, uint8 [num_bytes], which stays the caller's."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedEngine:
    """A model ready to run."""

    config: ModelConfig
    runner: ModelRunner
    pool: KvPool
    model_revision: str
    max_model_len: int
    """Tokens of prompt and output together."""
    overlap: bool
    """Whether a step should be launched while the one before it runs."""
    memory: "MemoryPlan | None" = None
    """Of a GPU."""

    @property
    def layout(self) -> KvLayout:
        return self.pool.layout

    @property
    def num_blocks(self) -> int:
        return self.pool.num_blocks

    @property
    def device(self) -> torch.device:
        return self.pool.blocks.device


def load_engine(
    model: ModelSettings,
    folder: ModelFolder,
    settings: EngineSettings,
    *,
    block_tokens: int,
    allocate: OnCpu,
    on_step: OnStep = lambda name, seconds: None,
    on_progress: OnProgress = lambda name, share: None,
    decodes: bool = True,
    parallel: ParallelContext = ParallelContext(),  # noqa: B008 (frozen)
) -> LoadedEngine:
    """Load weights, then allocate the pool: by `allocate` on a CPU, else on the device.

    decodes: whether decode steps are worth preparing for. Sets the number of torch's threads in
    this process. Raises ConfigError and CapacityError.
    """
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    device = _device(settings)
    config = read_model_config(folder.path)
    dtype = choose_dtype(model, config.dtype, device.type)
    max_model_len = choose_model_len(model, config.max_position_embeddings, folder.path)
    layout = attention_layout(
        num_layers=config.num_layers,
        num_kv_heads=parallel.share(config.num_kv_heads, "key-value heads"),
        head_dim=config.head_dim,
        block_tokens=block_tokens,
        dtype=dtype,
    )
    timed = _Checklist(on_step)
    weights = _load_weights(model, folder, config, dtype, device, parallel, timed, on_progress)
    check_unchanged(folder, model)
    llama = LlamaModel(config, weights, parallel)
    # Random weights are not the same on every kind of device.
    source = f"-{device.type}" if model.load_format == "dummy" and device.type != "cpu" else ""
    # Workers that end at other tokens would continue each other's requests differently.
    ends = ",".join(map(str, sorted(config.eos_token_ids)))
    revision = f"{folder.revision}-{dtype}{source}-{ends}"
    if device.type == "cpu":
        with timed("allocate the KV pool"):
            pool = _cpu_pool(layout, settings, allocate)
            runner: ModelRunner = CpuModelRunner(
                config,
                llama,
                Sampler(settings.max_num_seqs, config.vocab_size, config.eos_token_ids, "cpu"),
                pool,
                max_num_slots=settings.max_num_seqs,
                max_model_len=max_model_len,
            )
        return LoadedEngine(config, runner, pool, revision, max_model_len, overlap=False)
    from paceline.engine.gpu.build import GpuBuild, build_runner

    num_heads = parallel.share(config.num_heads, "attention heads")
    runner, pool, memory = build_runner(
        GpuBuild(
            config, llama, llama.shortened(2), num_heads, layout, settings, max_model_len, device
        ),
        captures=not settings.enforce_eager,
        decodes=decodes,
        timed=timed,
        on_progress=on_progress,
    )
    return LoadedEngine(
        config, runner, pool, revision, max_model_len, settings.async_scheduling, memory
    )


class _Checklist:
    """Times the steps of starting up."""

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._on_step(name, time.monotonic() - started)


def _load_weights(
    model: ModelSettings,
    folder: ModelFolder,
    config: ModelConfig,
    dtype: str,
    device: torch.device,
    parallel: ParallelContext,
    timed: _Checklist,
    on_progress: OnProgress,
) -> dict[str, torch.Tensor]:
    started = time.monotonic()

    def on_bytes(done: int, total: int) -> None:
        rate = done / max(1e-9, time.monotonic() - started) / 1e9
        on_progress(f"Loading weights, {rate:.1f} GB/s", done / total)

    kind = TORCH_DTYPES[dtype]
    with timed("load weights"):
        if model.load_format == "dummy":
            return dummy_weights(config, kind, parallel, on_bytes, device=device)
        return load_weights(folder.path, config, kind, parallel, on_bytes, device=device)


def _cpu_pool(layout: KvLayout, settings: EngineSettings, allocate: OnCpu) -> KvPool:
    num_blocks = num_blocks_that_fit(
        layout,
        num_kv_blocks=settings.num_kv_blocks,
        kv_cache_bytes=settings.cpu_kv_cache_bytes,
        available_bytes=host_memory().available_bytes,
    )
    memory = allocate(num_blocks * layout.block_bytes)
    return KvPool(layout, memory.view(num_blocks, layout.block_bytes))


def _device(settings: EngineSettings) -> torch.device:
    if settings.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        build = torch.version.cuda
        reason = (
            "torch was built without CUDA: install one of its CUDA builds"
            if build is None
            else f"torch {torch.__version__} for CUDA {build} finds no GPU: check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, and that resources reserve one ({GPU: 1})"
        )
        raise ConfigError(f"device is cuda, and {reason}. Or set device to cpu.")
    device = torch.device("cuda", torch.cuda.current_device())
    properties: Any = torch.cuda.get_device_properties(device)  # whose stub lacks the limit
    if properties.shared_memory_per_block_optin < MIN_SHARED_MEMORY_BYTES:
        raise ConfigError(
            f"device is cuda, and the {properties.name} has "
            f"{properties.shared_memory_per_block_optin} bytes of shared memory a block; the "
            f"kernels need {MIN_SHARED_MEMORY_BYTES}, as A100, H100, H200 and B200 have. Use one "
            "of these, or set device to cpu."
        )
    return device
