"""Negative log-likelihood a trained token, over any number of batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenNLL(Metric):
    """Mean NLL (nats a trained token), its perplexity, and the share of tokens that are the model's first choice.

    Sums are kept in float64, so the order and the cut of the batches do not show.

    Args:
        extra: Names of further quantities of each token whose means are wanted, such as `entropy`.
    """

    full_state_update = False
    nll: Tensor
    hits: Tensor
    weight: Tensor

    def __init__(self, extra: Iterable[str] = ()) -> None:
        super().__init__()
        self.extra = tuple(extra)
        self.sums = ("nll", "hits", "weight", *(f"sum_{name}" for name in self.extra))
        for name in self.sums:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> TokenNLL:
        """Follows the model to its device, but not to its precision."""
        device = fn(torch.zeros((), device=self.nll.device)).device
        for name in self.sums:
            setattr(self, name, getattr(self, name).to(device))
        self._device = device
        return self

    def update(self, logps: Tensor, correct: Tensor, weights: Tensor, **extra: Tensor) -> None:
        """Adds some tokens.

        Args:
            logps: Log-probabilities, nats, `[N]`.
            correct: Whether the token was the first choice, bool `[N]`.
            weights: Weight of each token, `[N]`.
            extra: The further quantities, `[N]` each.
        """
        weights = weights.double()
        self.nll -= (logps.detach().double() * weights).sum()
        self.hits += (correct.double() * weights).sum()
        self.weight += weights.sum()
        for name in self.extra:
            total = getattr(self, f"sum_{name}")
            total += (extra[name].detach().double() * weights).sum()

    def compute(self) -> dict[str, Tensor]:
        """`loss` (nats a token), `perplexity`, `accuracy`, and the means of what else is counted."""
        loss = self.nll / self.weight
        means = {name: getattr(self, f"sum_{name}") / self.weight for name in self.extra}
        return {"loss": loss, "perplexity": loss.exp(), "accuracy": self.hits / self.weight, **means}
