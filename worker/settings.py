"""Settings that both kinds of worker share."""

from pydantic import Field

from paceline.engine.settings import EngineSettings


class WorkerSettings(EngineSettings):
    """One pool of workers."""

    replicas: int = Field(default=1, ge=0, description="Workers in the pool when it starts.")
    resources: dict[str, float] = Field(
        default_factory=dict,
        description="Ray resources that one worker reserves, such as {CPU: 1}; none by default, "
        "so that a small machine can hold every process. Workers on GPUs reserve {GPU: 1} unless "
        "GPU is given.",
    )
    progress_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="A worker with work that has finished no step for ten times as long as its "
        "longest step, and for 2.5 s, has stalled: its work goes elsewhere. This many seconds "
        "count for steps larger than any before, and bound that limit.",
    )
