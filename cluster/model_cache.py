"""Where converted models are kept."""

import os
from pathlib import Path

import platformdirs

VARIABLE = "PACELINE_CACHE_DIR"


def model_cache_dir() -> Path:
    """Name the folder of converted models: below $PACELINE_CACHE_DIR, or in the user's cache."""
    given = os.environ.get(VARIABLE)
    root = Path(given) if given else platformdirs.user_cache_path("paceline")
    return root / "models"
