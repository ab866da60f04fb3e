"""Files of a run folder that are rewritten: whole at any moment."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it: whoever reads it, also after a power cut, sees the old or the new.

    Args:
        path: The file; its folder is made.
        text: All of its content; line ends are written as they are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", newline="", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
