"""What an objective is given of each trained token."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

EXTRAS = ("entropy", "mean_logps")
"""Scores that are computed only where something asks for them."""


class TokenScores(NamedTuple):
    """What the model says of each target.

    Of rows that a control of forgetting added for their divergence from the start, `kl` alone is known: the rest is 0.

    Attributes:
        logps: Log-probability of the target, nats, `[N]`, at least float32; carries the gradient.
        correct: Whether no other token is more likely, bool `[N]`.
        entropy: Entropy of the distribution that the target is drawn from, nats, `[N]`; None unless asked for.
        mean_logps: Mean log-probability of all V tokens of the vocabulary, nats, `[N]`; None unless asked for.
        choice: The likeliest token, int64 `[N]`; None unless asked for.
        kl: KL divergence from the start model to the present one, nats, `[N]`; 0 at targets of other sources than those
            it was asked for. None unless asked for.
        log_sum_sq: `log sum_v p_v^2`, nats, `[N]`, without a gradient; None unless watched.
        states: The hidden state that predicts the target, `[N, D]`; carries the gradient. None unless asked for.
    """

    logps: Tensor
    correct: Tensor
    entropy: Tensor | None = None
    mean_logps: Tensor | None = None
    choice: Tensor | None = None
    kl: Tensor | None = None
    log_sum_sq: Tensor | None = None
    states: Tensor | None = None

    def select(self, chosen: Tensor) -> TokenScores:
        """The scores of some targets.

        Args:
            chosen: Which, bool `[N]`.
        """
        values = {name: value[chosen] for name, value in self._asdict().items() if value is not None}
        return TokenScores(**values)

    def spread(self, places: Tensor, count: int) -> TokenScores:
        """The same scores among more targets, whose own are 0.

        Args:
            places: Where each goes, int64 `[N]`.
            count: The number of targets then.
        """
        values = {
            name: value.new_zeros(count, *value.shape[1:]).index_copy(0, places, value)
            for name, value in self._asdict().items()
            if value is not None
        }
        return TokenScores(**values)


__all__ = ["EXTRAS", "TokenScores"]
