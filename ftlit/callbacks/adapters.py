"""Adapter folders beside the checkpoints: what other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
from typing_extensions import override

from ftlit.callbacks.monitor import DEFAULT, watched
from ftlit.peft.io import save_adapter

if TYPE_CHECKING:
    from ftlit.stages.base import Stage


class SaveAdapter(L.Callback):
    """Writes `adapter/best` whenever validation improves and `adapter/last` at the end, in the PEFT library's format.

    Strategies without such a format (full fine-tuning) write none; `ftlit export` makes a model of their run.

    Args:
        monitor: Validation metric, smaller is better.
    """

    def __init__(self, monitor: str = DEFAULT) -> None:
        self.monitor = monitor
        self.best: float | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.monitor = watched(trainer, self.monitor) or self.monitor

    def state_dict(self) -> dict[str, float | None]:
        """The best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, float | None]) -> None:
        """Goes on from it."""
        self.best = state_dict["best"]

    def _save(self, trainer: L.Trainer, stage: Stage, which: str) -> None:
        if stage.strategy.peft_type is None or stage.policy is None:
            return
        name = stage.name_of_policy
        base = str(Path(name).resolve()) if Path(name).exists() else name
        folder = Path(trainer.default_root_dir) / "adapter" / which
        head = getattr(stage.policy, "head", ())
        save_adapter(stage.strategy, stage.policy.lm, folder, base, write=trainer.is_global_zero, head=head)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Keeps the best."""
        value = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking or trainer.state.fn != "fit" or value is None:
            return
        if self.best is None or value.item() < self.best:
            self.best = value.item()
            self._save(trainer, pl_module, "best")

    def on_fit_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Keeps the last."""
        self._save(trainer, pl_module, "last")
