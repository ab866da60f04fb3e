"""How well a reward model ranks answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ftlit.metrics.calibration import calibration_error
from ftlit.metrics.intervals import interval, wins
from ftlit.metrics.sums import joined


class RankingMetric(Metric):
    """Collects the rewards of pairs, on all ranks.

    Attributes:
        all_differences: After `compute`: reward of the better answer less that of the worse one, of every pair.
    """

    full_state_update = False
    better: Any
    worse: Any
    losses: Any
    weights: Any
    rows: Any

    def __init__(self) -> None:
        super().__init__()
        for name in ("better", "worse", "losses", "weights", "rows"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.all_differences = torch.zeros(0)

    def update(self, better: Tensor, worse: Tensor, losses: Tensor, weights: Tensor, rows: Tensor) -> None:
        """Adds some pairs; those of weight 0 fill a micro-batch and are left out.

        Args:
            better: Reward of the better answer of each pair, `[P]`.
            worse: Reward of the worse one.
            losses: Loss of each pair, nats.
            weights: Weight of each pair.
            rows: The row that each pair is from, int64.
        """
        real = weights > 0
        for name, values in (("better", better), ("worse", worse), ("losses", losses), ("weights", weights)):
            getattr(self, name).append(values.detach()[real].double())
        self.rows.append(rows[real])

    def compute(self) -> dict[str, Tensor]:
        """What was measured, over the pairs by weight.

        Returns:
            `loss` (nats a pair), `rewards/chosen`, `rewards/rejected`, `margin` (their difference), `calibration_error`
            (see `ftlit.metrics.calibration`), and `accuracy`: the mean over the rows of the share of a row's pairs
            whose better answer has the higher reward (a tie counts one half), with the ends of its 95 % interval over
            the rows.
        """
        names = ("better", "worse", "losses", "weights", "rows")
        better, worse, losses, weights, rows = (joined(getattr(self, name)) for name in names)
        self.all_differences = (better - worse).cpu()
        numbers, places = rows.unique(return_inverse=True)
        hits = torch.zeros(len(numbers), dtype=torch.float64, device=rows.device)
        shares = hits.index_add(0, places, wins(better - worse)) / hits.index_add(0, places, weights.sign())
        low, high = interval(shares.tolist())
        values = {
            "loss": (losses * weights).sum() / weights.sum(),
            "accuracy": shares.mean(),
            "accuracy_low": low,
            "accuracy_high": high,
            "margin": ((better - worse) * weights).sum() / weights.sum(),
            "rewards/chosen": (better * weights).sum() / weights.sum(),
            "rewards/rejected": (worse * weights).sum() / weights.sum(),
            "calibration_error": calibration_error(self.all_differences),
        }
        return {name: torch.as_tensor(value, dtype=torch.float64) for name, value in values.items()}


__all__ = ["RankingMetric"]
