"""`paceline check`: what this machine can do, and whether settings fit it."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.text import Text

from paceline.cluster.cli.output import gib, out, print_json
from paceline.cluster.launcher import Capacity
from paceline.cluster.model_cache import model_cache_dir
from paceline.cluster.process_state import Role
from paceline.cluster.resources import check_capacity
from paceline.cluster.settings import DeploymentSettings
from paceline.cluster.settings_file import DEFAULT_FILE, load_settings
from paceline.errors import PacelineError


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    value: str
    is_good: bool
    advice: str = ""


def check(file: Path | None, overrides: list[str], as_json: bool) -> None:
    settings = load_settings(file or DEFAULT_FILE, overrides).settings
    findings = [*_machine(), *_packages(), *_transports(), _fit(settings)]
    if as_json:
        print_json([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            mark = Text("✓ ", "green") if finding.is_good else Text("✗ ", "red")
            out.print(mark + Text(f"{finding.name:<20} {finding.value}"))
            if finding.advice:
                out.print(Text(f"  {finding.advice}", "dim"))
    if not all(finding.is_good for finding in findings):
        raise SystemExit(1)


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    yield Finding("cores", f"{cores} of {os.cpu_count()} ({platform.machine()})", True)
    memory = psutil.virtual_memory()
    yield Finding("memory", f"{gib(memory.available)} free of {gib(memory.total)}", True)
    cache = model_cache_dir()
    exists = next(parent for parent in (cache, *cache.parents) if parent.exists())
    free = psutil.disk_usage(str(exists)).free
    yield Finding("model cache", f"{cache}, {gib(free)} free", os.access(exists, os.W_OK))


def _packages() -> Iterator[Finding]:
    yield Finding("python", platform.python_version(), True)
    for name in ("paceline", "torch", "ray", "transformers", "grpcio"):
        try:
            yield Finding(name, version(name), True)
        except PackageNotFoundError:
            yield Finding(name, "not installed", False, f"pip install {name}")


def _transports() -> Iterator[Finding]:
    yield _shm()
    import torch.distributed

    gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    yield Finding("torch_distributed", "Gloo" if gloo else "torch has no Gloo", gloo)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    yield Finding("gpu", f"{name}; this version serves on CPUs", True)


def _shm() -> Finding:
    """Do what the transport does: make memory, and open it read-only through /proc."""
    try:
        descriptor = os.memfd_create("paceline-check")
        try:
            os.close(os.open(f"/proc/{os.getpid()}/fd/{descriptor}", os.O_RDONLY))
        finally:
            os.close(descriptor)
    except OSError as error:
        return Finding("shm", f"memfd through /proc fails: {error}", False, "set kv.transport")
    return Finding("shm", "memfd through /proc", True)


def _fit(settings: DeploymentSettings) -> Finding:
    wanted = {Role.PREFILL: settings.prefill.replicas, Role.DECODE: settings.decode.replicas}
    memory = psutil.virtual_memory()
    resources = {"CPU": float(os.cpu_count() or 1)}
    here = Capacity(resources, 1, memory.total, memory.available)
    name = f"room for {settings.deployment}"
    if settings.ray.address is not None:
        return Finding(name, f"decided by the Ray cluster at {settings.ray.address}", True)
    try:
        check_capacity(settings, wanted, wanted, here)
    except PacelineError as error:
        return Finding(name, "no", False, str(error))
    sizes = ", ".join(f"{count} {role.value}" for role, count in wanted.items())
    return Finding(name, f"{sizes}: yes", True)
