"""Checkpoints of the run folder: the last, the one before it, and the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from ftlit.callbacks.monitor import DEFAULT, watched
from ftlit.errors import ConfigError
from ftlit.files import keep_copy

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class SaveCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/last.ckpt`, the one before as `previous.ckpt`, and with validation rows the best by `monitor`.

    A batch is a whole optimizer step, so a checkpoint always falls between two steps. It holds what is trained and the
    optimizer's state, never the frozen base. When the process is asked to stop (SIGTERM, Ctrl-C, SLURM before a time
    limit), the step is ended and saved; SLURM's job is then put back into the queue, and goes on by itself.

    Args:
        every_n_steps: Also save `last.ckpt` every so many optimizer steps; None: at the end of each validation (of each
            epoch, without validation rows).
        monitor: Validation metric, smaller is better; left as it is, a stage may have one of its own (PPO keeps the
            largest `val/reward`).
        save_best: Whether to keep the best.
        keep_previous: Whether to keep the last but one: what a run goes on from should the last be damaged.

    Raises:
        ConfigError: If `every_n_steps` is not positive.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        monitor: str = DEFAULT,
        save_best: bool = True,
        keep_previous: bool = True,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"every_n_steps must be at least 1 optimizer step, got {every_n_steps}.")
        self.every_n_steps, self.keep_previous = every_n_steps, keep_previous
        self._last_saved_at = -1
        super().__init__(
            filename="best",
            monitor=monitor,
            save_top_k=1 if save_best else 0,
            save_last=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,  # at the end of a validation: a run that goes on may have to do it again
        )

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.monitor == DEFAULT and getattr(pl_module, "best_by", (DEFAULT, "min"))[1] == "max":
            self.mode, self.kth_value = "max", torch.tensor(-torch.inf)
        self.monitor: Any = None if self.monitor is None else watched(trainer, self.monitor)
        if self.monitor is None:  # nothing is validated: there is no best, only a last
            self.save_top_k = 0
        self.dirpath: Any = getattr(self, "dirpath", None) or str(Path(trainer.default_root_dir) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes where a run goes on from."""
        super().on_train_start(trainer, pl_module)
        if trainer.ckpt_path:
            self._last_saved_at = trainer.global_step

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

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Saves where a run was asked to stop; after an error the last good checkpoint stands."""
        if not isinstance(exception, SIGTERMException) or trainer.fast_dev_run or trainer.state.fn != "fit":
            return
        if trainer.global_step and not trainer.sanity_checking:
            self._save_last(trainer)
            if trainer.is_global_zero:
                path = Path(self.dirpath) / LAST
                print(f"stopped after step {trainer.global_step}: {path}; go on with --ckpt_path last", flush=True)
        if trainer.is_global_zero:
            stage: Any = pl_module
            stage.stop.requeue()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # The run folder may have been moved since, or be on another machine; the best checkpoint moved with it.
        moved = {
            key: str(Path(self.dirpath) / Path(value).name) if key.endswith("_path") and value else value
            for key, value in state_dict.items()
        }
        best = {str(Path(self.dirpath) / Path(k).name): v for k, v in state_dict["best_k_models"].items()}
        super().load_state_dict({**moved, "dirpath": self.dirpath, "best_k_models": best})

    def _save_last(self, trainer: L.Trainer) -> None:
        before: Any = getattr(self, "_last_global_step_saved", 0)
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._last_global_step_saved: Any = before  # the best of this step may still have to be saved

    @override
    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        path = Path(filepath)
        # The same step saved again (now with its validation) does not push out the one before it.
        fresh = self._last_saved_at not in (-1, trainer.global_step)
        if path.name == LAST:
            if self.keep_previous and fresh and trainer.is_global_zero:
                keep_copy(path, path.with_name(PREVIOUS))
            self._last_saved_at = trainer.global_step
        super()._save_checkpoint(trainer, filepath)
