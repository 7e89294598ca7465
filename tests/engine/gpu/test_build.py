"""A runner is built from a measured step, and computes with what it was built from."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from model_references import write_model
from triton_device import device

from paceline.engine.gpu.build import GpuBuild, build_runner
from paceline.engine.model_config import read_model_config
from paceline.engine.models.llama import LlamaModel
from paceline.engine.parallel import ParallelContext
from paceline.engine.settings import EngineSettings
from paceline.engine.warm_up import warm_up
from paceline.engine.weights import load_weights
from paceline.kv_layout import attention_layout


def test_a_runner_is_built_in_the_steps_of_the_checklist(tmp_path: Path) -> None:
    write_model(tmp_path, "LlamaForCausalLM", num_hidden_layers=1)
    config = read_model_config(tmp_path)
    weights = load_weights(
        tmp_path, config, torch.float32, ParallelContext(), lambda done, total: None
    )
    layout = attention_layout(
        num_layers=1, num_kv_heads=2, head_dim=16, block_tokens=16, dtype="float32"
    )
    settings = EngineSettings(num_kv_blocks=9, max_num_seqs=2, max_num_batched_tokens=16)
    on_device = {name: tensor.to(device()) for name, tensor in weights.items()}
    build = GpuBuild(
        config, LlamaModel(config, on_device), 4, layout, settings, 64, torch.device(device())
    )
    steps: list[str] = []

    def timed(name: str) -> AbstractContextManager[None]:
        steps.append(name)
        return nullcontext()

    shares: list[float] = []
    runner, pool, plan = build_runner(
        build, captures=True, timed=timed, on_progress=lambda name, share: shares.append(share)
    )
    assert [step.split()[0] for step in steps] == ["compile", "allocate", "capture"]
    assert "9 blocks" in steps[1]
    assert "2 CUDA graphs" in steps[2]
    assert shares == [0.5, 1.0]
    assert pool.num_blocks == 9
    assert plan.graphs > 0
    warm_up(runner, 16)
    runner.close()
