"""What a run says of itself: a summary at its start, one at its end, `summary.json`, and the loss curve."""

from __future__ import annotations

import csv
import json
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from ftlit.data.templating import terminal_marks
from ftlit.peft.base import PEFTStrategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftlit.stages.base import Stage

# Floats a token and layer that backward needs, in multiples of the model's width; measured on Llama-like models.
_KEPT_FULL, _KEPT_FROZEN = 19.4, 17.5


class Report(L.Callback):
    """Prints the summaries and writes `summary.json` and `loss.png` into the run folder."""

    def __init__(self) -> None:
        self._began = 0.0
        self._first = 0
        self._tokens = self._targets = 0
        self._busy = self._earlier = 0.0

    def state_dict(self) -> dict[str, float]:
        """What the run did so far, for when it goes on."""
        now = time.perf_counter() - self._began if self._began else 0.0
        seconds = self._earlier + now
        return {"seconds": seconds, "busy": self._busy, "tokens": self._tokens, "targets": self._targets}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Adds to it."""
        self._earlier, self._busy = state_dict["seconds"], state_dict["busy"]
        self._tokens, self._targets = state_dict["tokens"], state_dict["targets"]

    # ---- the start ------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Prints model, strategy, memory, data and one example."""
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule
        assert pl_module.policy is not None
        lm, strategy = pl_module.policy.lm, pl_module.strategy
        trained, changed, total = count(lm, strategy)
        lines = [
            f"model      {pl_module.name_of_policy} ({type(lm).__name__}, {total / 1e6:.1f} M weights, {_dtype(lm)})",
            f"strategy   {type(strategy).__name__}: {trained:,} trained ({trained / total:.2%} of the model), "
            f"{changed:,} of its own weights can change ({changed / total:.1%})",
            f"memory     about {estimate(lm, strategy, data, pl_module.gradient_checkpointing) / 1e9:.1f} GB at most",
            f"run        {trainer.default_root_dir}",
        ]
        if data is not None and hasattr(data, "describe"):
            lines += [f"rows       {line}" for line in data.describe()]
            step = data.batch_size * pl_module.accumulate * trainer.world_size
            lines.append(f"steps      {pl_module.num_steps:,} optimizer steps of {step} examples")
            *marks, meaning = terminal_marks()
            lines += [
                f"example    (trained tokens {meaning})",
                data.rendered(0, *marks, most=1200),
            ]
        print("\n".join(lines), flush=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._began, self._first = time.perf_counter(), trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Starts the clock of the step."""
        self._step_began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts the step."""
        self._busy += time.perf_counter() - self._step_began
        self._tokens += batch.totals.tokens
        self._targets += batch.totals.targets

    # ---- the end --------------------------------------------------------------------------------------------------

    def on_fit_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Prints and writes the summary and draws the curve."""
        if not trainer.is_global_zero:
            return
        if not self._began or trainer.global_step == self._first:
            print(f"nothing was left to train: the run already has its {trainer.global_step} steps", flush=True)
            return
        folder = Path(trainer.default_root_dir)
        assert pl_module.policy is not None
        trained, changed, total = count(pl_module.policy.lm, pl_module.strategy)
        start, end = pl_module.start_metrics, pl_module.last_metrics
        summary = {
            "model": pl_module.name_of_policy,
            "strategy": type(pl_module.strategy).__name__,
            "trained_parameters": trained,
            "changed_parameters": changed,
            "total_parameters": total,
            "optimizer_steps": trainer.global_step,
            "seconds": self._earlier + time.perf_counter() - self._began,
            "seconds_in_steps": self._busy,
            "tokens": self._tokens,
            "trained_tokens": self._targets,
            "tokens_per_s": self._tokens / self._busy if self._busy else 0.0,
            "trained_tokens_per_s": self._targets / self._busy if self._busy else 0.0,
            "peak_memory_bytes": peak_memory(),
            "start": start,
            "end": end,
            "last_step": pl_module.step_metrics,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        lines = [
            f"trained    {trainer.global_step - self._first} steps in {summary['seconds']:.0f} s: "
            f"{summary['tokens_per_s']:.0f} tokens/s, {summary['trained_tokens_per_s']:.0f} trained tokens/s, "
            f"peak memory {summary['peak_memory_bytes'] / 1e9:.1f} GB"
        ]
        for key, value in {**dict.fromkeys(start, None), **end}.items():
            if key.endswith("loss") and value is None:
                lines.append(f"{key:<10} {start[key]:.4f} before training, not measured afterwards")
            elif key.endswith("loss"):
                before = f"{start[key]:.4f} -> " if key in start else ""
                lines.append(f"{key:<10} {before}{value:.4f} nats a trained token")
        for logger in trainer.loggers:
            logger.save()
        curve = draw(folder)
        lines.append(f"kept in    {folder}: summary.json, metrics.csv{', ' + curve.name if curve else ''}, checkpoints")
        print("\n".join(lines), flush=True)


def count(lm: PreTrainedModel, strategy: PEFTStrategy) -> tuple[int, int, int]:
    """Parameters trained, weights of the model that can change, parameters of the model without the adapter."""
    trained = sum(parameter.numel() for parameter in strategy.trained(lm).values())
    every = sum(parameter.numel() for parameter in lm.parameters())
    return trained, strategy.num_changed(lm), every if strategy.trains_base else every - trained


def estimate(lm: PreTrainedModel, strategy: PEFTStrategy, data: Any, checkpointing: bool) -> float:
    """Bytes that training will need at most: weights, gradients, AdamW's two moments, activations, one logits tile."""
    weights = sum(p.numel() * p.element_size() for p in lm.parameters())
    states = sum(p.numel() * p.element_size() * 3 for p in strategy.trained(lm).values())
    config = lm.config
    longest = max((len(e.input_ids) for e in getattr(data, "sets", {}).get("train", [])), default=0)
    tokens = max(
        longest, min(getattr(data, "max_tokens", None) or longest * data.batch_size, longest * data.batch_size)
    )
    kept = 1.0 if checkpointing else (_KEPT_FULL if strategy.trains_base else _KEPT_FROZEN)
    size = next(lm.parameters()).element_size()
    activations = tokens * config.hidden_size * config.num_hidden_layers * kept * size
    return weights + states + activations + 3e8


def peak_memory() -> int:
    """Most memory held so far, bytes: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def draw(folder: Path) -> Path | None:
    """Draws `loss.png` from `metrics.csv`; None without one."""
    table = folder / "metrics.csv"
    if not table.exists():
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    series: dict[str, list[tuple[int, float]]] = {}
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if key.endswith("loss") and value:
                    series.setdefault(key, []).append((int(row["step"]), float(value)))
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for key, points in sorted(series.items()):
        quiet = key == "train/loss"
        axes.plot(*zip(*points, strict=True), label=key, marker=None if quiet else "o", lw=1 if quiet else 2, ms=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a trained token)")
    axes.set_title(folder.name)
    axes.grid(alpha=0.3)
    if series:
        axes.legend()
    figure.tight_layout()
    path = folder / "loss.png"
    figure.savefig(path)
    plt.close(figure)
    return path


def _dtype(lm: PreTrainedModel) -> str:
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in lm.parameters()})
    return " and ".join(kinds)
