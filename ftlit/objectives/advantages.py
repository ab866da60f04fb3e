"""Advantages: how much better an answer, or a token of it, was than expected.

Everything is flat: the N tokens of all answers lie end to end, and `owners` names the answer of each. No padding.

Rewards that are equal but for rounding teach nothing: their advantages are exactly 0. The mean of three times 1000.1 is
not 1000.1 in floating point, and dividing by a standard deviation makes a whole advantage of such a remainder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from ftlit.errors import ConfigError

# Four units in the last place of float32, which is what rewards come in: what differs by less is the same.
_ROUNDING = 4 * torch.finfo(torch.float32).eps

Total = Callable[[Tensor], Tensor]
"""Sums a tensor over the ranks."""


def alone(value: Tensor) -> Tensor:
    """The sum over one rank."""
    return value


class Outcome(NamedTuple):
    """What became of S answers with N tokens together.

    Attributes:
        scores: Reward of each answer, `[S]`.
        token_rewards: Rewards of single tokens besides it, such as a KL penalty, `[N]`.
        owners: The answer of each token, int64 `[N]`: 0, ..., 0, 1, ..., S - 1; no answer is empty.
        groups: The prompt of each answer, any whole numbers, int64 `[S]`.
        values: Expected sum of what follows, before each token, `[N]`; None without a value head.
        baselines: Reward of the greedy answer to the same prompt, `[S]`; None unless an advantage needs it.
        counted: Whether each answer counts, bool `[S]`; the others are as if they had not been drawn. None: all do.
    """

    scores: Tensor
    token_rewards: Tensor
    owners: Tensor
    groups: Tensor
    values: Tensor | None = None
    baselines: Tensor | None = None
    counted: Tensor | None = None

    @property
    def counts(self) -> Tensor:
        """Whether each answer counts, bool `[S]`."""
        return torch.ones_like(self.scores, dtype=torch.bool) if self.counted is None else self.counted

    @property
    def rewards(self) -> Tensor:
        """All rewards of each answer together, float64 `[S]`."""
        return self.scores.double() + sums(self.token_rewards.double(), self.owners, len(self.scores))

    @property
    def placed(self) -> Tensor:
        """Rewards of single tokens, with that of the answer on its last, `[N]`."""
        _, stops = bounds(self.owners)
        return self.token_rewards.index_add(0, stops - 1, self.scores.to(self.token_rewards.dtype))

    @property
    def alike(self) -> Tensor:
        """Of each prompt with an answer that counts whether all of those got one reward, bool `[P]`."""
        rewards, places, size = self.rewards, *_groups(self.groups)
        return _spread(rewards, places, size, self.counts)[1][_occurs(places, size, self.counts)]

    def rewards_to_go(self, gamma: float = 1.0) -> Tensor:
        """All rewards from each token on, `[N]`.

        Args:
            gamma: Discount of a token.
        """
        return gae(self.placed, torch.zeros_like(self.token_rewards), self.owners, gamma, 1.0)


class Estimate(NamedTuple):
    """What the update is told.

    Attributes:
        advantages: Of each token, `[N]`.
        returns: What the value of each token should have been, `[N]`; None without values.
    """

    advantages: Tensor
    returns: Tensor | None = None


class Advantage(ABC):
    """How rewards become advantages. Subclass it in a file of your own and name the class under `model.advantage`."""

    uses_values: ClassVar[bool] = False
    """Whether it needs a value head."""

    uses_greedy: ClassVar[bool] = False
    """Whether it needs the greedy answer to each prompt."""

    least_answers: ClassVar[int] = 1
    """Answers that each prompt must have."""

    gamma: float = 1.0
    """Discount of a token, where values are used."""

    @abstractmethod
    def __call__(self, outcome: Outcome, total: Total = alone) -> Estimate:
        """Estimates the advantages of one rollout.

        Args:
            outcome: What this rank's answers became; all answers to a prompt are on one rank.
            total: Sums over the ranks, for who needs statistics of the whole rollout.
        """


class GAE(Advantage):
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, equation 16).

    The reward of an answer lies on its last token, the end token where it has one; after it the value is 0.

    Args:
        gamma: Discount of a token.
        lam: Weight of longer returns: 1 is the return less the value, 0 the one-step error.
        whiten: Whether the advantages of a rollout get mean 0 and variance 1, over the tokens of all ranks.

    Raises:
        ConfigError: If a number is not in [0, 1].
    """

    uses_values: ClassVar[bool] = True

    def __init__(self, gamma: float = 1.0, lam: float = 0.95, whiten: bool = True) -> None:
        if not (0 <= gamma <= 1 and 0 <= lam <= 1):
            raise ConfigError(f"GAE's gamma and lam must be in [0, 1], got {gamma} and {lam}.")
        self.gamma, self.lam, self.whiten = gamma, lam, whiten

    @override
    def __call__(self, outcome: Outcome, total: Total = alone) -> Estimate:
        assert outcome.values is not None
        advantages = gae(outcome.placed, outcome.values, outcome.owners, self.gamma, self.lam)
        returns = advantages + outcome.values
        if not self.whiten:
            return Estimate(advantages, returns)
        counted = outcome.counts[outcome.owners]
        white = torch.zeros_like(advantages)
        white[counted] = whiten(advantages[counted], total, beside=returns[counted])
        return Estimate(white, returns)


class GRPO(Advantage):
    """The reward less the mean of the answers to the same prompt (Shao et al. 2024, arXiv:2402.03300, section 4.1.2).

    Args:
        std: Whether it is divided by their standard deviation, too. Without, hard and easy prompts do not count more
            than others (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).
    """

    least_answers: ClassVar[int] = 2

    def __init__(self, std: bool = True) -> None:
        self.std = std

    @override
    def __call__(self, outcome: Outcome, total: Total = alone) -> Estimate:
        off, places, counts = _compared(outcome)
        if self.std:
            deviation = (sums(off.square(), places, len(counts)) / (counts - 1).clamp(min=1)).sqrt()
            off = off / (deviation + 1e-4)[places]
        return _each_token(off, outcome)


class RLOO(Advantage):
    """The reward less the mean of the other answers to the same prompt (Ahmadian et al. 2024, arXiv:2402.14740)."""

    least_answers: ClassVar[int] = 2

    @override
    def __call__(self, outcome: Outcome, total: Total = alone) -> Estimate:
        off, places, counts = _compared(outcome)
        return _each_token(off * (counts.double() / (counts - 1).clamp(min=1))[places], outcome)


class ReMax(Advantage):
    """The reward less that of the greedy answer to the same prompt (Li et al. 2023, arXiv:2310.10505)."""

    uses_greedy: ClassVar[bool] = True

    @override
    def __call__(self, outcome: Outcome, total: Total = alone) -> Estimate:
        assert outcome.baselines is not None
        rewards, baselines = outcome.rewards, outcome.baselines.double()
        off = rewards - baselines
        same = off.abs() <= _ROUNDING * torch.maximum(rewards.abs(), baselines.abs())
        return _each_token(off.masked_fill(same | ~outcome.counts, 0.0), outcome)


def _each_token(values: Tensor, outcome: Outcome) -> Estimate:
    """What is said of an answer, said of each of its tokens."""
    return Estimate(values.to(outcome.token_rewards.dtype)[outcome.owners])


def _compared(outcome: Outcome) -> tuple[Tensor, Tensor, Tensor]:
    """How far each answer is from the mean of those to its prompt that count.

    Returns:
        That, float64 `[S]`, exactly 0 where all have one reward and where an answer does not count; the group of each
        as 0, 1, ... `[S]`; and how many of each group count.

    Raises:
        ValueError: If a prompt has one answer only.
    """
    places, size = _groups(outcome.groups)
    if len(size) and int(size.min()) < 2:
        raise ValueError("every prompt needs at least two answers to compare")
    counted, rewards = outcome.counts, outcome.rewards
    least, alike = _spread(rewards, places, size, counted)
    counts = torch.zeros_like(size).index_add(0, places, counted.to(size.dtype))
    above = (rewards - least[places]).masked_fill(~counted, 0.0)  # a common level would only cost digits
    off = above - (sums(above, places, len(size)) / counts.clamp(min=1))[places]
    return off.masked_fill(~counted | alike[places], 0.0), places, counts


def _groups(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The group of each answer as 0, 1, ... `[S]`, and the size of each group."""
    _, places, sizes = groups.unique(return_inverse=True, return_counts=True)
    return places, sizes


def _occurs(places: Tensor, size: Tensor, counted: Tensor) -> Tensor:
    """Whether any answer of each group counts."""
    return torch.zeros_like(size).index_add(0, places, counted.to(size.dtype)) > 0


def _spread(rewards: Tensor, places: Tensor, size: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The least reward of each group, and whether its rewards are all the same; of the answers that count."""
    extremes = []
    for sign in (-1.0, 1.0):
        start = rewards.new_full((len(size),), -torch.inf)
        extremes.append(sign * start.scatter_reduce(0, places[counted], sign * rewards[counted], "amax"))
    least, most = extremes
    rounding = _ROUNDING * torch.maximum(least.abs(), most.abs())
    none = ~_occurs(places, size, counted)
    return least.masked_fill(none, 0.0), (most - least <= rounding) | none


def sums(values: Tensor, owners: Tensor, number: int) -> Tensor:
    """Sum of each answer's tokens.

    Args:
        values: `[N]`; may carry a gradient.
        owners: The answer of each, int64 `[N]`.
        number: S, the number of answers.

    Returns:
        `[S]`.
    """
    return values.new_zeros(number).index_add(0, owners, values)


def bounds(owners: Tensor) -> tuple[Tensor, Tensor]:
    """Where each answer begins, and where it stops (one past its last token), int64 `[S]`.

    Raises:
        ValueError: If the answers do not lie one after the other, or one is empty.
    """
    numbers, lengths = owners.unique_consecutive(return_counts=True)
    if not torch.equal(numbers, torch.arange(len(numbers), device=owners.device)):
        raise ValueError("owners must be 0, ..., 0, 1, ..., S - 1 without a gap")
    stops = lengths.cumsum(0)
    return stops - lengths, stops


def gae(rewards: Tensor, values: Tensor, owners: Tensor, gamma: float, lam: float) -> Tensor:
    """`A_t = delta_t + gamma lam A_(t+1)` with `delta_t = r_t + gamma V_(t+1) - V_t`, inside each answer.

    Args:
        rewards: `[N]`.
        values: Value before each token, `[N]`; it is 0 after an answer's last token.
        owners: The answer of each token, int64 `[N]`.
        gamma: Discount.
        lam: Weight of longer returns.

    Returns:
        Advantages, `[N]`.
    """
    starts, stops = bounds(owners)
    after = torch.zeros_like(values)
    after[:-1] = values[1:]
    after[stops - 1] = 0
    deltas = rewards + gamma * after - values
    out, carry = torch.zeros_like(deltas), deltas.new_zeros(len(starts))
    for back in range(int((stops - starts).max()) if len(starts) else 0):
        live = (stops - starts) > back
        places = (stops - 1 - back)[live]
        carry[live] = deltas[places] + gamma * lam * carry[live]
        out[places] = carry[live]
    return out


def whiten(values: Tensor, total: Total = alone, beside: Tensor | None = None) -> Tensor:
    """Values with mean 0 and (unbiased) variance 1 over all of them, on all ranks; 0 where they differ by rounding.

    Args:
        values: This rank's, `[N]`; real tokens only.
        total: Sums over the ranks.
        beside: What the values are differences of, `[N]`: its rounding counts, too.
    """
    count, mean, variance = moments(values, total)
    wide = values.double() - mean
    if count < 2:
        return wide.to(values.dtype)
    size = mean.square() + variance
    if beside is not None:
        size = size + moments(beside.double().square(), total)[1]
    if variance <= _ROUNDING**2 * size:
        return torch.zeros_like(values)
    return (wide * (variance + 1e-8).rsqrt()).to(values.dtype)


def moments(values: Tensor, total: Total = alone) -> tuple[int, Tensor, Tensor]:
    """Number, mean and unbiased variance (0 for one value) of the values of all ranks, in float64."""
    wide = values.double()
    count, first = total(torch.stack([torch.tensor(float(wide.numel()), device=wide.device).double(), wide.sum()]))
    mean = first / count.clamp(min=1)
    squares = total((wide - mean).square().sum())
    return int(count), mean, squares / (count - 1).clamp(min=1)


__all__ = [
    "GAE",
    "GRPO",
    "RLOO",
    "Advantage",
    "Estimate",
    "Outcome",
    "ReMax",
    "Total",
    "alone",
    "bounds",
    "gae",
    "moments",
    "sums",
    "whiten",
]
