"""How well scores are met: squared error, and how they go together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ftlit.metrics.sums import joined


class RegressionMetric(Metric):
    """Collects the scores of a model and those of the rows, on all ranks; row weights count in the loss only."""

    full_state_update = False
    scores: Any
    wanted: Any
    losses: Any
    weights: Any

    def __init__(self) -> None:
        super().__init__()
        for name in ("scores", "wanted", "losses", "weights"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, wanted: Tensor, losses: Tensor, weights: Tensor) -> None:
        """Adds some rows; those of weight 0 fill a micro-batch and are left out.

        Args:
            scores: What the model says, `[N, 1]`.
            wanted: The score of each row, `[N]`.
            losses: Squared error of each row, `[N]`.
            weights: Weight of each row, `[N]`.
        """
        real = weights > 0
        for name, values in (("scores", scores[:, 0]), ("wanted", wanted), ("losses", losses), ("weights", weights)):
            getattr(self, name).append(values.detach()[real].double())

    def compute(self) -> dict[str, Tensor]:
        """`loss` (mean squared error), `pearson` and `spearman`: the correlations of scores and of their ranks.

        A correlation is NaN where the scores of the rows, or those of the model, are all equal.
        """
        scores, wanted, losses, weights = (joined(getattr(self, n)) for n in ("scores", "wanted", "losses", "weights"))
        return {
            "loss": (losses * weights).sum() / weights.sum(),
            "pearson": correlation(scores, wanted),
            "spearman": correlation(ranks(scores), ranks(wanted)),
        }


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of two rows of numbers, `[N]` each; NaN where one of them does not vary."""
    one, two = first - first.mean(), second - second.mean()
    scale = one.square().sum().sqrt() * two.square().sum().sqrt()
    return (one * two).sum() / scale if scale > 0 else torch.full_like(scale, torch.nan)


def ranks(values: Tensor) -> Tensor:
    """The rank of each of some numbers, from 1; equal ones share the mean of theirs."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).to(values.dtype)
    return (last - (count.to(values.dtype) - 1) / 2)[place]


__all__ = ["RegressionMetric", "correlation", "ranks"]
