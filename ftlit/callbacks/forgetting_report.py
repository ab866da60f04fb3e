"""What a run learnt and what it lost, as a table and two pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftlit.forgetting.drift import OUTSIDE, Drift
from ftlit.forgetting.probe import TARGET, ForgettingProbe

_PREFIX = "forgetting/"
NLL = "nats a trained token"
_HEADER = ("", "before", "after", "change", "95 % interval", "perplexity", "same choice", "KL", "")
Values = Mapping[str, float | None]
Series = Mapping[str, Sequence[tuple[int, float]]]


def domains_of(values: Iterable[str]) -> list[str]:
    """Names of the sets that a probe measured, the target rows first.

    Args:
        values: Names of metrics.
    """
    names = [key.split("/")[1] for key in values if key.startswith(_PREFIX) and key.endswith("/nll")]
    return sorted(names, key=lambda name: name != TARGET)


def learnt_and_lost(start: Values, end: Values, unit: str = NLL) -> list[str]:
    """The table at the end of a run; no line where nothing was measured.

    Args:
        start: What was measured before training.
        end: What was measured last.
        unit: What the target's loss is measured in; where that is not the likelihood of the rows, nothing is said of
            how well these are learnt.
    """
    names = [name for name in domains_of(end) if start.get(f"{_PREFIX}{name}/nll") is not None]
    if not names:
        return []
    rows = [_HEADER, *(_row(name, start, end, unit) for name in names)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(_HEADER))]
    lines = ["what was learnt and what was lost (nats a token; interval over documents)"]
    for row in rows:
        name, *numbers, verdict = row
        cells = [f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=False)]
        lines.append(f"{name:<{max(10, widths[0])}} {'  '.join(cells)}  {verdict}".rstrip())
    fell = [row[0] for row in rows[1:] if row[-1] == "loss fell"]
    if fell and not any(row[-1] == "forgotten" for row in rows):
        lines.append(
            f"note       {', '.join(fell)}: a lower loss does not mean that nothing was lost; KL and `same choice` say "
            "how much the model has changed there, and a domain `self` (its own text) what it has lost."
        )
    return lines


def _row(name: str, start: Values, end: Values, unit: str) -> tuple[str, ...]:
    def of(values: Values, key: str) -> float:
        value = values.get(f"{_PREFIX}{name}/{key}")
        return math.nan if value is None else value

    change, low, high = (of(end, key) for key in ("change", "change_low", "change_high"))
    kl = of(end, "kl")
    return (
        "the target" if name == TARGET else name,
        f"{of(start, 'nll'):.4f}",
        f"{of(end, 'nll'):.4f}",
        f"{change:+.4f}",
        "-" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}",  # one document has no interval
        f"x {of(end, 'ppl_ratio'):.3f}",
        f"{of(end, 'agreement'):.1%}",
        "-" if math.isnan(kl) else f"{kl:.4f}",
        verdict(low, high, learnt=name == TARGET) if name != TARGET or unit == NLL else "",
    )


def verdict(low: float, high: float, learnt: bool = False) -> str:
    """The interval of a change of the loss in a word.

    Args:
        low: Its lower end.
        high: Its upper end.
        learnt: Whether the rows are those of the target.
    """
    if low > 0:
        return "worse" if learnt else "forgotten"
    if high < 0:
        return "learnt" if learnt else "loss fell"
    return "no change seen"


def notes(probe: ForgettingProbe, seconds: float) -> list[str]:
    """Lines on the weights and on the cost of measuring.

    Args:
        probe: The probe.
        seconds: Length of the run.
    """
    lines = [] if probe.drift is None else [f"weights    {_moved(probe.drift)}"]
    kl = probe.last_values.get(f"{_PREFIX}{TARGET}/kl")
    if kl is not None and f"{_PREFIX}{TARGET}/nll" not in probe.last_values:
        lines.append(f"target     on its held-out prompts {kl:.4f} nats a token from the start (KL)")
    share = probe.seconds / seconds if seconds else 0.0
    lines.append(f"probe      measured {probe.rounds} times in {probe.seconds:.0f} s, {share:.0%} of the run")
    return lines


def _moved(drift: Drift) -> str:
    layers = {layer: size for layer, size in drift.layers.items() if layer != OUTSIDE}
    text = f"moved by {drift.overall:.2%} of their size"
    if layers:
        most = max(layers, key=lambda layer: layers[layer])
        text += f", most in layer {most} ({layers[most]:.2%})"
    return text


# ---- pictures -------------------------------------------------------------------------------------------------------


def draw(folder: Path, series: Series, limit: float | None = None, unit: str = NLL) -> list[Path]:
    """Draws `forgetting.png` and `learn_forget.png`; none without measurements.

    Args:
        folder: The run folder.
        series: Values of each metric by optimizer step.
        limit: The change that is allowed, nats a token.
        unit: What the target's loss is measured in.
    """
    domains = {name: f"{_PREFIX}{name}/change" for name in domains_of(series) if name != TARGET}
    if not any(len(series.get(key, ())) > 1 for key in domains.values()):
        return []
    import matplotlib

    matplotlib.use("Agg")
    drawn = [_draw_changes(folder, series, domains, limit)]
    learnt, words = _learnt(series, unit)
    if len(learnt.keys() & dict(series.get(f"{_PREFIX}worst/change", ())).keys()) > 1:
        drawn.append(_draw_plane(folder, series, learnt, limit, words))
    return drawn


def _draw_changes(folder: Path, series: Series, domains: Mapping[str, str], limit: float | None) -> Path:
    """Each domain's change over the steps, with its interval."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for mark, (name, key) in zip("os^Dvp*" * len(domains), domains.items(), strict=False):
        steps, values = zip(*series[key], strict=True)
        (line,) = axes.plot(steps, values, marker=mark, ms=5, lw=2, label=name, zorder=3)
        band = _band(series, key)
        if band:
            where, low, high = zip(*band, strict=True)
            axes.fill_between(where, low, high, color=line.get_color(), alpha=0.18, lw=0)
    _forgetting_axis(axes, limit)
    axes.set_title(f"{folder.absolute().name}: what is forgotten while it learns (above 0: forgotten)")
    axes.set_xlabel("optimizer step (bands: 95 % intervals over documents)")
    axes.locator_params(axis="x", integer=True)
    axes.legend(loc="best")
    return _saved(figure, folder / "forgetting.png")


def _learnt(series: Series, unit: str) -> tuple[dict[int, float], str]:
    """By how much the target's loss had fallen, or its reward had risen, by optimizer step; and that in words."""
    words = f"loss of the target's held-out rows fell by ({unit})"
    change = series.get(f"{_PREFIX}{TARGET}/change")
    if unit == NLL and change:
        return {step: -value for step, value in change}, words
    sign, ends = (1, "/reward") if unit == NLL else (-1, "/loss")
    # The shortest is that of the main set.
    name = min((key for key in series if key.startswith("val/") and key.endswith(ends)), key=len, default="")
    points = dict(series.get(name, ()))
    if sign > 0:
        words = "reward of the held-out prompts rose by"
    return {step: sign * (value - points[0]) for step, value in points.items()} if 0 in points else {}, words


def _draw_plane(folder: Path, series: Series, learnt: Mapping[int, float], limit: float | None, words: str) -> Path:
    """What was learnt against what was lost, one mark a measurement."""
    from matplotlib import pyplot as plt

    worst = dict(series[f"{_PREFIX}worst/change"])
    band = {step: (low, high) for step, low, high in _band(series, f"{_PREFIX}worst/change")}
    steps = sorted(learnt.keys() & worst.keys())
    x, y = [learnt[step] for step in steps], [worst[step] for step in steps]
    below = [worst[step] - band.get(step, (worst[step],))[0] for step in steps]
    above = [band.get(step, (worst[step],))[-1] - worst[step] for step in steps]
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    axes.errorbar(
        x, y, yerr=[below, above], color="tab:blue", ecolor="0.65", marker="o", ms=6, lw=1.2, elinewidth=1, capsize=2
    )
    for place in _apart(x, y):
        name = "start" if steps[place] == 0 else f"step {steps[place]}"
        axes.annotate(name, (x[place], y[place]), xytext=(8, 6), textcoords="offset points", fontsize=9)
    _forgetting_axis(axes, limit)
    if limit is not None:
        axes.legend(loc="best")
    axes.axvline(0, color="0.4", lw=0.8)
    axes.margins(x=0.14, y=0.08)
    axes.set_title(f"{folder.absolute().name}: learnt against forgotten (best: far right, not above 0)")
    axes.set_xlabel(f"learnt: {words}")
    axes.set_ylabel("forgotten: loss of the worst\ndomain rose by (nats a token)")
    return _saved(figure, folder / "learn_forget.png")


def _apart(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Which marks get a name: the last, the first, and of the others those that lie apart from named ones."""
    wide, high = (max(max(values) - min(values), 1e-12) for values in (x, y))
    named: list[int] = []
    for place in dict.fromkeys([len(x) - 1, 0, *range(len(x))]):
        near = (abs(x[place] - x[one]) < 0.13 * wide and abs(y[place] - y[one]) < 0.07 * high for one in named)
        if not any(near):
            named.append(place)
    return named


def _band(series: Series, key: str) -> list[tuple[int, float, float]]:
    """Step, lower and upper end, where both are known."""
    low, high = (dict(series.get(f"{key}_{end}", [])) for end in ("low", "high"))
    return [(step, low[step], high[step]) for step in sorted(low.keys() & high.keys())]


def _forgetting_axis(axes: Any, limit: float | None) -> None:
    """Nats on the left, the same as a change of perplexity on the right, lines at zero and at the limit."""
    axes.axhline(0, color="0.4", lw=0.8)
    if limit is not None:
        name = f"budget: +{limit:.4f} nats, perplexity {math.expm1(limit):+.1%}"
        axes.axhline(limit, color="tab:red", lw=1.5, ls="--", label=name)
    axes.set_ylabel("change of the loss (nats a token)")
    axes.grid(alpha=0.3)
    right = axes.secondary_yaxis("right", functions=(_percent, _nats))
    right.set_ylabel("change of perplexity (%)")


def _percent(nats: Any) -> Any:
    import numpy as np

    return 100 * np.expm1(np.clip(nats, None, 50))


def _nats(percent: Any) -> Any:
    import numpy as np

    return np.log1p(np.maximum(percent, -99.999) / 100)


def _saved(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return path


__all__ = ["domains_of", "draw", "learnt_and_lost", "notes", "verdict"]
