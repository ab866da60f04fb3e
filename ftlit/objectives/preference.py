"""What a preference loss is given of some answers, and the contract of such a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from ftlit.errors import ConfigError


class PreferenceScores:
    """Log-probabilities of answers, and which of them is preferred to which.

    Shape legend: N trained tokens, A answers, P pairs. The sums are taken in float64: a difference of two sums of a
    thousand tokens is what the losses look at.

    Args:
        logps: Log-probabilities of the trained tokens under the policy, nats, `[N]`; the answers end to end.
        lengths: Trained tokens of each answer, A numbers.
        pairs: For each pair the better and the worse answer, P pairs of indices; -1 where there is no such answer
            (an answer that is only said to be good, or to be bad).
        ref_logps: The same log-probabilities under the reference, `[N]`; None where the loss needs no reference.
        margins: By how much the better answer of each pair is better, `[P]`; 0 when left out.
        log_sum_sq: `log sum_v p_v^2` of the policy at each token, `[N]`; None unless the loss watches it.
        kl: How far the policy has moved from the reference on answers that do not belong to their prompts, nats, a
            scalar of at least 0; None unless the loss couples rows through it.
    """

    def __init__(
        self,
        logps: Tensor,
        lengths: Sequence[int],
        pairs: Sequence[tuple[int, int]],
        ref_logps: Tensor | None = None,
        margins: Tensor | None = None,
        log_sum_sq: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> None:
        self.logps, self.lengths, self.pairs = logps, tuple(lengths), tuple(pairs)
        self.ref_logps, self.log_sum_sq, self.kl = ref_logps, log_sum_sq, kl
        places = torch.tensor(self.pairs, dtype=torch.int64, device=logps.device).reshape(-1, 2)
        self.has_chosen, self.has_rejected = (places >= 0).unbind(1)
        self._better, self._worse = places.clamp(min=0).unbind(1)
        self.margins = torch.zeros(len(self.pairs), dtype=torch.float64, device=logps.device)
        if margins is not None:
            self.margins = margins.double()

    def sums(self, values: Tensor) -> Tensor:
        """The sum of a quantity of each token over each answer, float64 `[A]`."""
        parts = values.double().split(list(self.lengths))
        return torch.stack([part.sum() for part in parts])

    def better(self, values: Tensor) -> Tensor:
        """Of a quantity of each answer `[A]` that of the better one of each pair, `[P]`."""
        return values.index_select(0, self._better)

    def worse(self, values: Tensor) -> Tensor:
        """Of a quantity of each answer `[A]` that of the worse one of each pair, `[P]`."""
        return values.index_select(0, self._worse)

    # ---- of each answer, [A] --------------------------------------------------------------------------------------

    @cached_property
    def totals(self) -> Tensor:
        """Log-probability of each answer under the policy, nats, `[A]`."""
        return self.sums(self.logps)

    @cached_property
    def ref_totals(self) -> Tensor:
        """Log-probability of each answer under the reference, nats, `[A]`."""
        if self.ref_logps is None:
            raise ConfigError("this loss compares with a reference, and there are no scores of one.")
        return self.sums(self.ref_logps)

    @cached_property
    def counts(self) -> Tensor:
        """Trained tokens of each answer, float64 `[A]`; at least 1, so that one can divide by them."""
        counts = torch.tensor(self.lengths, dtype=torch.float64, device=self.logps.device)
        return counts.clamp(min=1)

    @cached_property
    def ratios(self) -> Tensor:
        """Log-probability of each answer under the policy less that under the reference, nats, `[A]`."""
        return self.totals - self.ref_totals

    # ---- of each pair, [P] ----------------------------------------------------------------------------------------

    @property
    def chosen(self) -> Tensor:
        """Log-probability of the better answers under the policy, nats, `[P]`."""
        return self.better(self.totals)

    @property
    def rejected(self) -> Tensor:
        """Log-probability of the worse answers under the policy, nats, `[P]`."""
        return self.worse(self.totals)

    @property
    def ref_chosen(self) -> Tensor:
        """Log-probability of the better answers under the reference, nats, `[P]`."""
        return self.better(self.ref_totals)

    @property
    def ref_rejected(self) -> Tensor:
        """Log-probability of the worse answers under the reference, nats, `[P]`."""
        return self.worse(self.ref_totals)

    @property
    def chosen_ratio(self) -> Tensor:
        """`log pi - log ref` of the better answers, nats, `[P]`."""
        return self.better(self.ratios)

    @property
    def rejected_ratio(self) -> Tensor:
        """`log pi - log ref` of the worse answers, nats, `[P]`."""
        return self.worse(self.ratios)

    @property
    def chosen_mean(self) -> Tensor:
        """Log-probability of the better answers a token under the policy, nats a token, `[P]`."""
        return self.better(self.totals / self.counts)

    @property
    def rejected_mean(self) -> Tensor:
        """Log-probability of the worse answers a token under the policy, nats a token, `[P]`."""
        return self.worse(self.totals / self.counts)

    @property
    def chosen_length(self) -> Tensor:
        """Trained tokens of the better answers, float64 `[P]`."""
        return self.better(self.counts)

    @property
    def rejected_length(self) -> Tensor:
        """Trained tokens of the worse answers, float64 `[P]`."""
        return self.worse(self.counts)

    def apart(self) -> PreferenceScores:
        """The same pairs, each with answers of its own: the two of pair p are answers 2p and 2p + 1."""
        parts = list(torch.arange(len(self.logps), device=self.logps.device).split(list(self.lengths)))
        taken = [answer for pair in self.pairs for answer in pair]
        nothing = torch.zeros(0, dtype=torch.int64, device=self.logps.device)
        tokens = torch.cat([parts[answer] if answer >= 0 else nothing for answer in taken] or [nothing])
        logps = self.logps.index_select(0, tokens)
        ref, log_sum_sq = (
            None if one is None else one.index_select(0, tokens) for one in (self.ref_logps, self.log_sum_sq)
        )
        pairs = [
            (2 * p if better >= 0 else -1, 2 * p + 1 if worse >= 0 else -1)
            for p, (better, worse) in enumerate(self.pairs)
        ]
        lengths = [self.lengths[answer] if answer >= 0 else 0 for answer in taken]
        return PreferenceScores(logps, lengths, pairs, ref, self.margins, log_sum_sq, self.kl)


class PreferenceLoss(ABC):
    """What each pair of answers contributes to the loss.

    Subclass it in a file of your own and name the class under `model.loss`. The caller multiplies by the weights of
    the pairs, sums, and divides by the weight of all pairs of the optimizer step.

    Example:
        ```python
        class Squared(PreferenceLoss):
            def __call__(self, scores):
                return (scores.chosen_ratio - scores.rejected_ratio - 1) ** 2
        ```
    """

    needs_reference: bool = True
    """Whether it reads the scores of the reference; without, none are computed."""

    couples: bool = False
    """Whether the loss of a pair depends on the other pairs of the micro-batch: these are then never cut apart."""

    aligned: bool = True
    """Whether the i-th number it returns is the loss of the i-th pair, so that pairs can have weights of their own."""

    unpaired: bool = False
    """Whether it takes answers that are only said to be good or bad, without a partner."""

    needs_kl: bool = False
    """Whether it reads `scores.kl`."""

    uses_margins: bool = False
    """Whether it reads `scores.margins`."""

    watch: frozenset[str] = frozenset()
    """Scores of each token that it reads besides log-probabilities, without gradients: `log_sum_sq`."""

    beta: float = 1.0
    """What the rewards that are logged are measured in: `beta` nats."""

    @abstractmethod
    def __call__(self, scores: PreferenceScores) -> Tensor:
        """Loss of each pair.

        Args:
            scores: Of the answers of a micro-batch; the policy's log-probabilities carry gradients.

        Returns:
            Loss of each pair, `[P]`.
        """

    def rewards(self, scores: PreferenceScores) -> Tensor:
        """The implicit reward of each answer, `[A]`: what the logged `rewards/...` are made of."""
        return self.beta * (scores.ratios if self.needs_reference else scores.totals)


def check_beta(loss: PreferenceLoss, beta: float) -> float:
    """A `beta` that is positive.

    Raises:
        ConfigError: If it is not.
    """
    if not 0 < beta < float("inf"):
        raise ConfigError(f"{type(loss).__name__}'s beta must be positive, got {beta}.")
    return beta


def check_smoothing(loss: PreferenceLoss, smoothing: float, *, least: float = 0.0) -> float:
    """A share of flipped labels, in [0, 0.5).

    Raises:
        ConfigError: If it is not.
    """
    if not least <= smoothing < 0.5 or (least and smoothing <= 0):
        where = "(0, 0.5)" if least else "[0, 0.5)"
        raise ConfigError(f"{type(loss).__name__}'s label_smoothing must be in {where}, got {smoothing}.")
    return smoothing


def smoothed_logistic(logits: Tensor, smoothing: float) -> Tensor:
    """`-(1 - e) log sigmoid(x) - e log sigmoid(-x)`: the logistic loss where a share e of the labels is wrong."""
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


__all__ = ["PreferenceLoss", "PreferenceScores", "check_beta", "check_smoothing", "smoothed_logistic"]
