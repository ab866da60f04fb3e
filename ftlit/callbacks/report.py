"""What a run says of itself: a summary at its start, one at its end, `summary.json`, and the curves."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from ftlit.callbacks import forgetting_report
from ftlit.callbacks.adapters import SaveAdapter
from ftlit.callbacks.generation_eval import GenerationEval
from ftlit.callbacks.monitor import Monitor
from ftlit.callbacks.tables import finite, number
from ftlit.data.templating import terminal_marks
from ftlit.device import peak_memory
from ftlit.files import write_text
from ftlit.forgetting.budget import ForgettingBudget
from ftlit.forgetting.probe import ForgettingProbe
from ftlit.models.policy import ignored_loss
from ftlit.peft.base import PEFTStrategy
from ftlit.run_folder import origin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftlit.stages.base import Stage

# Floats a token and layer that backward needs, in multiples of the model's width; measured on Llama-like models.
_KEPT_FULL, _KEPT_FROZEN = 19.4, 17.5

# What the table at the end shows, and what it is measured in.
_SHOWN = {
    "loss": "",
    "auroc": "mean over the labels",
    "exact_match": "share",
    "f1": "mean",
    "rouge_l": "mean",
    "verifier": "mean score",
    "length": "tokens",
    "end_rate": "share that ended by itself",
    "reward": "mean of the greedy answers",
    "kl": "nats an answer, from the start",
    "ended": "share that ended by itself",
}
_DRAWN = ("exact_match", "f1", "rouge_l", "verifier", "reward", "objective/scores")
_SCORES = ("gen/", "val/", "objective/")
_MARKS = "os^Dvp*"


class Report(L.Callback):
    """Prints the summaries and writes `summary.json` and `loss.png` into the run folder."""

    def __init__(self) -> None:
        self._began = 0.0
        self._first: int | None = None
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
        """Starts the clock; prints model, strategy, memory, data and one example."""
        self._began = time.perf_counter()
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
            f"rate       {pl_module.rate_in_words()}",
            *(f"note       {note}" for note in (*strategy.notes(lm), ignored_loss(lm)) if note),
            f"memory     about {estimate(pl_module, data) / 1e9:.1f} GB at most",
            f"run        {trainer.default_root_dir}",
        ]
        if data is not None and hasattr(data, "describe"):
            lines += [f"rows       {line}" for line in data.describe()]
            lines.append(f"steps      {pl_module.steps_in_words(data)}")
            *marks, meaning = terminal_marks()
            lines += [
                f"example    (trained tokens {meaning})",
                data.rendered(0, *marks, most=1200),
            ]
        print("\n".join(lines), flush=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes where the run goes on."""
        self._first = trainer.global_step

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
        """Prints and writes the summary and draws the curves."""
        memory = memory_of_ranks(trainer)
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        if self._first in (None, trainer.global_step) and (folder / "summary.json").exists():
            print(f"nothing was left to train: the run already has its {trainer.global_step} steps", flush=True)
            return
        steps = trainer.global_step - (self._first or 0)
        summary = self._summary(trainer, pl_module, memory)
        write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        for logger in trainer.loggers:
            if hasattr(logger, "log_summary"):
                logger.log_summary(summary)
            logger.save()
        together = f" a rank, {sum(memory) / 1e9:.1f} GB together" if len(memory) > 1 else ""
        lines = [
            f"trained    {steps} steps in {summary['seconds']:.0f} s: "
            f"{summary['tokens_per_s']:.0f} tokens/s, {summary['trained_tokens_per_s']:.0f} trained tokens/s, "
            f"peak memory {max(memory) / 1e9:.1f} GB{together}"
        ]
        if summary["generation_seconds"]:
            share = summary["generation_seconds"] / summary["seconds"]
            lines.append(f"generation {summary['generation_seconds']:.0f} s, {share:.0%} of the run")
        lines += before_and_after(summary["start"], summary["end"], pl_module.loss_unit)
        lines += forgetting_report.learnt_and_lost(summary["start"], summary["end"], pl_module.loss_unit)
        probe = next(iter(_probes(trainer)), None)
        if probe is not None:
            lines += forgetting_report.notes(probe, summary["seconds"])
        lines += _best_line(summary["best"])
        curve = draw(folder, pl_module.loss_unit)
        pictures = [curve] if curve else []
        series, limit = curves(folder / "metrics.csv"), getattr(probe, "limit", None)
        pictures += forgetting_report.draw(folder, series, limit, pl_module.loss_unit)
        lines.append(f"kept in    {folder}: {', '.join(_left_in(folder, pictures))}")
        print("\n".join(lines), flush=True)

    def _summary(self, trainer: L.Trainer, stage: Stage, memory: list[int]) -> dict[str, Any]:
        """What `summary.json` holds."""
        assert stage.policy is not None
        trained, changed, total = count(stage.policy.lm, stage.strategy)
        evals = [callback for callback in trainer.callbacks if isinstance(callback, GenerationEval)]
        start, end = dict(stage.start_metrics), dict(stage.last_metrics)
        measuring: list[GenerationEval | ForgettingProbe] = [*evals, *_probes(trainer)]
        for one in measuring:
            start |= one.start_values
            end |= one.last_values
        for budget in trainer.callbacks:
            end |= budget.last_values if isinstance(budget, ForgettingBudget) else {}
        branch = origin(Path(trainer.default_root_dir))
        return {
            "model": stage.name_of_policy,
            **({"branched_from": branch} if branch else {}),
            "strategy": type(stage.strategy).__name__,
            "trained_parameters": trained,
            "changed_parameters": changed,
            "total_parameters": total,
            "optimizer_steps": trainer.global_step,
            "seconds": self._earlier + time.perf_counter() - self._began,
            "seconds_in_steps": self._busy,
            "generation_seconds": sum(one.seconds for one in evals),
            "forgetting_seconds": sum(one.seconds for one in _probes(trainer)),
            "tokens": self._tokens,
            "trained_tokens": self._targets,
            "tokens_per_s": self._tokens / self._busy if self._busy else 0.0,
            "trained_tokens_per_s": self._targets / self._busy if self._busy else 0.0,
            "peak_memory_bytes": max(memory),
            "peak_memory_bytes_of_ranks": memory,
            "start": finite(start),
            "end": finite(end),
            "best": next((one.best.summary() for one in trainer.callbacks if isinstance(one, SaveAdapter)), None),
            "last_step": finite(stage.step_metrics),
            "weights_moved": {layer: size for probe in _probes(trainer) for layer, size in probe.layers.items()},
        }


def _best_line(best: dict[str, Any] | None) -> list[str]:
    """Which validation was the best, and by what."""
    if best is None:
        return []
    words = Monitor(best["monitor"], best["mode"]).words
    when = "" if best["step"] is None else f" after step {best['step']}"
    return [f"best       {best['monitor']} {number(best['value'])}{when} ({words})"]


def _probes(trainer: L.Trainer) -> list[ForgettingProbe]:
    return [callback for callback in trainer.callbacks if isinstance(callback, ForgettingProbe)]


def count(lm: PreTrainedModel, strategy: PEFTStrategy) -> tuple[int, int, int]:
    """Parameters trained, weights of the model that can change, parameters of the model without the adapter."""
    trained = sum(parameter.numel() for parameter in strategy.trained(lm).values())
    every = sum(parameter.numel() for parameter in lm.parameters())
    return trained, strategy.num_changed(lm), every if strategy.trains_base else every - trained


def estimate(stage: Stage, data: Any) -> float:
    """Bytes that training will need at most: weights, gradients, AdamW's two moments, activations, one logits tile."""
    assert stage.policy is not None
    lm, strategy = stage.policy.lm, stage.strategy
    weights = sum(p.numel() * p.element_size() for p in stage.parameters())
    states = sum(p.numel() * p.element_size() * 3 for p in stage.parameters() if p.requires_grad)
    config = lm.config.get_text_config()
    longest = max((len(e.input_ids) for e in getattr(data, "sets", {}).get("train", [])), default=0)
    longest += stage.drawn_tokens
    tokens = max(
        longest, min(getattr(data, "max_tokens", None) or longest * data.batch_size, longest * data.batch_size)
    )
    kept = 1.0 if stage.gradient_checkpointing else (_KEPT_FULL if strategy.trains_base else _KEPT_FROZEN)
    size = next(lm.parameters()).element_size()
    activations = tokens * config.hidden_size * config.num_hidden_layers * kept * size
    return weights + states + activations + 3e8


def memory_of_ranks(trainer: L.Trainer) -> list[int]:
    """`peak_memory` of the device of every rank; every rank has to ask."""
    peak = peak_memory(trainer.strategy.root_device)
    if trainer.world_size == 1:
        return [peak]
    peaks: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(peaks, peak)
    return peaks


def before_and_after(
    start: dict[str, float | None], end: dict[str, float | None], unit: str = "nats a trained token"
) -> list[str]:
    """A table of what was measured before and after training: the losses and the main scores.

    Args:
        start: Metrics before training.
        end: Metrics after it.
        unit: What the losses are measured in.
    """
    every = dict.fromkeys([*start, *end])
    own = [key for key in every if not key.startswith("forgetting/")]  # those have a table of their own
    keys = [key for key in own if key.rsplit("/", 1)[-1] in _SHOWN or f"{key}_low" in every]
    rows = [("", "before", "after", "")]
    for key in sorted(keys, key=lambda key: key.startswith("gen/")):
        name = key.rsplit("/", 1)[-1]
        note = unit if name == "loss" else _SHOWN.get(name, "")
        if end.get(f"{key}_low") is not None:
            low, high = end[f"{key}_low"], end[f"{key}_high"]
            note = f"95 % interval {number(low)} to {number(high)} afterwards"
        rows.append((key, number(start.get(key)), number(end.get(key)), note))
    if len(rows) == 1:
        return []
    first = max(10, *(len(row[0]) for row in rows))
    return [f"{key:<{first}} {before:>10} {after:>10}  {note}".rstrip() for key, before, after, note in rows]


def draw(folder: Path, unit: str = "nats a trained token") -> Path | None:
    """Draws `loss.png` from `metrics.csv`: the losses, and below them the scores of answers; None without losses.

    Args:
        folder: The run folder.
        unit: What the losses are measured in.
    """
    series = curves(folder / "metrics.csv")
    losses = {key: points for key, points in series.items() if key.endswith("loss")}
    scores = {key: points for key, points in series.items() if key.startswith(_SCORES) and key.endswith(_DRAWN)}
    if not losses:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = 2 if scores else 1
    figure, axes = plt.subplots(panels, 1, figsize=(8, 4.5 * panels), dpi=120, sharex=True, squeeze=False)
    _losses(axes[0, 0], losses)
    axes[0, 0].set_ylabel(f"loss ({unit})")
    axes[0, 0].set_title(folder.absolute().name)
    if scores:
        for key, points in scores.items():
            (line,) = axes[1, 0].plot(*zip(*points, strict=True), marker="o", ms=4, label=key)
            ends = [dict(series.get(f"{key}_{end}", [])) for end in ("low", "high")]
            steps = [step for step, _ in points if step in ends[0] and step in ends[1]]
            if steps:
                low, high = ([end[step] for step in steps] for end in ends)
                axes[1, 0].fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)
        axes[1, 0].set_ylabel("score of the answers")
        axes[1, 0].grid(alpha=0.3)
        axes[1, 0].legend()
    axes[-1, 0].set_xlabel("optimizer step")
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    figure.tight_layout()
    path = folder / "loss.png"
    figure.savefig(path)
    plt.close(figure)
    return path


def _losses(axes: Any, losses: dict[str, list[tuple[int, float]]]) -> None:
    """The training loss thin and grey, with a moving mean where it is long; a colour and a mark each validation set."""
    for key, points in losses.items():
        steps, values = zip(*points, strict=True)
        if key != "train/loss":
            mark = _MARKS[[name for name in losses if name != "train/loss"].index(key) % len(_MARKS)]
            axes.plot(steps, values, marker=mark, lw=2, ms=5, label=key, zorder=3)
            continue
        long = len(values) > 50
        axes.plot(
            steps, values, color="0.75" if long else "0.45", lw=1, label=key, marker="." if len(values) < 3 else None
        )
        if long:
            axes.plot(steps, moving_mean(values, len(values) // 25), color="0.35", lw=1.5, label="train/loss, smoothed")
    axes.grid(alpha=0.3)
    axes.legend()


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the up to `window - 1` before it."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]


def curves(table: Path) -> dict[str, list[tuple[int, float]]]:
    """Finite values of each metric by optimizer step, the training loss first and then as they came."""
    series: dict[str, list[tuple[int, float]]] = {"train/loss": []}
    if table.exists():
        with table.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for key, value in row.items():
                    if key != "step" and value and math.isfinite(float(value)):
                        series.setdefault(key, []).append((int(row["step"]), float(value)))
    return {key: points for key, points in series.items() if points}


def _left_in(folder: Path, pictures: Sequence[Path]) -> list[str]:
    """What a run left behind, as it is."""
    names = ["summary.json", "metrics.csv", *(picture.name for picture in pictures)]
    names += sorted(path.name for name in ("samples*.jsonl", "rollouts.jsonl") for path in folder.glob(name))
    return [*names, *(f"{name}/" for name in ("checkpoints", "adapter") if (folder / name).exists())]


def _dtype(lm: PreTrainedModel) -> str:
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in lm.parameters()})
    return " and ".join(kinds)
