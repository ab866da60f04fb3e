"""How well a model tells better answers from worse ones, with intervals over the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ftlit.metrics.intervals import bootstrap, interval, wins
from ftlit.metrics.sums import Sums, joined


class PairMetric(Sums):
    """Sums by name, and the reward margin of every pair, on all ranks.

    Args:
        names: What is added up.
        summary: What is made of the sums in the end.
    """

    margins: Any
    weights: Any
    rows: Any

    def __init__(self, names: Sequence[str], summary: Callable[[dict[str, float]], dict[str, float]]) -> None:
        super().__init__(names, summary)
        for name in ("margins", "weights", "rows"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def add(self, values: Mapping[str, Tensor], margins: Tensor, weights: Tensor, rows: Tensor) -> None:
        """Adds a micro-batch.

        Args:
            values: One number of each name.
            margins: Reward margins of its pairs, `[P]`.
            weights: Their weights, `[P]`; those of weight 0 fill a micro-batch.
            rows: The row that each is from, int64 `[P]`.
        """
        self.update(values)
        real = weights > 0
        self.margins.append(margins.detach()[real].double())
        self.weights.append(weights[real].double())
        self.rows.append(rows[real])

    @override
    def compute(self) -> dict[str, Tensor]:
        """What `summary` makes of the sums, and where there are pairs the ends of two 95 % intervals over the rows.

        Of `rewards/margins` it is a bootstrap, of `rewards/accuracies` Wilson's where each row is one pair and all have
        the same weight.
        """
        found = super().compute()
        margins, weights, rows = (joined(getattr(self, name)) for name in ("margins", "weights", "rows"))
        if not len(margins):
            return found
        numbers, places = rows.unique(return_inverse=True)
        sums = torch.zeros(3, len(numbers), dtype=torch.float64, device=rows.device)
        sums.index_add_(1, places, torch.stack([margins * weights, wins(margins) * weights, weights]))
        means, shares = (sums[:2] / sums[2]).tolist(), sums[2].tolist()
        ends = bootstrap(means[0], shares), interval(means[1], shares)
        for name, (low, high) in zip(("margins", "accuracies"), ends, strict=True):
            found |= {
                f"rewards/{name}_low": torch.tensor(low, dtype=torch.float64),
                f"rewards/{name}_high": torch.tensor(high, dtype=torch.float64),
            }
        return found


__all__ = ["PairMetric"]
