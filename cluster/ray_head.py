"""A Ray of the deployment's own on this machine: started before it, stopped after it.

`ray stop` is never used: it would end every Ray of this user. Its processes are found by the folder
that is their working directory and their temporary folder.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from paceline.addresses import parse_address
from paceline.cluster.settings import RaySettings
from paceline.errors import ConfigError

LOOPBACK = "127.0.0.1"
MAX_FOLDER_LENGTH = 44
"""Ray makes sockets with names of up to 62 characters below it, and Linux takes 107 in all."""
STOP_TIMEOUT_S = 15.0
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""0 makes Ray use 127.0.0.1 as this machine's address, as it does on desktops. Then all its servers
listen on loopback only; with any other address they listen on all interfaces."""
_OF_ANOTHER_RAY = (
    "RAY_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_CLIENT_MODE",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_LOG_TO_STDERR",
    "RAY_NAMESPACE",
    "RAY_REDIS_ADDRESS",
    "RAY_RUNTIME_ENV_HOOK",
    "RAY_TMPDIR",
)
"""Variables that a shell may hold for another cluster. They would lead our Ray astray."""


def start(folder: Path, settings: RaySettings) -> str:
    """Start a Ray head below `folder`, which is created, and return its address.

    Raises ConfigError with Ray's own words. The caller calls `stop` in either case.
    """
    if len(str(folder)) > MAX_FOLDER_LENGTH:
        raise ConfigError(
            f"Ray's folder {folder} has {len(str(folder))} characters, and Linux's limit for "
            f"socket names leaves {MAX_FOLDER_LENGTH}. Set PACELINE_RUNTIME_DIR to a shorter one"
        )
    stop(folder)  # of an earlier start, if somebody removed its record
    folder.mkdir(mode=0o700)
    _write_token(folder)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head"),
        *("--node-ip-address", LOOPBACK, "--port", "0", "--temp-dir", str(folder)),
        *("--include-dashboard", "false", "--dashboard-agent-listen-port", "0"),
        *("--disable-usage-stats", "--no-monitor", "--include-log-monitor", "false"),
        *("--min-worker-port", "0", "--max-worker-port", "0"),
        *("--object-store-memory", str(settings.object_store_bytes)),
    ]
    try:
        # In its own folder: Ray's processes inherit it, and must import nothing from ours.
        result = subprocess.run(
            command,
            cwd=folder,
            env=_head_environment(folder, settings),
            start_new_session=True,  # a Ctrl-C in the terminal must not end Ray under us
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=settings.start_timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"Ray was not up {settings.start_timeout_s:g} s after its start; "
            f"{_last_words(folder)}. Raise ray.start_timeout_s if this machine is slow"
        ) from None
    address_file = folder / "ray_current_cluster"
    if result.returncode != 0 or not address_file.exists():
        said = " | ".join(result.stdout.strip().splitlines()[-3:])
        raise ConfigError(f"Ray did not start: {said or _last_words(folder)}")
    return address_file.read_text(encoding="utf-8").strip()


def stop(folder: Path) -> None:
    """End every process of the Ray below `folder`, and remove it. Does nothing if it is gone.

    Whatever still runs is killed: end workers by the controller before.
    """
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while processes := find_processes(folder):
        # A raylet starts new workers as long as it lives, hence the repetition.
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=max(0.0, deadline - time.monotonic()))
        if time.monotonic() > deadline:
            pids = ", ".join(str(process.pid) for process in processes)
            raise ConfigError(
                f"processes {pids} of {folder} did not end {STOP_TIMEOUT_S:g} s after SIGKILL"
            )
    shutil.rmtree(folder, ignore_errors=True)


def find_processes(folder: Path) -> list[psutil.Process]:
    """Find the processes of the Ray below `folder`: those that work in it, or name it."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid == os.getpid() or process.uids().real != os.getuid():
                continue
            works_there = Path(process.cwd()).is_relative_to(folder)
            is_ray = "ray" in process.name() or "gcs_server" in process.name()
            names_it = is_ray and any(str(folder) in part for part in process.cmdline())
            if (works_there or names_it) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def driver_environment(folder: Path) -> dict[str, str | None]:
    """List the variables that join a process to the Ray of `start`; None: it must not be set.

    Both sides name the token. Otherwise each would decide by itself: a Ray uses tokens when the
    user has a ~/.ray/auth_token, which any other `ray.init()` writes, and a driver does not.
    """
    return dict.fromkeys(_OF_ANOTHER_RAY) | {
        LOOPBACK_VARIABLE: "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path(folder)),
    }


def token_path(folder: Path) -> Path:
    """Name the file with the token of the Ray below `folder`; only its user can read it."""
    return folder / "auth_token"


def answers(address: str, timeout_s: float = 1.0) -> bool:
    """Tell whether anything listens at host:port."""
    try:
        with socket.create_connection(parse_address(address), timeout_s):
            return True
    except OSError:
        return False


def _write_token(folder: Path) -> None:
    path = token_path(folder)
    path.touch(mode=0o600, exist_ok=False)
    path.write_text(secrets.token_hex(32), encoding="ascii")


def _head_environment(folder: Path, settings: RaySettings) -> dict[str, str]:
    """Return the variables of Ray's processes: those of this one, and ours, which win."""
    joining = driver_environment(folder)
    inherited = {name: value for name, value in os.environ.items() if name not in joining}
    return {
        **inherited,
        **{name: value for name, value in joining.items() if value is not None},
        "RAY_START_HOOK": "paceline.cluster.ray_start_hook.adjust",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_enable_metrics_collection": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(settings.head_outage_s),
        # Each worker sees the GPU that is reserved for it, and no other.
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "0",
        "RAY_worker_niceness": "0",  # Ray's 15 would put workers behind everything else
    }


def _last_words(folder: Path) -> str:
    for name in ("gcs_server.err", "raylet.err", "gcs_server.out", "raylet.out"):
        for log in folder.glob(f"session_latest/logs/{name}"):
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            if lines:
                return f"{name} ends with: {lines[-1]}"
    return "it wrote no log"
