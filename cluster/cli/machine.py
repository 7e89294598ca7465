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
from paceline.cluster.deployment_record import records
from paceline.cluster.devices import GPU
from paceline.cluster.early_checks import early_findings
from paceline.cluster.launcher import Capacity
from paceline.cluster.model_cache import model_cache_dir
from paceline.cluster.process_state import Role
from paceline.cluster.resources import check_capacity
from paceline.cluster.settings import DeploymentSettings
from paceline.cluster.settings_file import DEFAULT_FILE, load_settings
from paceline.engine.host_memory import host_memory
from paceline.errors import PacelineError

CUDA_TORCH = "install a torch built for CUDA: https://pytorch.org/get-started/locally"


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    value: str
    is_good: bool
    advice: str = ""


def check(file: Path | None, overrides: list[str], as_json: bool) -> None:
    settings = load_settings(file or DEFAULT_FILE, overrides).settings
    findings = [
        *_machine(),
        *_packages(settings),
        *_gpus(settings),
        *_transports(settings),
        *_early(settings),
        _fit(settings),
    ]
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
    memory = host_memory()
    free_of_total = f"{gib(memory.available_bytes)} free of {gib(memory.total_bytes)}"
    yield Finding("memory", free_of_total, True)
    cache = model_cache_dir()
    exists = next(parent for parent in (cache, *cache.parents) if parent.exists())
    free = psutil.disk_usage(str(exists)).free
    yield Finding("model cache", f"{cache}, {gib(free)} free", os.access(exists, os.W_OK))


def _packages(settings: DeploymentSettings) -> Iterator[Finding]:
    yield Finding("python", platform.python_version(), True)
    for name in ("paceline", "torch", "ray", "transformers", "grpcio"):
        yield _package(name, f"pip install {name}")
    if _needs_gpu(settings):
        yield _package("triton", "pip install 'paceline[gpu]'")
    else:
        yield _optional_package("triton", "for device: cuda")
    yield _optional_package("nixl", "for KV over RDMA, which is not implemented yet")


def _package(name: str, advice: str) -> Finding:
    try:
        return Finding(name, version(name), True)
    except PackageNotFoundError:
        return Finding(name, "not installed", False, advice)


def _optional_package(name: str, purpose: str) -> Finding:
    found = _package(name, "")
    return found if found.is_good else Finding(name, f"not installed, not needed ({purpose})", True)


def _gpus(settings: DeploymentSettings) -> Iterator[Finding]:
    import torch

    needed = _needs_gpu(settings)
    if torch.version.cuda is None:
        value = f"none: torch {torch.__version__} is built for CPUs"
        yield Finding("gpu", value, not needed, CUDA_TORCH if needed else "")
    elif not torch.cuda.is_available():
        value = f"none: torch for CUDA {torch.version.cuda} finds no GPU"
        advice = "nvidia-smi must list one, its driver be new enough, CUDA_VISIBLE_DEVICES allow it"
        yield Finding("gpu", value, not needed, advice if needed else "")
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        what = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, torch "
            f"for CUDA {torch.version.cuda}"
        )
        try:
            free, total = torch.cuda.mem_get_info(number)
        except RuntimeError as error:  # somebody has it for himself, or all of its memory
            yield Finding(f"gpu {number}", f"{what}: cannot be used", not needed, str(error))
        else:
            yield Finding(f"gpu {number}", f"{what}, {gib(free)} free of {gib(total)}", True)


def _transports(settings: DeploymentSettings) -> Iterator[Finding]:
    """Tell which transports work here; only one that the settings would use is missed."""
    on_gpu = settings.decode.device == "cuda"
    shm = _shm()
    yield shm._replace(is_good=True, advice="") if on_gpu else shm
    import torch.distributed as dist

    available = dist.is_available()
    gloo = available and dist.is_gloo_available()
    nccl = available and dist.is_nccl_available()
    has = ["Gloo"] if gloo else []
    if nccl:
        import torch.cuda.nccl

        numbers = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        has.append(f"NCCL {'.'.join(map(str, numbers))}")
    value = " and ".join(has) or "torch has neither Gloo nor NCCL"
    if on_gpu:
        is_good, advice = nccl or not _needs_gpu(settings), f"NCCL is missing: {CUDA_TORCH}"
    else:
        is_good, advice = gloo, "Gloo is missing: install another build of torch"
    yield Finding("torch_distributed", value, is_good, "" if is_good else advice)


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


def _early(settings: DeploymentSettings) -> Iterator[Finding]:
    """Tell what `up` would refuse at once."""
    is_up = any(r.deployment == settings.deployment and r.is_up for r in records())
    for name, value, problem in early_findings(settings):
        if problem and settings.ray.address is not None:
            advice = f"Its processes may run on other machines than this one: {problem}"
            yield Finding(
                name, f"decided by the Ray cluster at {settings.ray.address}", True, advice
            )
        elif problem and is_up and name.endswith(".grpc_port"):
            yield Finding(name, f"not free, and the deployment {settings.deployment} is up", True)
        else:
            yield Finding(name, value or "no", not problem, problem)


def _fit(settings: DeploymentSettings) -> Finding:
    import torch

    wanted = {Role.PREFILL: settings.prefill.replicas, Role.DECODE: settings.decode.replicas}
    resources = {"CPU": float(os.cpu_count() or 1), GPU: float(torch.cuda.device_count())}
    here = Capacity(resources, 1, *host_memory())
    name = f"room for {settings.deployment}"
    if settings.ray.address is not None:
        return Finding(name, f"decided by the Ray cluster at {settings.ray.address}", True)
    try:
        check_capacity(settings, wanted, wanted, here)
    except PacelineError as error:
        return Finding(name, "no", False, str(error))
    sizes = ", ".join(f"{count} {role.value}" for role, count in wanted.items())
    return Finding(name, f"{sizes}: yes", True)


def _needs_gpu(settings: DeploymentSettings) -> bool:
    """Whether a GPU has to be here: on a Ray cluster that runs already it may be elsewhere."""
    return settings.decode.device == "cuda" and settings.ray.address is None
