"""Settings of the model, and of the engine that runs it on one worker."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

DEFAULT_CPU_KV_CACHE_BYTES = 1 << 30


class ModelSettings(BaseModel):
    """The `model` part of the YAML. Names are vLLM's where vLLM has one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(
        min_length=1,
        description="A folder in Hugging Face's form, a .gguf file, or package:NAME for the one "
        ".gguf file inside an installed Python package.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Precision of weights and KV. auto: the folder's own; float32 for GGUF files, "
        "whose quantised values it keeps exactly. float16 needs GPUs.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of prompt and output together. Default: the model's own limit.",
    )
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = Field(
        default="auto",
        description="auto tells by the path. dummy fills random weights of a fixed seed from "
        "config.json alone, for measurements.",
    )
    served_model_name: str | None = Field(
        default=None,
        min_length=1,
        description="Name that clients ask for. Default: the last part of the path, without .gguf.",
    )


class EngineSettings(BaseModel):
    """One worker's engine. Names are vLLM's where vLLM has one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["cpu", "cuda"] = Field(
        default="cpu",
        description="Where the model runs. cuda takes an NVIDIA GPU, or the share of one that "
        "resources reserve ({GPU: 0.5}).",
    )
    num_threads: int | None = Field(
        default=None,
        ge=1,
        description="Threads of torch on CPUs. Default: the machine's cores.",
    )
    num_kv_blocks: int | None = Field(
        default=None,
        ge=2,
        description="KV blocks in a worker's pool. Default: as many as kv_cache_bytes hold.",
    )
    kv_cache_bytes: int | None = Field(
        default=None,
        ge=1,
        description="Bytes of a worker's KV pool when num_kv_blocks is not given. Default: on CPUs "
        "1 GiB, which leaves room for several processes on a small machine; on GPUs what "
        "gpu_memory_utilization leaves.",
    )
    gpu_memory_utilization: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of the GPU's memory for weights, activations and KV together, when "
        "neither num_kv_blocks nor kv_cache_bytes is given. Workers that share a GPU share 0.9.",
    )
    max_num_seqs: int = Field(
        default=64, ge=1, le=4096, description="Sequences that run at once on one worker."
    )
    max_num_batched_tokens: int = Field(
        default=512,
        ge=16,
        description="New tokens a step: a longer prompt is computed in chunks of this many, so "
        "that a step stays short for the requests beside it. GPUs want 2048 or more.",
    )
    enforce_eager: bool = Field(
        default=False,
        description="Launch all steps of GPUs kernel by kernel instead of replaying CUDA graphs: "
        "slower, the same tokens; for finding faults.",
    )
    async_scheduling: bool = Field(
        default=True,
        description="On GPUs, plan and launch a step while the one before it runs. Off: slower, "
        "the same tokens; for finding faults.",
    )

    @property
    def cpu_kv_cache_bytes(self) -> int:
        """Bytes of a pool in CPU memory, when num_kv_blocks is not given."""
        return DEFAULT_CPU_KV_CACHE_BYTES if self.kv_cache_bytes is None else self.kv_cache_bytes
