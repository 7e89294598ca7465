"""What a measurement ran on, and how its result is kept."""

import json
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("paceline", "torch", "transformers", "ray", "grpcio", "protobuf", "numpy", "triton")


def describe_environment() -> dict[str, Any]:
    """Describe hardware and versions, for the JSON of a result."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def write_result(path: Path | None, benchmark: str, config: dict[str, Any], result: Any) -> None:
    """Write one result with everything needed to read it a year later; None: standard output."""
    document = {
        "benchmark": benchmark,
        "environment": describe_environment(),
        "config": config,
        "result": result,
    }
    text = json.dumps(document, indent=2) + "\n"
    if path is None:
        sys.stdout.write(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
