"""Load an engine on random weights, each part timed, its memory planned and measured."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from paceline.engine.load import LoadedEngine, load_engine
from paceline.engine.model_source import prepare_model
from paceline.engine.settings import EngineSettings, ModelSettings


class StartUp:
    """Collects what starting takes."""

    def __init__(self, device: str) -> None:
        self._is_cuda = device == "cuda"
        self.steps: list[dict[str, Any]] = []
        """In order, each with name and seconds."""
        self.memory: dict[str, Any] = {}
        """Bytes, of a GPU: the engine's plan, and what was in use at moments named by callers."""
        self.num_cached_kernels = _num_cached_kernels()
        """Compiled by earlier processes: without any, each kernel is compiled in this start."""

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time a step of starting that the engine does not time itself."""
        started = time.perf_counter()
        yield
        self._on_step(name, time.perf_counter() - started)

    def load(
        self, model: ModelSettings, settings: EngineSettings, block_tokens: int
    ) -> LoadedEngine:
        """Load the engine."""
        self.note_memory("before")
        folder = prepare_model(model, Path(), lambda name, share: None)
        engine = load_engine(
            model,
            folder,
            settings,
            block_tokens=block_tokens,
            allocate=lambda size: torch.zeros(size, dtype=torch.uint8),
            on_step=self._on_step,
        )
        if engine.memory is not None:
            self.memory["plan"] = asdict(engine.memory) | {
                "pool": engine.num_blocks * engine.layout.block_bytes,
                "num_blocks": engine.num_blocks,
                "block": engine.layout.block_bytes,
            }
        self.note_memory("loaded")
        return engine

    def note_memory(self, moment: str) -> None:
        """Note what is in use on the GPU now, and what PyTorch held at most so far."""
        if not self._is_cuda:
            return
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        self.memory[moment] = {
            "in_use": total - free,
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "max_allocated": torch.cuda.max_memory_allocated(),
            "max_reserved": torch.cuda.max_memory_reserved(),
        }

    def _on_step(self, name: str, seconds: float) -> None:
        self.steps.append({"name": name, "seconds": seconds})


def _num_cached_kernels() -> int:
    folder = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    return sum(1 for _ in folder.glob("*/*.cubin"))
