"""How a stage measures itself while it trains: when, what is logged of it, and where it began."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from typing import Any, ClassVar

import lightning as L
import torch

from ftlit.data.datamodules import MAIN
from ftlit.metrics.directions import Mode
from ftlit.stages.signals import StopRequest


class Evaluated(L.LightningModule):
    """A module that knows what it measured before training and last.

    Attributes:
        planned_steps: Optimizer steps of the whole run.
        start_metrics: What the validation before training measured.
        last_metrics: What the last one did.
        validated_at: The optimizer step at which the last whole validation was; -1 before any.
    """

    best_by: ClassVar[tuple[str, Mode]] = ("val/loss", "min")
    """The validation metric by which the best checkpoint is chosen, and whether a small or a large one is better."""

    def __init__(self) -> None:
        super().__init__()
        self.planned_steps = 0
        self.start_metrics: dict[str, float] = {}
        self.last_metrics: dict[str, float] = {}
        self.validated_at = -1
        self.stop = StopRequest()
        self._caught: dict[str, float] | None = None  # where a validation leaves its numbers that is not logged

    @property
    def step_names(self) -> list[str]:
        """Whole names of all that is logged of an optimizer step."""
        return []

    def logged_at_validations(self, trainer: L.Trainer) -> list[str]:
        """Whole names of all that a validation logs, known before the first.

        Args:
            trainer: The trainer, its data set up.
        """
        return []

    def validates_here(self) -> bool:
        """Whether Lightning validates after the optimizer step that was taken last."""
        trainer, step = self.trainer, self.trainer.global_step
        if not trainer.enable_validation or step == 0:
            return False
        if step >= self.planned_steps:
            return True
        every = trainer.val_check_batch
        if trainer.check_val_every_n_epoch is None:
            return step % every == 0
        epoch, number = divmod(step - 1, int(trainer.num_training_batches))
        return (epoch + 1) % trainer.check_val_every_n_epoch == 0 and (number + 1) % every == 0

    def on_validation_start(self) -> None:
        """Listens to signals during the validation before training, too."""
        if self.trainer.state.fn == "fit":
            self.stop.install()

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Lets a signal end a validation; it is done again when the run goes on."""
        if self.trainer.state.fn != "fit":
            return
        asked = torch.tensor(float(self.stop.signal is not None), device=self.device)
        if self.trainer.world_size > 1:
            asked = self.trainer.strategy.reduce(asked, reduce_op="sum")
        if asked > 0:
            self.trainer._signal_connector.received_sigterm = True

    def on_validation_epoch_end(self) -> None:
        """Notes that this step is validated; before the callbacks save it."""
        if not self.trainer.sanity_checking:
            self.validated_at = self.trainer.global_step

    def log_evaluation(self, loop: str, values: dict[str, float]) -> None:
        """Logs what a validation or test measured.

        Args:
            loop: `val` or `test`.
            values: The metrics by their whole names, the same on all ranks.
        """
        if self._caught is not None:
            self._caught |= values
            return
        if self.trainer.sanity_checking:  # the whole validation before training: where the run starts from
            if not self.trainer.ckpt_path and self._is_whole():  # a run that goes on has that behind it
                self.start_metrics = values
                for logger in self.trainer.loggers:
                    logger.log_metrics({**values}, step=0)
            return
        self.last_metrics = values
        if loop == "val" and self.trainer.state.fn == "fit":
            self.log_position()
        for key, value in values.items():
            # Already the same on all ranks; the mean of equal numbers only keeps Lightning from warning.
            shown = key == self.best_by[0]
            self.log(key, value, prog_bar=shown, sync_dist=self.trainer.world_size > 1, batch_size=1)

    def _is_whole(self) -> bool:
        """Whether the validation before training reads all that later ones read; Lightning's default is two batches."""
        first, all_ = self.trainer.num_sanity_val_batches, self.trainer.num_val_batches
        return all(one >= other for one, other in zip(first, all_, strict=True))

    @property
    def judged_on(self) -> str | None:
        """The validation set that stands for the run: the main one, else the first; None where nothing is validated."""
        names = getattr(getattr(self.trainer, "datamodule", None), "validation_names", [MAIN])
        return MAIN if MAIN in names else next(iter(names), None)

    @property
    def judged_by(self) -> str | None:
        """`best_by` on that set; None where nothing is validated."""
        name, (place, _, key) = self.judged_on, self.best_by[0].rpartition("/")
        return None if name is None else f"{place}/{key}" if name == MAIN else f"{place}/{name}/{key}"

    @property
    def is_quiet(self) -> bool:
        """Whether a validation is on the way of which nobody is to hear."""
        return self._caught is not None

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Logs a metric as Lightning does; nothing in a validation of which nobody is to hear."""
        if not self.is_quiet:
            super().log(*args, **kwargs)

    @torch.no_grad()
    def validated(self) -> dict[str, float]:
        """What a validation measures now; nothing of it is logged, and no callback hears of it."""
        loop = self.trainer.fit_loop.epoch_loop.val_loop
        loop.setup_data()
        found = self.trainer.val_dataloaders
        loaders = found if isinstance(found, list) else [found] if found else []
        modes = [(module, module.training) for module in self.modules()]
        self._caught, validated_at = {}, self.validated_at
        self.eval()
        try:
            self.on_validation_epoch_start()
            for number, loader in enumerate(loaders):
                most = loop.max_batches[number]
                for place, batch in enumerate(itertools.islice(loader, int(most) if most < math.inf else None)):
                    moved = self.trainer.strategy.batch_to_device(batch)
                    with self.trainer.precision_plugin.val_step_context():
                        self.validation_step(moved, place, number)
            self.on_validation_epoch_end()
            return self._caught
        finally:
            self._caught, self.validated_at = None, validated_at
            for module, mode in modes:
                module.training = mode

    def forget_logged(self, names: Collection[str]) -> None:
        """Makes Lightning forget metrics of earlier steps, which it would log again and show to callbacks.

        Args:
            names: Metrics that were logged at the end of a step before, and are not measured now.
        """
        for item in (self.trainer._results or {}).values():
            if item.meta.fx == "on_train_batch_end" and item.meta.name in names:
                item.reset()
        connector = self.trainer._logger_connector
        for name in names:
            for kept in (connector._callback_metrics, connector._logged_metrics):
                kept.pop(name, None)

    def log_position(self) -> None:
        """Puts what is logged next at the number of optimizer steps taken: Lightning would say one less."""
        self.log("step", float(self.trainer.global_step), batch_size=1)


__all__ = ["Evaluated"]
