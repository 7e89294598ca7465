"""A deployment on this machine to hurt: a tiny random model, two workers in each pool."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import NamedTuple

import grpc
import yaml

from paceline.bench.router_throughput import write_tokenizer
from paceline.grpc_options import CLIENT_CHANNEL
from paceline.v1 import control_pb2, control_pb2_grpc

NAME = "faults"
VOCAB_SIZE = 256
MAX_MODEL_LEN = 4096
UP_TIMEOUT_S = 300.0
STATUS_TIMEOUT_S = 5.0
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Addresses(NamedTuple):
    """Where a deployment answers."""

    router: str
    controller: str
    ray: str


def write_files(folder: Path, num_workers: int, settings: Mapping[str, object]) -> Path:
    """Write the model and the settings; return the path of the latter.

    settings: by section, merged into those that are written.
    """
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
    write_tokenizer(model)
    pool = {"replicas": num_workers, "num_kv_blocks": 1024, "max_num_seqs": 32, "num_threads": 1}
    sections: dict[str, object] = {
        "deployment": NAME,
        "model": {"path": str(model), "load_format": "dummy", "dtype": "float32"},
        "router": {"grpc_port": 0},
        # Small chunks, so that there are moments within a prompt to die at.
        "prefill": pool | {"max_num_batched_tokens": 64},
        "decode": pool,
        # Workers that die all the time are what this is about.
        "controller": {"first_back_off_s": 0.2, "max_back_off_s": 0.5, "max_empty_back_off_s": 0.2},
    }
    file = folder / "faults.yaml"
    file.write_text(yaml.safe_dump(sections | dict(settings)), encoding="utf-8")
    return file


@contextlib.asynccontextmanager
async def deployment(file: Path, failpoints: str = "") -> AsyncIterator[Addresses]:
    """Bring it up for the block, and take it down. Raises CalledProcessError if either fails."""
    environment = os.environ | ({"PACELINE_FAILPOINT": failpoints} if failpoints else {})
    try:
        shown = _paceline("up", str(file), "--json", environment=environment)
        said = json.loads(shown)
        yield Addresses(said["router_address"], said["controller_address"], said["ray_address"])
    finally:
        _paceline("down", "--deployment", NAME, environment=environment)


def _paceline(*arguments: str, environment: Mapping[str, str]) -> str:
    command = [str(Path(sys.executable).with_name("paceline")), *arguments]
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env=dict(environment),
        check=True,
        timeout=UP_TIMEOUT_S,
    ).stdout


class Control:
    """Asks the controller."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=CLIENT_CHANNEL)
        self._stub = control_pb2_grpc.ControlServiceStub(self._channel)

    async def status(self) -> control_pb2.GetStatusResponse:
        """Raises grpc.aio.AioRpcError while the controller is away."""
        return await self._stub.GetStatus(control_pb2.GetStatusRequest(), timeout=STATUS_TIMEOUT_S)

    async def close(self) -> None:
        await self._channel.close()
