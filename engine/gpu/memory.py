"""How much of a GPU's memory the KV pool gets: what is left once everything else was measured."""

from dataclasses import dataclass

from paceline.errors import CapacityError
from paceline.kv_layout import KvLayout

OVERHEAD_BYTES = 1 << 30
"""What a process holds beside PyTorch's allocator: CUDA's context, kernels' code, cuBLAS."""
TRANSFER_BYTES = 512 << 20
"""Left for moving KV between workers: 32 MiB of staging a pair, and NCCL's own buffers."""
MIN_BLOCKS = 2


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A GPU's memory in bytes, as measured before the pool is allocated."""

    total: int
    free: int
    """On the device, with what PyTorch keeps cached counted in."""
    weights: int
    state: int
    """Block tables, sampling state, workspaces."""
    activations: int
    """Of the largest step, beyond what stays."""
    graphs: int
    """Of the captured steps, in their own pools of memory."""

    @property
    def own(self) -> int:
        """What this process needs beside the pool."""
        tensors = self.weights + self.state + self.activations + self.graphs
        return tensors + OVERHEAD_BYTES + TRANSFER_BYTES

    @property
    def room(self) -> int:
        """What a pool can take of what is free now."""
        return max(0, self.free - self.activations - self.graphs - TRANSFER_BYTES)

    def pool_blocks(
        self,
        layout: KvLayout,
        *,
        num_kv_blocks: int | None,
        kv_cache_bytes: int | None,
        gpu_memory_utilization: float,
    ) -> int:
        """Return how many blocks the pool gets; raise CapacityError naming the largest value that
        works.
        """
        block_bytes = layout.block_bytes
        largest = self.room // block_bytes
        if num_kv_blocks is not None:
            name, asked, best = "num_kv_blocks", f"{num_kv_blocks}", f"{largest}"
            count = num_kv_blocks
        elif kv_cache_bytes is not None:
            name, asked, best = "kv_cache_bytes", f"{kv_cache_bytes}", f"{largest * block_bytes}"
            count = kv_cache_bytes // block_bytes
        else:
            name, asked = "gpu_memory_utilization", f"{gpu_memory_utilization}"
            # Rounded down, so that the value named works.
            best = f"{(self.own + self.room) / self.total * 100 // 1 / 100:.2f}"
            count = max(0, int(gpu_memory_utilization * self.total) - self.own) // block_bytes
        if MIN_BLOCKS <= count <= largest:
            return count
        other = self.own - self.weights - self.activations - self.graphs
        needs = (
            f"weights {_gib(self.weights)}, a step's activations {_gib(self.activations)}, "
            f"captured graphs {_gib(self.graphs)}, other {_gib(other)}"
        )
        if largest < MIN_BLOCKS:
            raise CapacityError(
                f"No KV pool fits: {_gib(self.room)} of the GPU's {_gib(self.total)} is left "
                f"beside {needs}, and a block takes {_gib(block_bytes)}. Lower "
                "max_num_batched_tokens or max_num_seqs, free the GPU, or serve a smaller model."
            )
        if count < MIN_BLOCKS:
            raise CapacityError(
                f"{name} is {asked}, which leaves {count} blocks of {_gib(block_bytes)} for KV "
                f"beside {needs}, on a GPU of {_gib(self.total)}. Raise {name} to at most {best}."
            )
        raise CapacityError(
            f"The KV pool needs {_gib(count * block_bytes)} ({name} {asked}), and "
            f"{_gib(self.room)} of the GPU's {_gib(self.total)} is left for it beside {needs} and "
            f"other processes. Lower {name} to at most {best}."
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"
