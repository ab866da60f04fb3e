"""Finished runs side by side: what each learnt and what it lost, and what a row of tasks did to one another."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ftlit.callbacks.forgetting_report import domains_of
from ftlit.errors import ConfigError, nearest
from ftlit.forgetting.probe import TARGET
from ftlit.metrics.forgetting import task_sequence

_LEARNT = ("/loss", "/reward")
WORST = "worst"
APART = 0.01
"""From how far the same loss, measured in two runs, is said to differ, nats a token; of rewards the share."""


class Finished(NamedTuple):
    """A run that is over.

    Attributes:
        label: What it is called.
        start: What was measured before its first step.
        end: What was measured last.
        seconds: How long it took.
    """

    label: str
    start: dict[str, float]
    end: dict[str, float]
    seconds: float

    def change(self, domain: str) -> tuple[float, float, float]:
        """The change of NLL on a domain and its 95 % interval, nats a token; NaN where it was not measured."""
        keys = (f"forgetting/{domain}/{key}" for key in ("change", "change_low", "change_high"))
        change, low, high = (self.end.get(key, math.nan) for key in keys)
        return change, low, high

    @property
    def domains(self) -> list[str]:
        """What was not to be forgotten."""
        known = domains_of(self.end)
        return [name for name in known if name != TARGET and f"forgetting/{name}/nll" in self.start]

    @property
    def budget(self) -> dict[str, float]:
        """How its budget ended, under the last part of each name; empty where it had none."""
        prefix = next((key.removesuffix("verdict") for key in self.end if key.endswith("/verdict")), None)
        if prefix is None:
            return {}
        return {key.removeprefix(prefix): value for key, value in self.end.items() if key.startswith(prefix)}


def read(folders: Sequence[str], labels: Sequence[str] | None = None) -> list[Finished]:
    """Finished runs.

    Args:
        folders: Their folders.
        labels: What they are called; the names of the folders when left out.

    Raises:
        ConfigError: If a folder holds no finished run, or there are not as many labels as runs.
    """
    if labels and len(labels) != len(folders):
        raise ConfigError(f"--labels: {len(labels)} for {len(folders)} runs; give one for each.")
    found = []
    for number, folder in enumerate(folders):
        path = Path(folder, "summary.json")
        if not Path(folder).is_dir():
            raise ConfigError(f"{folder} does not exist; give the folder of a run.")
        if not path.is_file():
            raise ConfigError(f"{folder} holds no summary.json, which a run writes at its end; give finished runs.")
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            start, end = (
                {key: value for key, value in summary[side].items() if value is not None} for side in ("start", "end")
            )
            name = labels[number] if labels else Path(folder).resolve().name
            found.append(Finished(name, start, end, summary["seconds"]))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{path} is not a summary that ftlit wrote ({error}).") from None
    return found


# ---- side by side ---------------------------------------------------------------------------------------------------


def learnt_key(runs: Sequence[Finished]) -> str:
    """The metric that says what was learnt: the first of the validation losses, or rewards, that all runs have.

    Args:
        runs: The runs.

    Raises:
        ConfigError: If they have none in common.
    """
    for key in runs[0].end:
        known = all(key in side for run in runs for side in (run.start, run.end))
        if key.startswith("val/") and key.endswith(_LEARNT) and known:
            return key
    raise ConfigError("These runs have no validation loss or reward in common; train them with data.validation.")


def side_by_side(runs: Sequence[Finished]) -> list[str]:
    """A table: what each run learnt, what it lost on every domain, how its budget ended, how long it took.

    Args:
        runs: The runs.

    Raises:
        ConfigError: If they measured nothing in common.
    """
    key = learnt_key(runs)
    domains = list(dict.fromkeys(name for run in runs for name in run.domains))
    budgets = any(run.budget for run in runs)
    header = ["", "before", "after", *domains, *(["budget"] if budgets else []), "time"]
    rows = [header]
    for run in runs:
        lost = [_percent(run.change(name)) for name in domains]
        held = [_verdict(run.budget)] if budgets else []
        numbers = [f"{side[key]:.4f}" for side in (run.start, run.end)]
        rows.append([run.label, *numbers, *lost, *held, f"{run.seconds:.0f} s"])
    what = f"{key}, and the change of perplexity with its 95 % interval on {', '.join(domains)}" if domains else key
    if budgets:
        what += "; of a budget on texts that steered nothing, how far the weights went, and what that kept of the gain"
    return [what, *_aligned(rows), *_unlike(runs, key)]


def _verdict(budget: dict[str, float]) -> str:
    if not budget:
        return "-"
    met = "met" if budget["met"] else "NOT met"
    kept = f", kept {budget['kept']:.0%}" if "kept" in budget else ", nothing learnt" if "gain" in budget else ""
    return f"{met}, {math.expm1(budget['verdict']):+.1%}, alpha {budget['alpha']:.2f}{kept}"


def _percent(change: tuple[float, float, float]) -> str:
    if math.isnan(change[0]):
        return "-"
    middle, low, high = (math.expm1(value) for value in change)
    return f"{middle:+.1%} [{low:+.1%}, {high:+.1%}]"


def _unlike(runs: Sequence[Finished], key: str) -> list[str]:
    """Lines on runs that did not begin where the first did."""
    first = runs[0]
    found = []
    for run in runs[1:]:
        for name in (key, *(f"forgetting/{domain}/nll" for domain in run.domains)):
            ours, theirs = first.start.get(name, math.nan), run.start.get(name, math.nan)
            if abs(ours - theirs) > (APART if name.endswith(("/loss", "/nll")) else APART * abs(ours)):
                found.append(
                    f"note       {run.label} began with {name} {theirs:.4f}, {first.label} with {ours:.4f}: other "
                    "rows, or another model, and not to be compared."
                )
    return found


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        numbers = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        lines.append(f"{name:<{widths[0]}}  {'  '.join(numbers)}".rstrip())
    return lines


def draw(runs: Sequence[Finished], path: str | Path) -> None:
    """Draws where each run ended: what it learnt to the right, what it lost upwards.

    Args:
        runs: The runs, with a probe.
        path: The picture.

    Raises:
        ConfigError: If the forgetting of one was not measured.
    """
    for run in runs:
        if math.isnan(run.change(WORST)[0]):
            raise ConfigError(f"--picture: {run.label} had no ForgettingProbe, so what it lost is not known.")
    key = learnt_key(runs)
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    axes.axhline(0, color="0.4", lw=0.8)
    axes.plot(0, 0, "o", color="black", label="before training")
    for limit in sorted({run.budget["limit"] for run in runs if "limit" in run.budget}):
        percent = 100 * math.expm1(limit)
        axes.axhline(percent, color="tab:red", ls="--", lw=1, label=f"budget: +{percent:.3g} %")
    sign = 1 if key.endswith("reward") else -1
    for number, run in enumerate(runs):
        learnt = sign * (run.end[key] - run.start[key])
        lost, low, high = (100 * math.expm1(value) for value in run.change(WORST))
        colour = f"C{number}"
        error = [[max(lost - low, 0)], [max(high - lost, 0)]]
        axes.errorbar(learnt, lost, yerr=error, fmt="o", capsize=4, color=colour, label=run.label)
        axes.annotate("", (learnt, lost), (0, 0), arrowprops={"arrowstyle": "->", "color": colour, "alpha": 0.5})
    axes.set_xlabel(f"learnt: {key} {'rose' if sign > 0 else 'fell'} by")
    axes.set_ylabel("lost: rise of the perplexity on\nthe worst domain, % (95 % interval)")
    axes.set_title("What was learnt and what was lost (best: far right, not above 0)")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:  # an ending that is no format of pictures
        raise ConfigError(f"--picture {path}: {error}.") from None
    finally:
        plt.close(figure)


# ---- one after the other --------------------------------------------------------------------------------------------


def in_sequence(runs: Sequence[Finished], tasks: Sequence[str]) -> list[str]:
    """Runs that each went on where the last one ended: the loss of every task after each, ACC, BWT, FWT, Forgetting.

    Args:
        runs: In the order in which they were trained; each with a probe that has the held-out rows of all tasks.
        tasks: The names of those domains, in the order in which they were learnt.

    Raises:
        ConfigError: If there are not as many tasks as runs, or one was not measured.
    """
    if len(tasks) != len(runs):
        raise ConfigError(f"--tasks: {len(tasks)} for {len(runs)} runs; give the task of each run, in their order.")
    for run in runs:
        for task in tasks:
            if task not in run.domains:
                raise ConfigError(
                    f"--tasks: {run.label} did not measure {task!r}: {nearest(task, run.domains)}"
                    if run.domains
                    else f"--tasks: {run.label} had no ForgettingProbe; give each run one with all tasks as domains."
                )
    sides = [("before", runs[0].start), *((f"after {run.label}", run.end) for run in runs)]
    losses = [(label, [side[f"forgetting/{task}/nll"] for task in tasks]) for label, side in sides]
    start, *table = [row for _, row in losses]
    rows = [["", *tasks], *([label, *map("{:.4f}".format, row)] for label, row in losses)]
    found = task_sequence(table, start, lower_is_better=True)
    first = task_sequence(table, start, lower_is_better=True, reference="first")
    lines = ["loss of each task after each run (nats a token)", *_aligned(rows)]
    for name, value, words in (
        ("ACC", -found.acc, "mean loss of all tasks at the end"),
        ("BWT", found.bwt, "what later tasks did to earlier ones (below 0: these were forgotten)"),
        ("FWT", found.fwt, "what earlier tasks did for later ones before these were learnt (above 0: helped)"),
        ("Forgetting", found.forgetting, f"rise above the lowest before; {first.forgetting:+.4f} since just learnt"),
    ):
        lines.append(f"{name:<11}{value:+.4f}  {words}" if not math.isnan(value) else f"{name:<11}-")
    for before, after in itertools.pairwise(runs):
        apart = {task: after.start[f"forgetting/{task}/nll"] - before.end[f"forgetting/{task}/nll"] for task in tasks}
        worst = max(apart, key=lambda task: abs(apart[task]))
        if abs(apart[worst]) > APART:
            lines.append(
                f"note       {after.label} did not begin where {before.label} ended: its loss of {worst} differs by "
                f"{apart[worst]:+.4f}."
            )
    return lines


__all__ = ["Finished", "draw", "in_sequence", "learnt_key", "read", "side_by_side"]
