"""A worker process without Ray, driven by JSON lines: commands on stdin, answers on stdout."""

import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from paceline.decode_worker import process as decode
from paceline.decode_worker.settings import DecodeSettings
from paceline.engine.model_source import ModelFolder
from paceline.engine.settings import ModelSettings
from paceline.kv_transfer.settings import KvSettings
from paceline.prefill_worker import process as prefill
from paceline.prefill_worker.settings import PrefillSettings
from paceline.worker.core import Peer
from paceline.worker.process import WorkerProcess, WorkerSpec


def build(config: dict[str, Any], on_failure: Any) -> WorkerProcess:
    spec = WorkerSpec(
        worker_id=config["worker_id"],
        incarnation=config["incarnation"],
        host="127.0.0.1",
        model=ModelSettings(**config["model"]),
        model_folder=ModelFolder(
            Path(config["model_folder"]["path"]),
            config["model_folder"]["revision"],
            config["model_folder"]["name"],
        ),
        kv=KvSettings(**config["kv"]),
    )
    if config["role"] == "prefill":
        return prefill.build(spec, PrefillSettings(**config["settings"]), on_failure)
    return decode.build(spec, DecodeSettings(**config["settings"]), on_failure)


def answer(out: TextIO, **fields: Any) -> None:
    out.write(json.dumps(fields) + "\n")
    out.flush()


def main() -> None:
    # Whatever libraries print goes to stderr; the answers keep stdout for themselves.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def die(error: BaseException) -> None:
        traceback.print_exception(error)
        os._exit(1)

    worker = build(json.loads(sys.stdin.readline()), die)
    worker.start(lambda name, seconds: None)
    answer(out, address=worker.address, pid=os.getpid())
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer(out, ok=True, value=run(worker, command))
        except Exception as error:
            answer(out, ok=False, value=f"{type(error).__name__}: {error}")
        if command["do"] == "stop":
            return


def run(worker: WorkerProcess, command: dict[str, Any]) -> Any:
    match command["do"]:
        case "status":
            return worker.status()._asdict()
        case "check_integrity":
            worker.check_integrity(20.0)
        case "arm":
            worker.arm_failpoint(command["specification"])
        case "drain":
            worker.drain()
        case "membership":
            live = [Peer(*peer) for peer in command["live"]]
            worker.update_membership(live, [Peer(*peer) for peer in command["sources"]])
        case "resources":
            return {
                "fds": sorted(_open_files()),
                "pools": sorted(_mapped_pools()),
                "threads": sorted(thread.name for thread in threading.enumerate()),
            }
        case "stop":
            worker.stop(20.0)
    return None


def _open_files() -> Iterator[str]:
    for fd in Path("/proc/self/fd").iterdir():
        # The listing's own descriptor is gone by now.
        if fd.is_symlink():
            yield str(fd.readlink())


def _mapped_pools() -> set[str]:
    """Names (worker id and incarnation) of the pools that this process has mapped."""
    maps = Path("/proc/self/maps").read_text()
    return set(re.findall(r"memfd:paceline-(\S+)", maps))


if __name__ == "__main__":
    main()
