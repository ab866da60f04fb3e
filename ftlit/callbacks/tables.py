"""Metrics as a person or a JSON reader wants them."""

from __future__ import annotations

import math

_UNITS = {
    "loss": "nats a trained token",
    "accuracy": "share of trained tokens that are the first choice",
    "verifier": "mean score",
    "length": "tokens",
    "end_rate": "share that ended by itself",
    "seconds_per_answer": "s",
}


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """Numbers for JSON, which has no infinity and no not-a-number: None instead."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def table(values: dict[str, float], loss_unit: str = _UNITS["loss"]) -> list[str]:
    """Aligned lines of metrics with what they are measured in; the ends of an interval stand behind its mean.

    Args:
        values: The metrics.
        loss_unit: What the losses are measured in.
    """
    shown = {key: value for key, value in values.items() if not key.endswith(("_low", "_high"))}
    width = max((len(key) for key in shown), default=0)
    lines = []
    for key, value in shown.items():
        note = {**_UNITS, "loss": loss_unit}.get(key.rsplit("/", 1)[-1], "")
        if f"{key}_low" in values:
            low, high = values[f"{key}_low"], values[f"{key}_high"]
            note = f"95 % interval {number(low)} to {number(high)}"
        lines.append(f"{key:<{width}}  {number(value):>9}  {note}".rstrip())
    return lines


def number(value: float | None) -> str:
    """A number with as many digits as one reads; a dash for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}" if abs(value) >= 1e6 else f"{value:,.0f}"


__all__ = ["finite", "number", "table"]
