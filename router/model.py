"""The served model, as far as a router must know it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Name and limits of the model; the cluster reads them once, so that router and workers
    agree."""

    name: str
    max_model_len: int
    """Prompt plus output tokens of a sequence at most"""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    tokenizer_folder: Path
    """Has tokenizer.json and the files that add to it: docs/model-folder.md"""
