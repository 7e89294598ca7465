"""Where converted models are kept."""

import os
from pathlib import Path

import platformdirs

from paceline.errors import ConfigError

VARIABLE = "PACELINE_CACHE_DIR"


def model_cache_dir() -> Path:
    """Name the folder of converted models: below $PACELINE_CACHE_DIR, or in the user's cache.

    Raises ConfigError if the variable holds a relative path: processes run in other folders.
    """
    given = os.environ.get(VARIABLE)
    if given and not Path(given).is_absolute():
        raise ConfigError(
            f"{VARIABLE} is {given}: it must be an absolute path, such as {Path(given).absolute()}"
        )
    root = Path(given) if given else platformdirs.user_cache_path("paceline")
    return root / "models"
