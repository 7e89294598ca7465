"""Where a GPU's time goes, from a trace of PyTorch's profiler."""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
"""Categories of a trace's events that occupy the device."""


class DeviceEvent(NamedTuple):
    """A kernel, or a copy that the device makes."""

    name: str
    start_us: float
    end_us: float


class KernelTotal(NamedTuple):
    """All events of one name."""

    name: str
    us: float
    num_calls: int


def record_device_events(run: Callable[[], None]) -> list[DeviceEvent]:
    """Call `run`, which must wait for the device itself; return what the device did meanwhile."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        return device_events(json.loads(path.read_text(encoding="utf-8")))


def device_events(trace: Mapping[str, Any]) -> list[DeviceEvent]:
    """Take what occupies the device out of a trace in Chrome's format, in order of time."""
    found = [
        DeviceEvent(event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in trace["traceEvents"]
        if event.get("cat") in ON_DEVICE
    ]
    return sorted(found, key=lambda event: event.start_us)


def busy_us(events: Iterable[DeviceEvent]) -> float:
    """Time in which at least one event ran. Takes them in the order of their start."""
    total, covered_to = 0.0, float("-inf")
    for event in events:
        if event.end_us > covered_to:
            total += event.end_us - max(event.start_us, covered_to)
            covered_to = event.end_us
    return total


def kernel_totals(events: Iterable[DeviceEvent]) -> list[KernelTotal]:
    """Add up by short name, the longest first."""
    totals: dict[str, tuple[float, int]] = {}
    for event in events:
        name = short_name(event.name)
        us, count = totals.get(name, (0.0, 0))
        totals[name] = (us + event.end_us - event.start_us, count + 1)
    found = [KernelTotal(name, us, count) for name, (us, count) in totals.items()]
    return sorted(found, key=lambda total: -total.us)


def short_name(name: str) -> str:
    """Cut a kernel's name to what tells it from others: no arguments, types or tile sizes."""
    if name.startswith("nvjet"):
        return "nvjet (cuBLAS)"
    if name.startswith("Memcpy"):
        return " ".join(name.split()[:2])
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(]", plain, maxsplit=1)[0].strip() or name
