"""Checkpoints of the run folder: the last and the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from ftlit.callbacks.monitor import DEFAULT, watched
from ftlit.errors import ConfigError


class SaveCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/last.ckpt`, and with validation rows the best by `monitor`.

    A batch is a whole optimizer step, so a checkpoint always falls between two steps. It holds what is trained and the
    optimizer's state, never the frozen base.

    Args:
        every_n_steps: Also save `last.ckpt` every so many optimizer steps; None: at the end of each validation (of each
            epoch, without validation rows).
        monitor: Validation metric, smaller is better.
        save_best: Whether to keep the best.

    Raises:
        ConfigError: If `every_n_steps` is not positive.
    """

    def __init__(self, every_n_steps: int | None = None, monitor: str = DEFAULT, save_best: bool = True) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"every_n_steps must be at least 1 optimizer step, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        super().__init__(
            filename="best",
            monitor=monitor,
            save_top_k=1 if save_best else 0,
            save_last=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.monitor: Any = None if self.monitor is None else watched(trainer, self.monitor)
        if self.monitor is None:  # nothing is validated: there is no best, only a last
            self.save_top_k = 0
        self.dirpath: Any = getattr(self, "dirpath", None) or str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not Lightning's every_n_train_steps: it waits for the monitored metric, and saves nothing before there is one.
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.every_n_steps and not trainer.fast_dev_run and trainer.global_step % self.every_n_steps == 0:
            self._save_last(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self.monitor is None and not trainer.fast_dev_run:
            self._save_last(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        super().on_train_end(trainer, pl_module)
        self._save_last(trainer)  # whatever validation was set to: the end of a run is kept

    def _save_last(self, trainer: L.Trainer) -> None:
        before: Any = getattr(self, "_last_global_step_saved", 0)
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._last_global_step_saved: Any = before  # the best of this step may still have to be saved
