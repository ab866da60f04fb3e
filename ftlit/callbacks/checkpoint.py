"""Checkpoints of the run folder: the last and the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class SaveCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/last.ckpt`, and with validation rows the best by `monitor`.

    A batch is a whole optimizer step, so a checkpoint always falls between two steps. It holds what is trained and the
    optimizer's state, never the frozen base.

    Args:
        every_n_steps: Also save `last.ckpt` every so many optimizer steps; None: at the end of each validation (of each
            epoch, without validation rows).
        monitor: Validation metric, smaller is better.
        save_best: Whether to keep the best.
    """

    def __init__(self, every_n_steps: int | None = None, monitor: str = "val/loss", save_best: bool = True) -> None:
        super().__init__(
            filename="best",
            monitor=monitor,
            save_top_k=1 if save_best else 0,
            save_last=True,
            every_n_train_steps=every_n_steps,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_weights_only=False,
        )

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Does without the best where nothing is validated."""
        names = getattr(getattr(trainer, "datamodule", None), "validation_names", None)
        if names is not None and not names:
            self.monitor, self.save_top_k = None, 1
        self.dirpath: Any = getattr(self, "dirpath", None) or str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)
