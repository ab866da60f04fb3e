"""Checkpoints of the run folder: the last, the one before it, and the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from ftlit.callbacks.monitor import DEFAULT, Monitor, logged_at_validations, monitor_of
from ftlit.errors import ConfigError
from ftlit.files import keep_copy, second_name
from ftlit.metrics.directions import Mode

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


class SaveCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/last.ckpt`, the one before as `previous.ckpt`, and with validation rows the best by `monitor`.

    A batch is a whole optimizer step, so a checkpoint always falls between two steps. It holds what is trained and the
    optimizer's state, never the frozen base. When the process is asked to stop (SIGTERM, Ctrl-C, SLURM before a time
    limit), the step is ended and saved; SLURM's job is then put back into the queue, and goes on by itself.

    Args:
        every_n_steps: Also save `last.ckpt` every so many optimizer steps; None: at the end of each validation (of each
            epoch, without validation rows).
        monitor: Validation metric that decides what is best, here, for `adapter/best`, W&B and the report; left as it
            is, what the stage is judged by (PPO by `val/reward`).
        mode: Whether its smallest (`min`) or its largest (`max`) value is the best. ftlit's own metrics know that; one
            that a class of your own logs needs it.
        save_top_k: How many of the best to keep; of more than one each is `step-NNNNNN.ckpt`, and `best.ckpt` a second
            name of the best. -1: all; 0: none.
        save_best: False is `save_top_k: 0`.
        keep_previous: Whether to keep the last but one: what a run goes on from should the last be damaged.

    Raises:
        ConfigError: If `every_n_steps` or `save_top_k` is out of range.
    """

    decides: Monitor | None = None
    """What decides, once the run has begun; None where nothing is validated."""

    def __init__(
        self,
        every_n_steps: int | None = None,
        monitor: str = DEFAULT,
        mode: Mode | None = None,
        save_top_k: int = 1,
        save_best: bool = True,
        keep_previous: bool = True,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"every_n_steps must be at least 1 optimizer step, got {every_n_steps}.")
        if save_top_k < -1:
            raise ConfigError(f"save_top_k must be a number of checkpoints, or -1 for all, got {save_top_k}.")
        if mode not in (None, "min", "max"):
            raise ConfigError(f"SaveCheckpoint.mode must be min or max, got {mode!r}.")
        self.every_n_steps, self.keep_previous = every_n_steps, keep_previous
        self._asked = (monitor, mode)
        self._kept_last = False
        self._last_saved_at = -1
        super().__init__(
            filename="best" if save_top_k in (0, 1) else "step-{step:06d}",
            monitor=monitor,
            mode=mode or "min",
            save_top_k=save_top_k if save_best else 0,
            save_last=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
            save_on_train_epoch_end=False,  # at the end of a validation: a run that goes on may have to do it again
        )

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.decides = monitor_of(trainer, type(self).__name__, *self._asked)
            self.monitor: Any = None if self.decides is None else self.decides.name
            self.mode = "min" if self.decides is None else self.decides.mode
            self.kth_value = torch.tensor(-torch.inf if self.mode == "max" else torch.inf)
            if self.decides is None:  # nothing is validated: there is no best, only a last
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

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning saves the last only where this validation was one of the best.
        self._kept_last = False
        super().on_validation_end(trainer, pl_module)
        if not self._kept_last and self.monitor is not None and not self._should_skip(trainer):
            self._save_last(trainer)

    @staticmethod
    def _should_skip(trainer: L.Trainer) -> bool:
        return bool(trainer.fast_dev_run) or trainer.state.fn != "fit" or trainer.sanity_checking

    @override
    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Any]) -> None:
        if self.save_top_k == 0 or self.monitor is None or self.monitor in monitor_candidates:
            super()._save_topk_checkpoint(trainer, monitor_candidates)
        elif self.monitor not in logged_at_validations(trainer):  # what is measured now and then cannot decide always
            raise ConfigError(
                f"{type(self).__name__} watches {self.monitor!r}, which this validation did not log; it logged "
                f"{', '.join(sorted(trainer.callback_metrics))}."
            )

    @override
    def _update_best_and_save(self, current: Any, trainer: L.Trainer, monitor_candidates: dict[str, Any]) -> None:
        super()._update_best_and_save(current, trainer, monitor_candidates)
        best = Path(self.best_model_path)
        if best.name != BEST and trainer.is_global_zero:
            second_name(best, best.with_name(BEST))

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
            self._last_saved_at, self._kept_last = trainer.global_step, True
        super()._save_checkpoint(trainer, filepath)
