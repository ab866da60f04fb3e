"""The value head: what reward a policy expects from here on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ValueHead(nn.Module):
    """A linear layer on the hidden states of the policy; it starts at 0.

    Args:
        width: D, the policy's hidden size.
        detached: Whether its loss leaves the policy alone.
        dtype: Type of its weights: float32 as a rule.
    """

    def __init__(self, width: int, detached: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.detached = detached

    def forward(self, states: Tensor) -> Tensor:
        """The value before each token.

        Args:
            states: Hidden states, `[N, D]`.

        Returns:
            `[N]`, in the type of its weights.
        """
        if self.detached:
            states = states.detach()
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.to(self.weight.dtype), self.weight[None], self.bias)[:, 0]


__all__ = ["ValueHead"]
