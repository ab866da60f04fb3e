"""Adapter folders beside the checkpoints: what other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L

from ftlit.callbacks.monitor import DEFAULT, Best, deciding, monitor_of
from ftlit.metrics.directions import Mode
from ftlit.peft.io import save_adapter

if TYPE_CHECKING:
    from ftlit.stages.base import Stage


class SaveAdapter(L.Callback):
    """Writes `adapter/best` whenever validation improves and `adapter/last` at the end, in the PEFT library's format.

    Strategies without such a format (full fine-tuning) write none; `ftlit export` makes a model of their run.

    Args:
        monitor: The metric that decides; left as it is, that of the checkpoints, so that `adapter/best` and
            `checkpoints/best.ckpt` are one.
        mode: Whether its smallest (`min`) or its largest (`max`) value is the best; its own direction when left out.
    """

    def __init__(self, monitor: str = DEFAULT, mode: Mode | None = None) -> None:
        self.monitor, self.mode = monitor, mode
        self.best = Best()

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return self.best.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from it."""
        self.best.load_state_dict(state_dict)

    def _save(self, trainer: L.Trainer, stage: Stage, which: str) -> None:
        if stage.strategy.peft_type is None or stage.policy is None:
            return
        name = stage.name_of_policy
        base = str(Path(name).resolve()) if Path(name).exists() else name
        folder = Path(trainer.default_root_dir) / "adapter" / which
        head = getattr(stage.policy, "head", ())
        save_adapter(stage.strategy, stage.policy.lm, folder, base, write=trainer.is_global_zero, head=head)

    def on_fit_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Finds out what decides, once the checkpoints know."""
        asked = self.monitor != DEFAULT or self.mode is not None
        found = monitor_of(trainer, "SaveAdapter", self.monitor, self.mode) if asked else deciding(trainer)
        self.best.begin(found)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Keeps the best."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.best.update(trainer):
            self._save(trainer, pl_module, "best")

    def on_fit_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Keeps the last."""
        self._save(trainer, pl_module, "last")
