"""How checkpoints get on the disk: whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from ftlit.files import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, waits for the disk, renames; reads without running anything that a file holds.

    Lightning's own goes through the system's temporary folder and is not atomic from there to another file system.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(path) as scratch, scratch.open("wb") as file:  # a Python file: it says when the disk is full
            torch.save(checkpoint, file)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return super().load_checkpoint(path, map_location or (lambda storage, _: storage), weights_only=True)
