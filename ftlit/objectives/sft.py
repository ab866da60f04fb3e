"""Objectives of supervised fine-tuning: the loss of each trained token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from ftlit.errors import ConfigError
from ftlit.objectives.scores import TokenScores


class TokenObjective(ABC):
    """What each trained token contributes to the loss.

    Subclass it in a file of your own and name the class under `model.objective`. The caller multiplies by the targets'
    weights, sums, and divides by the weight of the whole optimizer step.

    Example:
        ```python
        class EntropyBonus(TokenObjective):
            needs = frozenset({"entropy"})

            def __call__(self, scores):
                return -scores.logps - 0.01 * scores.entropy
        ```
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    """Scores it reads besides `logps` and `correct`: `entropy`, `mean_logps`. Each costs a pass over the logits."""

    @abstractmethod
    def __call__(self, scores: TokenScores) -> Tensor:
        """Loss of each token.

        Args:
            scores: Scores of the trained tokens; those in `needs` and `logps` carry gradients.

        Returns:
            Loss of each token, `[N]`.
        """


class CrossEntropy(TokenObjective):
    """Negative log-likelihood, nats."""

    def __call__(self, scores: TokenScores) -> Tensor:
        """`-log p`."""
        return -scores.logps


class LabelSmoothing(TokenObjective):
    """Cross-entropy with a share of each target spread over the whole vocabulary (Szegedy et al. 2016, section 7).

    The same as `label_smoothing` of `torch.nn.functional.cross_entropy`.

    Args:
        epsilon: The share that is spread.

    Raises:
        ConfigError: If it is not in [0, 1).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"mean_logps"})

    def __init__(self, epsilon: float = 0.1) -> None:
        if not 0 <= epsilon < 1:
            raise ConfigError(f"LabelSmoothing's epsilon must be in [0, 1), got {epsilon}.")
        self.epsilon = epsilon

    def __call__(self, scores: TokenScores) -> Tensor:
        """`-(1 - epsilon) log p - epsilon mean_v log p_v`."""
        assert scores.mean_logps is not None
        return -(1 - self.epsilon) * scores.logps - self.epsilon * scores.mean_logps


class DFT(TokenObjective):
    """Dynamic fine-tuning: each token's cross-entropy times its probability, taken as a constant.

    Undoes the weight `1 / p` that the gradient of the likelihood gives to unlikely tokens (Wu et al. 2025,
    arXiv:2508.05629, equation 9).
    """

    def __call__(self, scores: TokenScores) -> Tensor:
        """`-sg(p) log p`."""
        return -scores.logps.detach().exp() * scores.logps


__all__ = ["DFT", "CrossEntropy", "LabelSmoothing", "TokenObjective"]
