"""Start-up compiles what serving launches, before and beside other work.

On a CPU, by Triton's compiler for a GPU that is not there: in a process of its own, since the other
tests' kernels are interpreted.
"""

import os
import subprocess
import sys
from pathlib import Path

from model_references import write_model

SCRIPT = """
import threading
from pathlib import Path

import torch
import triton.compiler
from triton import knobs
from triton.backends.compiler import GPUTarget


class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, src, metadata):
        threads.add(threading.current_thread().name)

    @property
    def utils(self):
        return Utilities


class Utilities:
    def get_device_properties(device):
        return {"max_shared_mem": 232448}

    def load_binary(name, kernel, shared, device):
        loaded.append(name)
        return 1, 1, 0, 0, 1024

    def unload_module(module):
        pass


def compile(*args, **kwargs):
    threads.add(threading.current_thread().name)
    return compile_one(*args, **kwargs)


threads, loaded = set(), []
compile_one, triton.compiler.compile = triton.compiler.compile, compile
triton.runtime.driver.set_active(Driver())

from paceline.engine.gpu import build
from paceline.engine.model_config import read_model_config
from paceline.engine.models.llama import LlamaModel
from paceline.engine.parallel import ParallelContext
from paceline.engine.settings import EngineSettings
from paceline.engine.warm_up import warm_up
from paceline.engine.weights import dummy_weights
from paceline.kernels.launch import compile_ahead
from paceline.kv_layout import attention_layout

config = read_model_config(Path({folder!r}))
device = torch.device("cpu")
weights = dummy_weights(
    config, torch.bfloat16, ParallelContext(), lambda done, total: None, device=device
)
layout = attention_layout(
    num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=16, dtype="bfloat16"
)
settings = EngineSettings(max_num_seqs=4, max_num_batched_tokens=512)
model = LlamaModel(config, weights)
built = build.GpuBuild(config, model, model, 4, layout, settings, 512, device)
sampler = built.make_sampler()
runner, pool = built.make_runner(sampler, 2)
compile_ahead(lambda: build._run_every_kernel(runner, sampler, built))
assert len(loaded) > 20, loaded
late = []
knobs.runtime.jit_cache_hook = lambda **compiled: late.append(compiled["repr"]) or True


def serve():
    warm_up(runner, 16)
    for count in (1, 2, 3, 7, 17, 33, 65, 130, 257, 500):
        build._run(runner, [count])
        build._run(runner, [1, count])
        build._run(runner, [1, 1, 1, min(count, 500)])


compile_ahead(lambda: build._run_every_size(built, sampler))
compile_ahead(serve)
runner.capture_graphs()
compile_ahead(serve)
assert not late, late
assert threads and "MainThread" not in threads, threads
"""


def test_serving_compiles_nothing_that_start_up_did_not(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM", num_hidden_layers=2)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", SCRIPT.replace("{folder!r}", repr(str(tmp_path)))]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
