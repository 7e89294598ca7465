"""Settings that both kinds of worker share."""

from pydantic import BaseModel, ConfigDict, Field


class WorkerSettings(BaseModel):
    """One pool of workers. Names are vLLM's where vLLM has one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: int = Field(default=1, ge=0, description="Workers in the pool when it starts.")
    device: str = Field(
        default="cpu", pattern="^cpu$", description="Where the model runs; this version knows cpu."
    )
    resources: dict[str, float] = Field(
        default_factory=dict,
        description="Ray resources that one worker reserves, such as {CPU: 1}; none by default, "
        "so that a small machine can hold every process.",
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
    kv_cache_bytes: int = Field(
        default=1 << 30,
        ge=1,
        description="Bytes of a worker's KV pool when num_kv_blocks is not given; 1 GiB leaves "
        "room for several processes on a small machine.",
    )
    max_num_seqs: int = Field(
        default=64, ge=1, le=4096, description="Sequences that run at once on one worker."
    )
    max_num_batched_tokens: int = Field(
        default=512,
        ge=16,
        description="New tokens a step: a longer prompt is computed in chunks of this many, so "
        "that a step stays short for the requests beside it.",
    )
    progress_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="A worker with work and no finished step for this long counts as dead.",
    )
