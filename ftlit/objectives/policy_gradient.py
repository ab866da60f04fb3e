"""Losses of the policy and of the value, token by token.

Everything is flat, as in `advantages`: N tokens end to end, `owners` names the answer of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from ftlit.errors import ConfigError
from ftlit.objectives.advantages import sums

_FARTHEST = 20.0  # nats: what is further has no gradient

Reduction = Literal["token", "sequence", "constant"]
"""What counts alike: every token; every answer, whatever its length; every token of answers of one length."""


class TokenLoss(NamedTuple):
    """What a policy loss says of each token.

    Attributes:
        loss: `[N]`; carries the gradient.
        clipped: Whether the ratio was clipped, so that the token has no gradient (CISPO: a bounded one), bool `[N]`.
    """

    loss: Tensor
    clipped: Tensor


class PolicyLoss(ABC):
    """The loss of each token. Subclass it in a file of your own and name the class under `model.loss`."""

    reduction: Reduction = "token"
    """How the tokens of an optimizer step are put together, see `reduction_weights`."""

    @abstractmethod
    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, owners: Tensor) -> TokenLoss:
        """Loss of each token.

        Args:
            logps: Log-probability of each token under the policy, nats, `[N]`; carries the gradient.
            old_logps: The same when the answers were drawn, `[N]`.
            advantages: `[N]`.
            owners: The answer of each token, int64 `[N]`; answers are whole.
        """


class PPOClip(PolicyLoss):
    """`-min(r A, clip(r, 1 - clip, 1 + clip_high) A)` (Schulman et al. 2017, arXiv:1707.06347, equation 7).

    Args:
        clip: How far the ratio may fall, and rise where `clip_high` is left out.
        clip_high: How far it may rise.
        reduction: `token`: the mean over all tokens; `sequence`: the mean over answers of each one's mean (GRPO, Shao
            et al. 2024, arXiv:2402.03300, equation 3); `constant`: the sum over tokens divided by the number of answers
            and `max_new_tokens` (Dr. GRPO).

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(self, clip: float = 0.2, clip_high: float | None = None, reduction: Reduction = "token") -> None:
        high = clip if clip_high is None else clip_high
        if not 0 < clip < 1 or high <= 0:
            raise ConfigError(
                f"{type(self).__name__} needs clip in (0, 1) and clip_high positive, got {clip} and {clip_high}."
            )
        self.low, self.high, self.reduction = 1 - clip, 1 + high, reduction

    @override
    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, owners: Tensor) -> TokenLoss:
        return clipped_loss(ratios_of(logps - old_logps), advantages, self.low, self.high)


class DAPO(PPOClip):
    """PPO's loss that lets unlikely tokens rise further, as the mean over tokens (Yu et al. 2025, arXiv:2503.14476).

    Args:
        clip: How far the ratio may fall.
        clip_high: How far it may rise.
    """

    def __init__(self, clip: float = 0.2, clip_high: float = 0.28) -> None:
        super().__init__(clip, clip_high, "token")


class DrGRPO(PPOClip):
    """PPO's loss without the favour to short right and long wrong answers (Liu et al. 2025, arXiv:2503.20783).

    Args:
        clip: How far the ratio may fall and rise.
    """

    def __init__(self, clip: float = 0.2) -> None:
        super().__init__(clip, None, "constant")


class GSPO(PolicyLoss):
    """PPO's loss with one ratio an answer (Zheng et al. 2025, arXiv:2507.18071, equations 5 to 7).

    Args:
        clip: How far the ratio may fall.
        clip_high: How far it may rise.
        length_normalized: Whether the ratio is the geometric mean of those of the tokens; without, it is their product,
            the ratio of REINFORCE on whole answers (RLOO), which wants a `clip` near 0.2.

    Raises:
        ConfigError: If a number is out of range.
    """

    reduction: Reduction = "sequence"

    def __init__(self, clip: float = 3e-4, clip_high: float = 4e-4, length_normalized: bool = True) -> None:
        if not 0 < clip < 1 or clip_high <= 0:
            raise ConfigError(f"GSPO needs clip in (0, 1) and clip_high positive, got {clip} and {clip_high}.")
        self.low, self.high, self.length_normalized = 1 - clip, 1 + clip_high, length_normalized

    @override
    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, owners: Tensor) -> TokenLoss:
        number = int(owners.max()) + 1 if len(owners) else 0
        apart = sums(logps - old_logps, owners, number)
        if self.length_normalized:
            apart = apart / sums(torch.ones_like(logps), owners, number).clamp(min=1)
        return clipped_loss(ratios_of(apart)[owners], advantages, self.low, self.high)


class CISPO(PolicyLoss):
    """`-sg(min(r, max_ratio)) A log p`: no token is left out (MiniMax 2025, arXiv:2506.13585, equation 4).

    Args:
        max_ratio: The largest weight of a token.

    Raises:
        ConfigError: If it is not positive.
    """

    def __init__(self, max_ratio: float = 5.0) -> None:
        if max_ratio <= 0:
            raise ConfigError(f"CISPO's max_ratio must be positive, got {max_ratio}.")
        self.max_ratio = max_ratio

    @override
    def __call__(self, logps: Tensor, old_logps: Tensor, advantages: Tensor, owners: Tensor) -> TokenLoss:
        ratios = (logps.detach() - old_logps).exp()
        return TokenLoss(-ratios.clamp(max=self.max_ratio) * advantages * logps, ratios > self.max_ratio)


def ratios_of(log_ratios: Tensor) -> Tensor:
    """`exp` without overflow: the product of a long answer's ratios may, and infinity times 0 is no gradient."""
    return log_ratios.clamp(-_FARTHEST, _FARTHEST).exp()


def clipped_loss(ratios: Tensor, advantages: Tensor, low: float, high: float) -> TokenLoss:
    """`-min(r A, clip(r, low, high) A)`, and where the second is smaller, all `[N]`."""
    plain, bounded = ratios * advantages, ratios.clamp(low, high) * advantages
    return TokenLoss(-torch.minimum(plain, bounded), bounded.detach() < plain.detach())


def reduction_weights(
    reduction: Reduction, lengths: Tensor, owners: Tensor, num_tokens: int, num_answers: int, max_new_tokens: int
) -> Tensor:
    """Factors on the token losses, so that their sum divided by `num_tokens` is the reduction.

    Args:
        reduction: Which.
        lengths: Tokens of each answer, int64 `[S]`.
        owners: The answer of each token, int64 `[N]`.
        num_tokens: Tokens of the whole optimizer step, on all ranks.
        num_answers: Answers of the whole optimizer step.
        max_new_tokens: Most tokens of an answer.

    Returns:
        `[N]`, float64; all 1 for `token`.
    """
    if reduction == "token":
        return torch.ones(len(owners), dtype=torch.float64)
    if reduction == "constant":
        return torch.full((len(owners),), num_tokens / (num_answers * max_new_tokens), dtype=torch.float64)
    return (num_tokens / num_answers / lengths.double())[owners]


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None = 0.2) -> tuple[Tensor, Tensor]:
    """`max((V - R)^2, (V_clipped - R)^2) / 2`: a value may not move further than `clip` from what it was.

    As OpenAI's and TRL's PPO do it.

    Args:
        values: `[N]`; carries the gradient.
        old_values: Values when the answers were drawn, `[N]`.
        returns: What they should have been, `[N]`.
        clip: How far a value may move; None: any way.

    Returns:
        Loss of each token `[N]`, and where the clipped error was the larger, bool `[N]`.
    """
    plain = (values - returns).square()
    if clip is None:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    bounded = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    beyond = (values - old_values).detach().abs() > clip
    return torch.maximum(plain, bounded) / 2, beyond & (bounded.detach() > plain.detach())


__all__ = [
    "CISPO",
    "DAPO",
    "GSPO",
    "DrGRPO",
    "PPOClip",
    "PolicyLoss",
    "Reduction",
    "TokenLoss",
    "clipped_loss",
    "reduction_weights",
    "value_loss",
]
