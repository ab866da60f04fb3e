"""Where ftlit keeps what it can make again."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$FTLIT_CACHE`, or `~/.cache/ftlit`."""
    return Path(os.environ.get("FTLIT_CACHE") or Path.home() / ".cache" / "ftlit")
