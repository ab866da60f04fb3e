"""Progress: one line that moves on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar


class Progress(ProgressBar):
    """Shows step, loss, speed and time left.

    Args:
        lines: How many lines a run may leave where the output is not a terminal.
    """

    def __init__(self, lines: int = 20) -> None:
        super().__init__()
        self.lines = lines
        self._on = True
        self._began = 0.0
        self._first = 0

    def disable(self) -> None:
        """Lightning calls this on all ranks but the first."""
        self._on = False

    def enable(self) -> None:
        """Shows progress again."""
        self._on = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._began, self._first = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Shows the step."""
        total = getattr(pl_module, "planned_steps", None) or trainer.estimated_stepping_batches
        step = trainer.global_step
        terminal = sys.stdout.isatty()
        every = max(1, int(total) // self.lines)
        if not self._on or not (terminal or step == 1 or step % every == 0 or step == total):
            return
        seconds = time.perf_counter() - self._began
        left = seconds / max(1, step - self._first) * max(0, int(total) - step)
        metrics = getattr(pl_module, "step_metrics", {})
        named = getattr(pl_module, "progress", {"loss": "train/loss"})
        values = "  ".join(f"{name} {metrics[key]:.4f}" for name, key in named.items() if key in metrics)
        line = (
            f"step {step}/{int(total)}  {values}  "
            f"lr {metrics.get('train/lr', 0.0):.2e}  {metrics.get('train/tokens_per_s', 0.0):.0f} tokens/s  "
            f"{_clock(left)} left"
        )
        print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal and step < total else "\n", flush=True)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Counts the batches of `ftlit validate`."""
        if trainer.state.fn == "validate":
            self._count("validated", batch_idx, trainer.num_val_batches[dataloader_idx])

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Counts the batches of `ftlit test`."""
        self._count("tested", batch_idx, trainer.num_test_batches[dataloader_idx])

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Counts the batches of `ftlit predict`."""
        self._count("answered", batch_idx, trainer.num_predict_batches[dataloader_idx])

    def _count(self, done: str, batch_idx: int, total: float) -> None:
        """A line that moves, on a terminal only, and goes away."""
        if self._on and sys.stdout.isatty():
            line = f"{done} {batch_idx + 1}/{int(total)} batches" if batch_idx + 1 < total else ""
            print(f"\r{line}\x1b[K", end="", flush=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Shows what validation found."""
        if not self._on or trainer.state.fn != "fit":
            return
        if trainer.sanity_checking and trainer.ckpt_path:
            return
        values = getattr(pl_module, "start_metrics" if trainer.sanity_checking else "last_metrics", {})
        losses = "  ".join(f"{key} {value:.4f}" for key, value in values.items() if key.endswith("loss"))
        rewards = "  ".join(f"{key} {value:.4f}" for key, value in values.items() if key.endswith(("/reward", "/kl")))
        unit = getattr(pl_module, "loss_unit", "nats a trained token")
        shown = [f"{losses} ({unit})"] if losses else []
        shown += [f"{rewards} (kl: nats an answer)"] if rewards else []
        if shown:
            when = "before training" if trainer.sanity_checking else f"step {trainer.global_step}"
            print(f"{chr(13) if sys.stdout.isatty() else ''}{when}: {'  '.join(shown)}", flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
