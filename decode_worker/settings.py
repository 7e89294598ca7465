"""Settings of the decode pool."""

from typing import Literal, Self

from pydantic import Field, model_validator

from paceline.worker.settings import WorkerSettings


class DecodeSettings(WorkerSettings):
    """The workers that stream tokens after the first one."""

    local_prefill_tokens: int | Literal["unlimited"] = Field(
        default=0,
        description="Tokens without cached KV that a decode worker computes itself for a request, "
        "beside its running sequences: 0 leaves all to prefill workers, so that steps stay short; "
        "unlimited makes it a complete server, which prefill.replicas: 0 needs.",
    )
    prefill_age_bound_s: float = Field(
        default=2.0,
        ge=0,
        description="Seconds after which a prompt computed here goes before all younger ones; see "
        "prefill.age_bound_s.",
    )
    watermark_blocks: int = Field(
        default=4,
        ge=0,
        description="KV blocks that admission leaves free while anything runs, beside one for each "
        "running sequence: a preemption costs a whole prefill, a few idle blocks cost little.",
    )
    promise_ttl_s: float = Field(
        default=30.0,
        gt=0,
        description="Seconds without progress of the prefill after which a request's blocks are "
        "taken back: several times what a prompt waits for its first chunk on a busy worker. A "
        "dead prefill worker is noticed much earlier, by its session.",
    )

    @model_validator(mode="after")
    def _leave_room_for_prompts(self) -> Self:
        if isinstance(self.local_prefill_tokens, int) and self.local_prefill_tokens < 0:
            raise ValueError(
                f"decode.local_prefill_tokens is {self.local_prefill_tokens}; it must be 0, a "
                "number of tokens, or unlimited"
            )
        if self.local_prefill_tokens != 0 and self.max_num_batched_tokens <= self.max_num_seqs:
            raise ValueError(
                f"decode.max_num_batched_tokens is {self.max_num_batched_tokens}: "
                f"{self.max_num_seqs} running sequences (decode.max_num_seqs) could fill every "
                "step, and prompts computed here would wait for ever. Raise it above "
                f"{self.max_num_seqs}, or set decode.local_prefill_tokens to 0"
            )
        return self

    @property
    def max_local_prefill_tokens(self) -> int | None:
        """local_prefill_tokens as the scheduler takes it: None is unlimited."""
        return None if self.local_prefill_tokens == "unlimited" else self.local_prefill_tokens
