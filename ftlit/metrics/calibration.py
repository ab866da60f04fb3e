"""Whether a reward model is as sure as it should be."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ftlit.metrics.intervals import wilson, wins


class Bin(NamedTuple):
    """Pairs of which the model was about equally sure.

    Attributes:
        pairs: How many.
        confidence: Mean probability that the model gave to the answer with the larger reward, in [0.5, 1].
        accuracy: Share of them where that answer is the better one.
        low: Lower end of the 95 % interval of the share.
        high: Its upper end.
    """

    pairs: int
    confidence: float
    accuracy: float
    low: float
    high: float


def reliability(differences: Tensor, bins: int = 10) -> list[Bin]:
    """Sorts pairs into bins of equal width by how sure the model was; bins without a pair are left out.

    Args:
        differences: Reward of the better answer less that of the worse one, `[P]`; the model gives the answer with the
            larger reward the probability `sigmoid(|difference|)`.
        bins: Number of bins over [0.5, 1].
    """
    sure = differences.double().abs().sigmoid()
    right = wins(differences.double())
    place = ((sure - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    found = []
    for number in range(bins):
        inside = place == number
        if count := int(inside.sum()):
            hits = float(right[inside].sum())
            found.append(Bin(count, float(sure[inside].mean()), hits / count, *wilson(hits, count)))
    return found


def calibration_error(differences: Tensor, bins: int = 10) -> float:
    """Mean distance of confidence and accuracy over the bins, weighted by their pairs (Guo et al. 2017, equation 5)."""
    found = reliability(differences, bins)
    return sum(one.pairs * abs(one.confidence - one.accuracy) for one in found) / max(1, len(differences))


def draw_reliability(differences: Tensor, path: str | Path, title: str = "") -> None:
    """Draws accuracy over confidence with intervals, and below how many pairs are in each bin.

    Args:
        differences: As for `reliability`.
        path: The PNG to write.
        title: Title of the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = reliability(differences)
    x = [one.confidence for one in found]
    y = [one.accuracy for one in found]
    ends = [[one.accuracy - one.low for one in found], [one.high - one.accuracy for one in found]]
    figure, (above, below) = plt.subplots(2, 1, figsize=(6, 6.5), dpi=120, sharex=True, height_ratios=[3, 1])
    above.plot([0.5, 1], [0.5, 1], color="0.6", lw=1, ls="--", label="as sure as right")
    above.errorbar(x, y, yerr=ends, marker="o", lw=1.5, capsize=3, label="pairs, 95 % interval")
    above.set_ylabel("share ranked right")
    above.set_ylim(0, 1.02)
    above.legend(loc="lower right")
    above.grid(alpha=0.3)
    error = calibration_error(differences)
    above.set_title(f"{title}\n{len(differences):,} pairs, calibration error {error:.3f}".strip())
    below.bar(x, [one.pairs for one in found], width=0.03, color="0.5")
    below.set_ylabel("pairs")
    below.set_xlabel("probability of the preferred answer, sigmoid(difference of rewards)")
    below.set_xlim(0.49, 1.01)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


__all__ = ["Bin", "calibration_error", "draw_reliability", "reliability"]
