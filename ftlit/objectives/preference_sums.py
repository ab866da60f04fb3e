"""Preference losses made of others: weighted sums, and changes of what the tokens or the pairs count; TRL's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ftlit.errors import ConfigError, nearest
from ftlit.objectives import dpo, reference_free
from ftlit.objectives.preference import PreferenceLoss, PreferenceScores

NAMES: Mapping[str, Callable[[], PreferenceLoss]] = {
    "sigmoid": dpo.Sigmoid,
    "dpo": dpo.Sigmoid,
    "hinge": dpo.Hinge,
    "ipo": dpo.IPO,
    "exo_pair": dpo.EXO,
    "nca_pair": dpo.NCA,
    "robust": dpo.Robust,
    "bco_pair": dpo.BCO,
    "sppo_hard": dpo.SPPO,
    "aot": dpo.AOT,
    "aot_unpaired": dpo.AOTUnpaired,
    "apo_zero": dpo.APOZero,
    "apo_zero_unpaired": dpo.APOZero,
    "apo_down": dpo.APODown,
    "discopop": dpo.DiscoPOP,
    "sigmoid_norm": dpo.SigmoidNorm,
    "kto": dpo.KTO,
    "sft": reference_free.ChosenNLL,
    "simpo": reference_free.SimPO,
    "orpo": reference_free.ORPO,
    "cpo": reference_free.CPO,
    "slic": reference_free.SLiC,
}
"""What TRL calls a loss, where it is the same one (and `dpo`); with the default settings of its class."""


def loss_of(given: PreferenceLoss | Sequence[str] | str) -> PreferenceLoss:
    """A loss, or the one of a name in `NAMES`, or the sum of those of several names.

    Raises:
        ConfigError: If there is none of that name.
    """
    if isinstance(given, PreferenceLoss):
        return given
    if not isinstance(given, str):
        return WeightedSum(list(given))
    if given not in NAMES:
        raise ConfigError(f"there is no preference loss {given!r}: {nearest(given, NAMES)}")
    return NAMES[given]()


class _Made(PreferenceLoss):
    """A loss made of others: it needs what they need."""

    def __init__(self, parts: Sequence[PreferenceLoss]) -> None:
        self.parts = list(parts)
        self.beta = self.parts[0].beta
        self.needs_reference = any(part.needs_reference for part in parts)
        self.couples = any(part.couples for part in parts)
        self.aligned = all(part.aligned for part in parts)
        self.unpaired = all(part.unpaired for part in parts)
        self.needs_kl = any(part.needs_kl for part in parts)
        self.uses_margins = any(part.uses_margins for part in parts)
        self.watch = frozenset().union(*(part.watch for part in parts))

    def rewards(self, scores: PreferenceScores) -> Tensor:
        """Those of the first."""
        return self.parts[0].rewards(scores)


class WeightedSum(_Made):
    """`sum_k weight_k loss_k`.

    RPO is `losses: [sigmoid, sft]`; MPO (Wang et al. 2024, arXiv:2411.10442) is `losses: [sigmoid, bco_pair, sft]`
    with `weights: [0.8, 0.2, 1.0]`. Rewards are those of the first loss.

    Args:
        losses: Preference losses, or names of some.
        weights: A number each; 1 when left out.

    Raises:
        ConfigError: If there is not one weight a loss.
    """

    def __init__(self, losses: list[PreferenceLoss | str], weights: list[float] | None = None) -> None:
        if not losses:
            raise ConfigError("WeightedSum needs at least one loss, such as losses: [sigmoid, sft].")
        self.weights = [1.0] * len(losses) if weights is None else list(weights)
        if len(self.weights) != len(losses):
            raise ConfigError(f"WeightedSum needs a weight a loss, got {len(losses)} losses and {weights}.")
        super().__init__([loss_of(loss) for loss in losses])

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        values = [weight * part(scores) for weight, part in zip(self.weights, self.parts, strict=True)]
        return torch.stack(values).sum(0)


class LengthDesensitized(_Made):
    """Any loss with `log pi(y)` and `log ref(y)` of a pair's longer answer counting less beyond the shorter one's end.

    `log p(y) = sum_{t <= m} log p(y_t) + alpha sum_{t > m} log p(y_t)`, m the length of the shorter answer: LD-DPO (Liu
    et al. 2024, arXiv:2409.06411). With alpha = 0.5, answers of one and two tokens of probability 1/2
    each have `-ln 2` and `-1.5 ln 2`.

    Args:
        loss: A preference loss, or the name of one.
        alpha: What the tail counts; 1 changes nothing.

    Raises:
        ConfigError: If alpha is not in [0, 1], or the loss weighs pairs as WPO does.
    """

    def __init__(self, loss: PreferenceLoss | str = "sigmoid", alpha: float = 0.5) -> None:
        if not 0 <= alpha <= 1:
            raise ConfigError(f"LengthDesensitized's alpha must be in [0, 1], got {alpha}.")
        self.alpha = alpha
        super().__init__([loss_of(loss)])
        if "log_sum_sq" in self.watch:
            raise ConfigError(
                "WPO weighs pairs by log-probabilities as they are: make it WPO(LengthDesensitized(...))."
            )
        self.unpaired = False

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        apart = scores.apart()
        factors = []
        for better, worse in zip(apart.lengths[::2], apart.lengths[1::2], strict=True):
            for length in (better, worse):
                factor = torch.ones(length, dtype=torch.float64, device=scores.logps.device)
                factor[min(better, worse) :] = self.alpha
                factors.append(factor)
        counts = torch.cat(factors) if factors else apart.logps
        changed = PreferenceScores(
            apart.logps * counts,
            apart.lengths,
            apart.pairs,
            None if apart.ref_logps is None else apart.ref_logps * counts,
            apart.margins,
            apart.log_sum_sq,
            apart.kl,
        )
        return self.parts[0](changed)


class WPO(_Made):
    """Any loss with each pair weighted by how likely the policy itself is to write its two answers.

    `w(y) = exp(mean_t (log pi(y_t) - log sum_v pi(v)^2))`, without a gradient; a pair weighs `w(y_w) w(y_l)`: Zhou et
    al. 2024, arXiv:2406.11827, equation 2, with its sampled alignment. Where all tokens are alike, w = 1.

    Args:
        loss: A preference loss, or the name of one.

    Raises:
        ConfigError: If the loss sorts its pairs, so that they cannot be weighted.
    """

    def __init__(self, loss: PreferenceLoss | str = "sigmoid") -> None:
        super().__init__([loss_of(loss)])
        if not self.aligned:
            raise ConfigError(f"WPO weighs each pair, which {type(self.parts[0]).__name__} does not keep apart.")
        self.watch = self.watch | {"log_sum_sq"}
        self.unpaired = False

    def __call__(self, scores: PreferenceScores) -> Tensor:
        """See above."""
        assert scores.log_sum_sq is not None
        alike = (scores.sums(scores.logps.detach() - scores.log_sum_sq) / scores.counts).exp()
        return self.parts[0](scores) * scores.better(alike) * scores.worse(alike)


__all__ = ["NAMES", "WPO", "LengthDesensitized", "WeightedSum", "loss_of"]
