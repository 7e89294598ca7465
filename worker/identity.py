"""Who a worker is, to routers and peers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """Known once the model is loaded; the same until the process ends."""

    worker_id: str
    """Such as decode-0; a replacement has the same."""
    incarnation: int
    """Grows with every start of the same worker_id; never reused."""
    num_blocks: int
    block_tokens: int
    max_num_seqs: int
    local_prefill_tokens: int
    """Longest uncached context that this worker computes itself; 0: none."""
    layout_fingerprint: bytes
    """Digest of layout, dtype, model revision and adapter."""
    layout_description: str

    @property
    def name(self) -> str:
        """Names the incarnation; never reused."""
        return f"{self.worker_id}.{self.incarnation}"
