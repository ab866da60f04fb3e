"""How far the policy is from where it started: estimates from the tokens it drew, and the weight of their penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ftlit.errors import ConfigError

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logps: Tensor, reference: Tensor, estimator: Estimator = "k1") -> Tensor:
    """Estimates of `KL(policy || reference)` from tokens drawn from the policy (Schulman, joschu.net/blog/kl-approx).

    With `d = log policy - log reference`: `k1 = d` is unbiased and may be negative, `k2 = d^2 / 2` is biased and varies
    less, `k3 = exp(-d) - 1 + d` is unbiased and never negative. As part of a loss `k2` has the gradient of the KL in
    expectation, `k1` has none, `k3` has that of the reverse KL.

    Args:
        logps: Log-probability of each token under the policy, nats, `[N]`.
        reference: The same under the reference, `[N]`.
        estimator: Which.

    Returns:
        Estimate of each token, nats, `[N]`.
    """
    apart = logps - reference
    if estimator == "k1":
        return apart
    if estimator == "k2":
        return apart.square() / 2
    return (-apart).expm1() + apart


@dataclass
class KLPenalty:
    """The penalty on the distance from the start of the run.

    Args:
        coef: Its weight at the start; 0: none.
        place: Subtracted from the `reward` of each token, or added to the `loss` (as GRPO does).
        estimator: How it is estimated from the drawn tokens: k1, k2 or k3. k1 has no gradient in the loss.
        target: KL of a whole answer, nats, that the weight is steered to; None: it stays. After each rollout it is
            multiplied by `1 + rate * clip(KL / target - 1, -0.2, 0.2)` (Ziegler et al. 2019, arXiv:1909.08593,
            section 2.2).
        rate: How fast it is steered; 0.1 in the paper.

    Raises:
        ConfigError: If a number is out of range, or k1 is asked for in the loss.
    """

    coef: float = 0.05
    place: Literal["reward", "loss"] = "reward"
    estimator: Estimator = "k1"
    target: float | None = None
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.coef < 0 or not 0 < self.rate <= 1 or (self.target is not None and self.target <= 0):
            raise ConfigError(
                "model.kl needs coef >= 0, rate in (0, 1] and a positive target; "
                f"got {self.coef}, {self.rate} and {self.target}."
            )
        if self.place not in ("reward", "loss") or self.estimator not in ("k1", "k2", "k3"):
            raise ConfigError(
                f"model.kl.place is reward or loss and its estimator k1, k2 or k3; got {self.place!r} and "
                f"{self.estimator!r}."
            )
        if self.place == "loss" and self.estimator == "k1":
            raise ConfigError("model.kl: k1 has no gradient as a loss; use estimator k2 or k3, or place: reward.")
        if self.target is not None and not self.coef:
            raise ConfigError("model.kl.target steers coef by a factor, so coef must not be 0; start with 0.05.")

    def adapted(self, coef: float, kl: float) -> float:
        """The weight after a rollout.

        Args:
            coef: The weight it had.
            kl: Mean KL of its answers, nats an answer.
        """
        if self.target is None:
            return coef
        off = min(max(kl / self.target - 1, -0.2), 0.2)
        return coef * (1 + self.rate * off)


__all__ = ["Estimator", "KLPenalty", "kl_estimate"]
