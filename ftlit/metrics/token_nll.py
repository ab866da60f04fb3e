"""Negative log-likelihood a trained token, over any number of batches and ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenNLL(Metric):
    """Mean NLL (nats a trained token), its perplexity, and the share of tokens that are the model's first choice.

    Sums are kept in float64, so the order and the cut of the batches do not show.
    """

    full_state_update = False
    nll: Tensor
    hits: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nll", "hits", "weight"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> TokenNLL:
        """Follows the model to its device, but not to its precision."""
        device = fn(torch.zeros((), device=self.nll.device)).device
        for name in ("nll", "hits", "weight"):
            setattr(self, name, getattr(self, name).to(device))
        self._device = device
        return self

    def update(self, logps: Tensor, correct: Tensor, weights: Tensor) -> None:
        """Adds some tokens.

        Args:
            logps: Log-probabilities, nats, `[N]`.
            correct: Whether the token was the first choice, bool `[N]`.
            weights: Weight of each token, `[N]`.
        """
        weights = weights.double()
        self.nll -= (logps.detach().double() * weights).sum()
        self.hits += (correct.double() * weights).sum()
        self.weight += weights.sum()

    def compute(self) -> dict[str, Tensor]:
        """`loss` (nats a token), `perplexity`, `accuracy`."""
        loss = self.nll / self.weight
        return {"loss": loss, "perplexity": loss.exp(), "accuracy": self.hits / self.weight}
