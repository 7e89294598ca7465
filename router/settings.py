"""Settings of the routers."""

from pydantic import BaseModel, ConfigDict, Field


class RouterSettings(BaseModel):
    """Where routers listen, how much may wait, and when they give up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: int = Field(default=1, ge=1, description="Router processes; each has its own queue.")
    host: str = Field(
        default="127.0.0.1",
        description="Address to listen on; the default is not reachable from other machines, "
        "because there is no authentication yet.",
    )
    grpc_port: int = Field(
        default=50051,
        ge=0,
        le=65535,
        description="TCP port of the gRPC API; 0 takes a free one.",
    )
    max_queue_requests: int = Field(
        default=1024,
        ge=1,
        description="Requests that may wait for a worker; a further one is refused with a retry "
        "delay. Resumed requests do not count: they have been accepted already.",
    )
    max_lag_s: float = Field(
        default=1.0,
        gt=0,
        description="A router whose event loop is this many seconds late, as the mean of the last "
        "5 s, refuses new requests with a retry delay: its streams stand still for that long, and "
        "more of them would make it worse. A single pause is far below; more replicas share the "
        "work.",
    )
    default_timeout_s: float = Field(
        default=1800.0,
        gt=0,
        description="Seconds that a request may take when its client names no timeout; it ends "
        "requests whose client hangs without closing its connection.",
    )
    max_timeout_s: float = Field(
        default=86400.0,
        gt=0,
        description="Longest timeout in seconds that a request may ask for: a day.",
    )
    max_worker_deaths: int = Field(
        default=2,
        ge=1,
        description="A request under which this many workers have died in a row without a new "
        "token runs alone from then on, because it may be the cause. Planned stops do not count.",
    )
    max_lone_deaths: int = Field(
        default=3,
        ge=1,
        description="A request under which this many workers have died when it ran alone fails: "
        "one that kills workers must not take the pool with it. Not fewer, so that workers that "
        "are killed every second or two by something else do not fail it.",
    )
    max_internal_failures: int = Field(
        default=2,
        ge=1,
        description="A request that workers have given back this often because of an internal "
        "error, in a row without a new token, fails: the error would most likely return.",
    )
    max_setbacks: int = Field(
        default=8,
        ge=1,
        description="A request that workers have given back this often for other failures, such "
        "as KV that could not be read, in a row without a new token, fails with the last reason. "
        "Enough to get round a broken pair of workers, and an answer within a second when every "
        "pair fails at once.",
    )
    max_refusals: int = Field(
        default=256,
        ge=1,
        description="A request for which workers had no room this often though their credit said "
        "so, in a row without a new token, fails. Credit is a message old and several routers may "
        "be offered the same room, so many are usual under load; this many, two minutes with "
        "max_retry_backoff_s, mean that a worker refuses always.",
    )
    dispatch_ahead_s: float = Field(
        default=0.5,
        gt=0,
        description="Seconds of computing, by its measured rate, that may wait at a prefill worker "
        "when a further prompt is sent to it. The rest waits in the router's queue, holds no "
        "decode blocks and can go to any worker. Longer than a large step, so that the worker is "
        "never idle; an idle worker always takes one.",
    )
    retry_backoff_s: float = Field(
        default=0.005,
        gt=0,
        description="Seconds before work that a worker gave back is sent again; doubled for each "
        "further time without a new token. About a step's time, so that refusals cannot spin.",
    )
    max_retry_backoff_s: float = Field(
        default=0.5,
        gt=0,
        description="Longest of those waits in seconds, so that recovery is felt soon.",
    )
    first_rest_s: float = Field(
        default=0.1,
        gt=0,
        description="Seconds that a worker, or a pair of workers, gets no work after it has given "
        "work back; doubled for each further time in a row. Long beside a step, so that the "
        "others get the work. A first refusal for want of room has no rest.",
    )
    max_rest_s: float = Field(
        default=30.0,
        gt=0,
        description="Longest of those rests in seconds: what has been repaired is tried again "
        "within it. Without any other worker to try, no rest is kept.",
    )
    worker_silence_limit_s: float = Field(
        default=2.5,
        ge=1,
        description="A worker whose stream carries no message for this many seconds counts as "
        "lost, and its work goes elsewhere. Workers send one every half second. The time in which "
        "the router itself stood still does not count; while all workers are silent, and after "
        "silences that ended by themselves, the limit is up to four times as long.",
    )
    connect_timeout_s: float = Field(
        default=5.0, gt=0, description="Seconds for a worker to answer a new stream's Hello."
    )
    max_reconnect_backoff_s: float = Field(
        default=2.0,
        gt=0,
        description="Longest wait in seconds between attempts to reach a worker; the first is "
        "0.05.",
    )
    tokenizer_processes: int = Field(
        default=2,
        ge=2,
        description="Processes that render chat and tokenize text of more than 4 KiB, so that "
        "neither holds up streams. One takes prompts of more than 64 KiB, the others the rest.",
    )
    tokenizer_timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="Seconds that rendering and tokenizing one prompt may take; then its process "
        "is ended and another one started. Several times what a text of 1 MiB takes.",
    )
    max_text_bytes: int | None = Field(
        default=None,
        ge=1,
        description="Bytes of a prompt's text at most; null: as many as would fit into "
        "model.max_model_len if each token were the longest of the vocabulary.",
    )
    max_request_bytes: int | None = Field(
        default=None,
        ge=1024,
        description="Bytes of one gRPC request at most; null: 1 MiB, or 8 bytes for each token of "
        "model.max_model_len if that is more. Reading 1 MiB takes the event loop up to 35 ms.",
    )
    client_read_timeout_s: float = Field(
        default=60.0,
        gt=0,
        description="Seconds that a client may leave its output unread, once some 64 KiB of it "
        "wait; then its request is ended, so that it holds no worker.",
    )
    drain_timeout_s: float = Field(
        default=5.0,
        ge=0,
        description="Seconds that running streams may go on when the router is told to stop.",
    )
