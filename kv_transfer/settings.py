"""Settings of KV transfer: the `kv` section of the deployment's file."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

TransportName = Literal["auto", "shm", "torch_distributed"]


class KvSettings(BaseModel):
    """How KV blocks are cut and moved; the same for every worker of a deployment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    block_tokens: int = Field(
        default=16,
        ge=1,
        le=1024,
        description="Tokens a KV block. 16 wastes at most 15 slots a sequence, and a block of an "
        "8B model (2 MiB) is still large enough to copy at full speed.",
    )
    transport: TransportName = Field(
        default="auto",
        description="How blocks move between workers. auto takes the fastest that works between "
        "the two: shm between CPU workers of one host, otherwise torch_distributed, which is Gloo "
        "over TCP between CPUs and NCCL between GPUs.",
    )
    min_transport_gb_per_s: float = Field(
        default=0.0,
        ge=0,
        description="GB (1e9 bytes) a second that a transport must reach in a probe between the "
        "two workers; a slower one is refused. 0 accepts any speed.",
    )
    lease_ttl_s: float = Field(
        default=5.0,
        gt=0,
        description="Seconds after which an owner may take back leased blocks that their reader "
        "has not renewed by name: long enough for a stall, short enough not to strand memory.",
    )
    heartbeat_s: float = Field(
        default=1.0,
        gt=0,
        description="Seconds between two renewals of a reader's leases; several must fit into "
        "lease_ttl_s, so that one late message loses nothing.",
    )
    silence_limit_s: float = Field(
        default=2.5,
        ge=1,
        description="Seconds without a message from the owner of KV, which sends one every half "
        "second, after which its reader gives up what it has not confirmed. The time in which the "
        "reader itself stood still does not count.",
    )
    read_timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="Seconds that one read of blocks may take, not counting those before it on the "
        "same connection. A read takes milliseconds; a peer that is silent for this long is broken "
        "or stopped.",
    )
    listen_host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address of this host on which torch_distributed takes its peers' connections. "
        "Loopback serves one host and shows nothing to the network; set the address of a private "
        "interface to serve several hosts. NCCL takes the interface that has this address, unless "
        "NCCL_SOCKET_IFNAME names another.",
    )

    @model_validator(mode="after")
    def _check_heartbeat(self) -> "KvSettings":
        if self.heartbeat_s * 2 > self.lease_ttl_s:
            raise ValueError(
                f"kv.heartbeat_s is {self.heartbeat_s} and kv.lease_ttl_s is {self.lease_ttl_s}: a "
                "lease would end before its second renewal. Make lease_ttl_s at least twice "
                "heartbeat_s"
            )
        return self
