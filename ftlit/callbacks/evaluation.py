"""What `ftlit test` and `ftlit validate` say: a table, and a file in the run folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L

from ftlit.callbacks.files import write_whole

_UNITS = {
    "loss": "nats a trained token",
    "accuracy": "share of trained tokens that are the first choice",
    "verifier": "mean score",
    "length": "tokens",
    "end_rate": "share that ended by itself",
    "seconds_per_answer": "s",
}


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
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if key != "step"}
        print("\n".join(table(values)), flush=True)
        path = Path(trainer.default_root_dir) / f"{trainer.state.fn}.json"
        result: dict[str, Any] = {"checkpoint": trainer.ckpt_path, "metrics": finite(values)}
        write_whole(path, json.dumps(result, indent=2) + "\n")
        print(f"kept in    {path}", flush=True)


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """Numbers for JSON, which has no infinity and no not-a-number: None instead."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def table(values: dict[str, float]) -> list[str]:
    """Aligned lines of metrics with what they are measured in; the ends of an interval stand behind its mean."""
    shown = {key: value for key, value in values.items() if not key.endswith(("_low", "_high"))}
    width = max((len(key) for key in shown), default=0)
    lines = []
    for key, value in shown.items():
        note = _UNITS.get(key.rsplit("/", 1)[-1], "")
        if f"{key}_low" in values:
            low, high = values[f"{key}_low"], values[f"{key}_high"]
            note = f"95 % interval {number(low)} to {number(high)}"
        lines.append(f"{key:<{width}}  {number(value):>9}  {note}".rstrip())
    return lines


def number(value: float) -> str:
    """A number with as many digits as one reads."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}" if abs(value) >= 1e6 else f"{value:,.0f}"


__all__ = ["WriteEvaluation", "finite", "number", "table"]
