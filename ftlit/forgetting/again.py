"""After the weights were changed behind the last validation: it is done again, and so are the probes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning as L

from ftlit.forgetting.probe import ForgettingProbe

if TYPE_CHECKING:
    from ftlit.stages.base import Stage


def measure_again(trainer: L.Trainer, stage: Stage) -> None:
    """Validates, and measures with every probe that has measured before; to be called in `on_train_end`."""
    if trainer.enable_validation:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
    for control in stage.controls:
        if isinstance(control, ForgettingProbe) and control.rounds:
            control.observe(trainer, stage)


__all__ = ["measure_again"]
