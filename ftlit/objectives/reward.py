"""Objectives of reward models: what each comparison of two answers contributes to the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ftlit.errors import ConfigError


class RewardScores(NamedTuple):
    """Rewards of some answers, and which answer is better than which.

    Shape legend: A answers, P pairs.

    Attributes:
        rewards: Of each answer, `[A]`.
        better: The better answer of each pair, int64 `[P]`.
        worse: The worse one.
        margins: By how much the better one is better, `[P]`; 0 where nobody said.
    """

    rewards: Tensor
    better: Tensor
    worse: Tensor
    margins: Tensor

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Rewards of the better and of the worse answer of each pair, `[P]` each."""
        return self.rewards.index_select(0, self.better), self.rewards.index_select(0, self.worse)


class RewardLoss(ABC):
    """Loss of each pair of answers.

    Subclass it in a file of your own and name the class under `model.objective`. The caller multiplies by the weights
    of the pairs, sums, and divides by the weight of all pairs of the optimizer step.

    Args:
        center: Factor on the square of the sum of a pair's two rewards, which pulls rewards toward a mean of 0 without
            touching their differences (Eisenstein et al. 2023, arXiv:2312.09244, section 3.3; they use 0.01).

    Raises:
        ConfigError: If it is negative.
    """

    def __init__(self, center: float = 0.0) -> None:
        if not 0 <= center < float("inf"):
            raise ConfigError(f"{type(self).__name__}.center must be a number of at least 0, got {center}.")
        self.center = center

    @abstractmethod
    def compare(self, scores: RewardScores) -> Tensor:
        """Loss of each pair without centring, nats, `[P]`."""

    def __call__(self, scores: RewardScores) -> Tensor:
        """Loss of each pair, `[P]`."""
        losses = self.compare(scores)
        if not self.center:
            return losses
        better, worse = scores.sides
        return losses + self.center * (better + worse).square()


class BradleyTerry(RewardLoss):
    """Each pair on its own: `-log sigmoid(better - worse - margin)` (Bradley and Terry 1952, doi:10.2307/2334029).

    Margins as in Touvron et al. 2023, arXiv:2307.09288, equation 2. Of a ranking every pair counts, as in Ouyang et al.
    2022, arXiv:2203.02155, equation 1.
    """

    def compare(self, scores: RewardScores) -> Tensor:
        """`-log sigmoid(better - worse - margin)`."""
        better, worse = scores.sides
        return -F.logsigmoid(better - worse - scores.margins)


class PlackettLuce(RewardLoss):
    """The likelihood of a ranking: each answer is chosen from itself and all that it is better than.

    An answer with reward `r`, better than answers with rewards `s_j` by margins `m_j`, loses
    `log(exp r + sum_j exp(s_j + m_j)) - r` nats (Plackett 1975, doi:10.2307/2346567; Luce 1959). Of two answers this is
    `BradleyTerry`; where only the best is known, it is the softmax over all. Each of its pairs carries an equal part,
    so that a ranking counts what its likelihood says.
    """

    def compare(self, scores: RewardScores) -> Tensor:
        """Each pair's part of the loss of its better answer."""
        rewards, better, worse = scores.rewards, scores.better, scores.worse
        among = torch.full((len(rewards), len(rewards)), -torch.inf, dtype=rewards.dtype, device=rewards.device)
        among = among.diagonal_scatter(rewards)
        among = among.index_put((better, worse), rewards.index_select(0, worse) + scores.margins.to(rewards.dtype))
        choices = among.logsumexp(1) - rewards
        parts = torch.zeros_like(rewards).index_add(0, better, torch.ones_like(scores.margins, dtype=rewards.dtype))
        return choices.index_select(0, better) / parts.index_select(0, better)


__all__ = ["BradleyTerry", "PlackettLuce", "RewardLoss", "RewardScores"]
