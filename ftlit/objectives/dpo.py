"""Preference losses that compare the policy with a reference.

Notation: `w` and `l` are the better and the worse answer, `r = log pi(y|x) - log ref(y|x)` in nats, summed over the
trained tokens, `s = sigmoid`. Values in the docstrings are those of one pair of one-token answers where the policy has
made the better answer twice as likely and left the worse one: `r_w = ln 2`, `r_l = 0`, `beta = 1`; so `s(r_w) = 2/3`.
"""

from __future__ import annotations

import math
from typing import Literal

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

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
# Beyond this `exp` of a half-precision number would not be finite.
_LARGEST = 80.0


class MarginLoss(PreferenceLoss):
    """What losses of the difference of two rewards share: `beta` and the f-divergence.

    `f'(u)` of the ratio `u = pi / ref` takes the place of `log u` (Wang et al. 2023, arXiv:2309.16240):
    reverse KL `log u`, forward KL `1 - 1 / u`, Jensen-Shannon `log(2 u / (1 + u))`, alpha `(u^(a - 1) - 1) / (a - 1)`,
    whose limit at `a = 1` is reverse KL. The sigmoid loss is then `-log s(1/2)`, `ln(7/4)`, and for `a = 1/2`
    `-log s(2 - sqrt 2)` instead of `ln(3/2)`.

    Args:
        beta: Strength of the pull to the reference.
        divergence: What the policy is kept near the reference by.
        alpha: `a` of the alpha-divergence.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(self, beta: float = 0.1, divergence: Divergence = "reverse_kl", alpha: float = 0.5) -> None:
        self.beta = check_beta(self, beta)
        if divergence not in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"):
            raise ConfigError(
                f"{type(self).__name__}'s divergence must be reverse_kl, forward_kl, js_divergence or "
                f"alpha_divergence, got {divergence!r}."
            )
        self.divergence, self.alpha = divergence, alpha

    def slope(self, ratios: Tensor) -> Tensor:
        """`f'(u)` from `log u`."""
        if self.divergence == "forward_kl":
            return 1 - torch.exp((-ratios).clamp(max=_LARGEST))
        if self.divergence == "js_divergence":
            return math.log(2) + F.logsigmoid(ratios)
        if self.divergence == "alpha_divergence" and abs(self.alpha - 1) > 1e-6:
            power = self.alpha - 1
            return torch.expm1((power * ratios).clamp(max=_LARGEST)) / power
        return ratios

    def logits(self, scores: PreferenceScores) -> Tensor:
        """`beta` times the difference of the two rewards, `[P]`."""
        return self.beta * (self.slope(scores.chosen_ratio) - self.slope(scores.rejected_ratio))

    def mean_difference(self, scores: PreferenceScores) -> Tensor:
        """The difference of the two rewards a token, `[P]`."""
        return (
            self.slope(scores.chosen_ratio) / scores.chosen_length
            - self.slope(scores.rejected_ratio) / scores.rejected_length
        )


class Sigmoid(MarginLoss):
    """DPO: `-log s(beta (r_w - r_l) - margin)`; value `ln(3/2)`, and `ln 2` where policy and reference agree.

    Rafailov et al. 2023, arXiv:2305.18290, equation 7. With `label_smoothing` e it is conservative DPO (Mitchell 2023,
    https://ericmitchell.ai/cdpo.pdf), `-(1 - e) log s(x) - e log s(-x)`: `0.9 ln(3/2) + 0.1 ln 3` for
    e = 0.1. A `margin` column is the offset of ODPO (Amini et al. 2024, arXiv:2402.10571).

    Args:
        beta: Strength of the pull to the reference.
        label_smoothing: The share of pairs that are labelled the wrong way round.
        divergence: What the policy is kept near the reference by.
        alpha: Of the alpha-divergence.
    """

    uses_margins = True

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        divergence: Divergence = "reverse_kl",
        alpha: float = 0.5,
    ) -> None:
        super().__init__(beta, divergence, alpha)
        self.label_smoothing = check_smoothing(self, label_smoothing)

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        return smoothed_logistic(self.logits(scores) - scores.margins, self.label_smoothing)


class Hinge(MarginLoss):
    """`max(0, 1 - beta (r_w - r_l))`; value `1 - ln 2`.

    The hinge of SLiC on the rewards of DPO (Zhao et al. 2023, arXiv:2305.10425; RSO, Liu et al. 2023,
    arXiv:2309.06657).
    """

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        return torch.relu(1 - self.logits(scores))


class IPO(MarginLoss):
    """`(r_w / |w| - r_l / |l| - 1 / (2 beta))^2`; value `(ln 2 - 1/2)^2`.

    Azar et al. 2023, arXiv:2310.12036, equation 17 with `tau = beta`; a token, as its authors run it.
    """

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        return (self.mean_difference(scores) - 1 / (2 * self.beta)) ** 2


class EXO(MarginLoss):
    """`KL([s(x), s(-x)] || [1 - e, e])` with `x = beta (r_w - r_l)`; value `2/3 ln(2/(3(1-e))) + 1/3 ln(1/(3e))`.

    Ji et al. 2024, arXiv:2402.00856, equation 16.

    Args:
        beta: Strength of the pull to the reference.
        label_smoothing: e, above 0.
        divergence: What the policy is kept near the reference by.
        alpha: Of the alpha-divergence.
    """

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 1e-3,
        divergence: Divergence = "reverse_kl",
        alpha: float = 0.5,
    ) -> None:
        super().__init__(beta, divergence, alpha)
        self.label_smoothing = check_smoothing(self, label_smoothing, least=1e-12)

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        logits = self.logits(scores)
        log_w, log_l = F.logsigmoid(logits), F.logsigmoid(-logits)
        wrong = self.label_smoothing
        return log_w.exp() * (log_w - math.log1p(-wrong)) + log_l.exp() * (log_l - math.log(wrong))


class Robust(MarginLoss):
    """`(-(1 - e) log s(x) + e log s(-x)) / (1 - 2e)`; value `(0.9 ln(3/2) - 0.1 ln 3) / 0.8` for e = 0.1.

    Unbiased where a share e of the labels is flipped: Chowdhury et al. 2024, arXiv:2403.00409.

    Args:
        beta: Strength of the pull to the reference.
        label_smoothing: e; 0 is the sigmoid loss.
        divergence: What the policy is kept near the reference by.
        alpha: Of the alpha-divergence.
    """

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.1,
        divergence: Divergence = "reverse_kl",
        alpha: float = 0.5,
    ) -> None:
        super().__init__(beta, divergence, alpha)
        self.label_smoothing = check_smoothing(self, label_smoothing)

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        logits, wrong = self.logits(scores), self.label_smoothing
        return (-(1 - wrong) * F.logsigmoid(logits) + wrong * F.logsigmoid(-logits)) / (1 - 2 * wrong)


class DiscoPOP(MarginLoss):
    """`(1 - m) (-log s(x)) + m exp(-x)` with `m = s(x / tau)`; value `ln(3/2) / 3 + 1/3` for tau = 1.

    Log-ratio modulated loss, found by a language model: Lu et al. 2024, arXiv:2406.08414, equation 5.

    Args:
        beta: Strength of the pull to the reference.
        tau: Width of the change from one loss to the other.
        divergence: What the policy is kept near the reference by.
        alpha: Of the alpha-divergence.
    """

    def __init__(
        self, beta: float = 0.1, tau: float = 0.05, divergence: Divergence = "reverse_kl", alpha: float = 0.5
    ) -> None:
        super().__init__(beta, divergence, alpha)
        if tau <= 0:
            raise ConfigError(f"DiscoPOP's tau must be positive, got {tau}.")
        self.tau = tau

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        logits = self.logits(scores)
        share = torch.sigmoid(logits / self.tau)
        return -F.logsigmoid(logits) * (1 - share) + torch.exp(-logits) * share


class SigmoidNorm(MarginLoss):
    """`-log s(beta (r_w / |w| - r_l / |l|))`: DPO a token; value `ln(3/2)`.

    Length-normalized DPO (Lambert et al. 2024, Tulu 3, arXiv:2411.15124).
    """

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        return -F.logsigmoid(self.beta * self.mean_difference(scores))


class _Beta(PreferenceLoss):
    """A loss with nothing but a `beta`."""

    def __init__(self, beta: float = 0.1) -> None:
        self.beta = check_beta(self, beta)


class NCA(_Beta):
    """`-log s(b r_w) - 1/2 log s(-b r_w) - 1/2 log s(-b r_l)`; value `ln(3/2) + ln(3)/2 + ln(2)/2`.

    Noise contrastive alignment for two answers: Chen et al. 2024, arXiv:2402.05369.

    Args:
        beta: Strength of the pull to the reference.
    """

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        good, bad = self.beta * scores.chosen_ratio, self.beta * scores.rejected_ratio
        return -F.logsigmoid(good) - 0.5 * F.logsigmoid(-good) - 0.5 * F.logsigmoid(-bad)


class BCO(_Beta):
    """`-log s(b r_w) - log s(-b r_l)`; value `ln(3/2) + ln 2`.

    Binary classifier optimization without its reward shift: Jung et al. 2024, arXiv:2404.04656.

    Args:
        beta: Strength of the pull to the reference.
    """

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        return -F.logsigmoid(self.beta * scores.chosen_ratio) - F.logsigmoid(-self.beta * scores.rejected_ratio)


class SPPO(_Beta):
    """`(r_w - 1 / (2 b))^2 + (r_l + 1 / (2 b))^2`; value `(ln 2 - 1/2)^2 + 1/4`.

    Self-play preference optimization where the better answer wins for certain: Wu et al. 2024, arXiv:2405.00675,
    equation 4.7.

    Args:
        beta: `1 / eta` of the paper.
    """

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        goal = 1 / (2 * self.beta)
        return (scores.chosen_ratio - goal) ** 2 + (scores.rejected_ratio + goal) ** 2


class APOZero(_Beta):
    """`1 - s(b r_w) + s(b r_l)`; value `1/3 + 1/2`.

    Raises good answers and lowers bad ones: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7. Takes answers
    without a partner, too.

    Args:
        beta: Strength of the pull to the reference.
    """

    unpaired = True

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        good = torch.sigmoid(-self.beta * scores.chosen_ratio) * scores.has_chosen
        return good + torch.sigmoid(self.beta * scores.rejected_ratio) * scores.has_rejected


class APODown(_Beta):
    """`s(b r_w) + 1 - s(b (r_w - r_l))`; value `2/3 + 1/3`.

    Lowers both, the worse one more, for answers that are worse than the model's own: D'Oosterlinck et al. 2024,
    arXiv:2408.06266, equation 8.

    Args:
        beta: Strength of the pull to the reference.
    """

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        better = torch.sigmoid(-self.beta * (scores.chosen_ratio - scores.rejected_ratio))
        return torch.sigmoid(self.beta * scores.chosen_ratio) + better


class KTO(PreferenceLoss):
    """`d (1 - s(b (r_w - z)))` for a good answer, `u (1 - s(b (z - r_l)))` for a bad one; value `1/3 + 1/2` at z = 0.

    Ethayarajh et al. 2024, arXiv:2402.01306. The reference point z is the mean of `r` over the prompts of
    the optimizer step (of the whole set in validation), each with the answers to another prompt of the set, not below 0
    and without a gradient. It does not depend on how the step is cut into micro-batches and ranks. A pair counts as
    one good and one bad answer.

    Args:
        beta: Strength of the pull to the reference.
        desirable_weight: d.
        undesirable_weight: u.

    Raises:
        ConfigError: If a number is out of range.
    """

    unpaired = True
    needs_kl = True

    def __init__(self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        self.beta = check_beta(self, beta)
        if desirable_weight < 0 or undesirable_weight < 0 or not desirable_weight + undesirable_weight:
            raise ConfigError(
                "KTO's desirable_weight and undesirable_weight must not be negative, nor both 0; got "
                f"{desirable_weight} and {undesirable_weight}."
            )
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        point = 0.0 if scores.kl is None else scores.kl.detach().double()
        good = torch.sigmoid(self.beta * (point - scores.chosen_ratio)) * scores.has_chosen
        bad = torch.sigmoid(self.beta * (scores.rejected_ratio - point)) * scores.has_rejected
        return self.desirable_weight * good + self.undesirable_weight * bad


class AOT(PreferenceLoss):
    """`-log s(beta x_(i))`, x_(i) the i-th of the sorted `log pi_w - log pi_l` less the i-th of the sorted reference's.

    Alignment by optimal transport: the distribution of margins over the micro-batch is to dominate the reference's
    (Melnyk et al. 2024, arXiv:2406.05882). Value for a single pair `ln(3/2)`.

    Args:
        beta: Strength of the pull to the reference.
        label_smoothing: As of `Sigmoid`.
    """

    couples = True
    aligned = False

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        self.beta = check_beta(self, beta)
        self.label_smoothing = check_smoothing(self, label_smoothing)

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        policy = (scores.chosen - scores.rejected).sort().values
        reference = (scores.ref_chosen - scores.ref_rejected).sort().values
        return smoothed_logistic(self.beta * (policy - reference), self.label_smoothing)


class AOTUnpaired(AOT):
    """`-log s(beta x_(i))`, x_(i) the i-th of the sorted `r_w` less the i-th of the sorted `r_l`; value `ln(3/2)`.

    The distribution of the rewards of good answers is to dominate that of bad ones: Melnyk et al. 2024,
    arXiv:2406.05882.
    """

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        logits = scores.chosen_ratio.sort().values - scores.rejected_ratio.sort().values
        return smoothed_logistic(self.beta * logits, self.label_smoothing)


__all__ = [
    "AOT",
    "BCO",
    "EXO",
    "IPO",
    "KTO",
    "NCA",
    "SPPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "DiscoPOP",
    "Divergence",
    "Hinge",
    "MarginLoss",
    "Robust",
    "Sigmoid",
    "SigmoidNorm",
]
