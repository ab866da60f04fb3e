"""Preference losses that need no reference.

`w` and `l` are the better and the worse answer, `s = sigmoid`. Values in the docstrings are those of one pair of
one-token answers of probability 1/2 and 1/4, with `beta = 1`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ftlit.errors import ConfigError
from ftlit.objectives.preference import (
    PreferenceLoss,
    PreferenceScores,
    check_beta,
    check_smoothing,
    smoothed_logistic,
)


class ChosenNLL(PreferenceLoss):
    """`-log pi(w) / |w|`: supervised fine-tuning on the better answers, nats a token; value `ln 2`.

    The term that RPO (Pang et al. 2024, arXiv:2404.19733) and MPO (Wang et al. 2024, arXiv:2411.10442) add to DPO. Each
    answer counts alike, however long it is and whatever else is in the micro-batch.
    """

    needs_reference = False

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        return -scores.chosen_mean


class SimPO(PreferenceLoss):
    """`-log s(beta (log pi(w) / |w| - log pi(l) / |l|) - gamma)`; value `ln(3/2)` for gamma = 0.

    Meng et al. 2024, arXiv:2405.14734, equation 6.

    Args:
        beta: Scale of the rewards; the paper tunes it in 2 to 10.
        gamma: Margin by which the better answer is to win; the paper takes 0.3 to 0.6 of beta.
        label_smoothing: The share of pairs that are labelled the wrong way round.

    Raises:
        ConfigError: If a number is out of range.
    """

    needs_reference = False

    def __init__(self, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> None:
        self.beta = check_beta(self, beta)
        if gamma < 0:
            raise ConfigError(f"SimPO's gamma must not be negative, got {gamma}.")
        self.gamma = gamma
        self.label_smoothing = check_smoothing(self, label_smoothing)

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        logits = self.beta * (scores.chosen_mean - scores.rejected_mean) - self.gamma
        return smoothed_logistic(logits, self.label_smoothing)

    def rewards(self, scores: PreferenceScores) -> Tensor:
        """`beta log pi(y) / |y|`."""
        return self.beta * scores.totals / scores.counts


class ORPO(PreferenceLoss):
    """`-log p(w) - beta log s(logit p(w) - logit p(l))` with `p(y) = pi(y)^(1/|y|)`; value `ln 2 + ln(4/3)`.

    Odds ratio preference optimization: Hong et al. 2024, arXiv:2403.07691, equations 6 and 7 (`beta` is their lambda).

    Args:
        beta: Weight of the odds ratio beside the likelihood of the better answer.
    """

    needs_reference = False

    def __init__(self, beta: float = 0.1) -> None:
        self.beta = check_beta(self, beta)

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        return -scores.chosen_mean - self.beta * F.logsigmoid(self.log_odds_ratio(scores))

    @staticmethod
    def log_odds_ratio(scores: PreferenceScores) -> Tensor:
        """`logit p(w) - logit p(l)`, `[P]`."""
        good, bad = scores.chosen_mean, scores.rejected_mean
        return (good - bad) - (_log1mexp(good) - _log1mexp(bad))

    def rewards(self, scores: PreferenceScores) -> Tensor:
        """`beta log p(y)`."""
        return self.beta * scores.totals / scores.counts


def _log1mexp(values: Tensor) -> Tensor:
    """`log(1 - exp(x))` of numbers below 0, exact near 0 and far from it (Maechler 2012, equation 7)."""
    values = values.clamp(max=-torch.finfo(values.dtype).tiny)
    near = values > -0.6931471805599453
    small = torch.where(near, values, -1.0)
    large = torch.where(near, -1.0, values)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


class CPO(PreferenceLoss):
    """`-log s(beta (log pi(w) - log pi(l))) - alpha log pi(w) / |w|`; value `ln(3/2) + ln 2`.

    Contrastive preference optimization: Xu et al. 2024, arXiv:2401.08417, its likelihood a token as its
    authors' code has it.

    Args:
        beta: Scale of the rewards.
        alpha: Weight of the likelihood of the better answer.
        label_smoothing: The share of pairs that are labelled the wrong way round.

    Raises:
        ConfigError: If a number is out of range.
    """

    needs_reference = False

    def __init__(self, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0) -> None:
        self.beta = check_beta(self, beta)
        if alpha < 0:
            raise ConfigError(f"CPO's alpha must not be negative, got {alpha}.")
        self.alpha = alpha
        self.label_smoothing = check_smoothing(self, label_smoothing)

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        contrast = smoothed_logistic(self.beta * (scores.chosen - scores.rejected), self.label_smoothing)
        return contrast - self.alpha * scores.chosen_mean


class SLiC(PreferenceLoss):
    """`max(0, delta - beta (log pi(w) - log pi(l))) - alpha log pi(w) / |w|`; value `1 - ln 2 + ln 2`.

    Sequence likelihood calibration with the better answers as what it is kept near by: Zhao et al. 2023,
    arXiv:2305.10425.

    Args:
        beta: Scale of the rewards.
        delta: Margin by which the better answer is to win.
        alpha: Weight of the likelihood of the better answer.

    Raises:
        ConfigError: If a number is out of range.
    """

    needs_reference = False

    def __init__(self, beta: float = 0.1, delta: float = 1.0, alpha: float = 1.0) -> None:
        self.beta = check_beta(self, beta)
        if delta < 0 or alpha < 0:
            raise ConfigError(f"SLiC's delta and alpha must not be negative, got {delta} and {alpha}.")
        self.delta, self.alpha = delta, alpha

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        short = torch.relu(self.delta - self.beta * (scores.chosen - scores.rejected))
        return short - self.alpha * scores.chosen_mean


__all__ = ["CPO", "ORPO", "ChosenNLL", "SLiC", "SimPO"]
