"""Objectives of supervised fine-tuning."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class TokenObjective(ABC):
    """What each trained token contributes to the loss.

    Subclass it in a file of your own and name the class under `model.objective`. The caller multiplies by the targets'
    weights, sums, and divides by the weight of the whole optimizer step.
    """

    @abstractmethod
    def __call__(self, logps: Tensor) -> Tensor:
        """Loss of each token.

        Args:
            logps: Log-probability of each trained token, nats, `[N]`.

        Returns:
            Loss of each token, `[N]`.
        """


class CrossEntropy(TokenObjective):
    """Negative log-likelihood, nats."""

    def __call__(self, logps: Tensor) -> Tensor:
        """`-logps`."""
        return -logps
