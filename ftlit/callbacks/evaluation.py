"""What `ftlit test` and `ftlit validate` say: a table, and a file in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L

from ftlit.callbacks.tables import finite, table
from ftlit.files import write_text


class WriteEvaluation(L.Callback):
    """Prints what was measured and writes it to `test.json` (`validate.json`) in the run folder."""

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the last number is known."""
        self._finish(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same for `ftlit validate`."""
        if trainer.state.fn == "validate":
            self._finish(trainer)

    @staticmethod
    def _finish(trainer: L.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        measured = {key: float(value) for key, value in trainer.callback_metrics.items() if key != "step"}
        values = dict(sorted(measured.items(), key=lambda item: item[0].startswith("gen/")))  # losses first
        stage: Any = trainer.lightning_module
        print("\n".join(table(values, stage.loss_unit)), flush=True)
        assert trainer.state.fn is not None
        path = Path(trainer.default_root_dir) / f"{trainer.state.fn.value}.json"
        result: dict[str, Any] = {"checkpoint": trainer.ckpt_path, "metrics": finite(values)}
        write_text(path, json.dumps(result, indent=2) + "\n")
        print(f"kept in    {path}", flush=True)


__all__ = ["WriteEvaluation"]
