from paceline.router.free_memory import GROWTH_BYTES, MemoryReturn


class Process:
    """A process whose memory is freed by a trim, down to what it uses."""

    def __init__(self) -> None:
        self.used = self.resident = 100 << 20
        self.num_trims = 0

    def trim(self) -> None:
        self.num_trims += 1
        self.resident = self.used


def test_memory_is_given_back_after_a_burst_and_not_for_what_is_in_use() -> None:
    process = Process()
    memory = MemoryReturn(lambda: process.resident, process.trim)
    process.resident += GROWTH_BYTES - 1
    memory.check()
    assert process.num_trims == 0
    process.resident += 1
    memory.check()
    assert (process.num_trims, process.resident) == (1, process.used)
    process.used = process.resident = process.used + GROWTH_BYTES
    memory.check()
    memory.check()
    assert process.num_trims == 2  # what is in use is tried once
