"""Adapter folders beside the checkpoints: what other programs read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L

from ftlit.callbacks.monitor import DEFAULT, Best, deciding, monitor_of
from ftlit.data.padding import classifier_tokenizer
from ftlit.errors import ConfigError
from ftlit.export.beside import filled, write_beside
from ftlit.metrics.directions import Mode
from ftlit.peft.io import save_adapter

if TYPE_CHECKING:
    from ftlit.stages.base import Stage


class SaveAdapter(L.Callback):
    """Writes `adapter/best` whenever validation improves and `adapter/last` at the end, in the PEFT library's format.

    Beside the weights lie the tokenizer with the chat template that was trained with, and the system turn.
    Strategies without such a format (full fine-tuning) write none; `ftlit export` makes a model of their run.

    Args:
        monitor: The metric that decides; left as it is, that of the checkpoints, so that `adapter/best` and
            `checkpoints/best.ckpt` are one.
        mode: Whether its smallest (`min`) or its largest (`max`) value is the best; its own direction when left out.
    """

    def __init__(self, monitor: str = DEFAULT, mode: Mode | None = None) -> None:
        self.monitor, self.mode = monitor, mode
        self.best = Best()
        self._complete: set[str] = set()

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
        if trainer.is_global_zero and which not in self._complete:
            self._complete.add(which)  # what lies beside the weights does not change in a run
            self._write_beside(trainer, stage, folder)

    @staticmethod
    def _write_beside(trainer: L.Trainer, stage: Stage, folder: Path) -> None:
        """Tokenizer, chat template and system turn; a model that was built in Python may have none."""
        assert stage.policy is not None
        try:
            tokenizer = stage.tokenizer
        except ConfigError:
            return
        if getattr(stage.policy, "head", ()):
            tokenizer = classifier_tokenizer(tokenizer, stage.policy.lm.config.get_text_config().pad_token_id)
        data = getattr(trainer, "datamodule", None)
        write_beside(folder, tokenizer, filled(getattr(data, "system", None), getattr(data, "fill", None)))

    def on_fit_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Finds out what decides, once the checkpoints know."""
        self._complete.clear()
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
