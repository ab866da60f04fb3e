"""Sums over any number of batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Sums(Metric):
    """Adds numbers up by name, in float64, so that the order and the cut of the batches do not show.

    Args:
        names: What is added up.
        summary: What is made of the sums in the end.
    """

    full_state_update = False
    sums: Tensor

    def __init__(self, names: Sequence[str], summary: Callable[[dict[str, float]], dict[str, float]]) -> None:
        super().__init__()
        self.names, self.summary = tuple(names), summary
        self.add_state("sums", torch.zeros(len(self.names), dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Sums:
        """Follows the model to its device, but not to its precision."""
        self._device = fn(torch.zeros((), device=self.sums.device)).device
        self.sums = self.sums.to(self._device)
        return self

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Adds one number of each name."""
        self.sums += torch.stack([values[name].detach().double() for name in self.names])

    def compute(self) -> dict[str, Tensor]:
        """What `summary` makes of the sums."""
        found = self.summary(dict(zip(self.names, self.sums.tolist(), strict=True)))
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}


def joined(parts: Any) -> Tensor:
    """A metric's list of tensors, or what the ranks made of it, as one tensor; empty where nothing was added."""
    if isinstance(parts, Tensor):
        return parts
    return torch.cat(list(parts)) if parts else torch.zeros(0)


__all__ = ["Sums", "joined"]
