"""Settings of the prefill pool."""

from pydantic import Field

from paceline.worker.settings import WorkerSettings


class PrefillSettings(WorkerSettings):
    """The workers that compute prompts."""

    age_bound_s: float = Field(
        default=2.0,
        ge=0,
        description="Seconds after which a prompt goes before all younger ones. Until then the "
        "shortest remaining prompt goes first, which keeps the mean time to first token low; 2 s "
        "is what a stream of short prompts may cost a long one. 0 is first come, first served.",
    )
