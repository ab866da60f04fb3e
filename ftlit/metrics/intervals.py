"""95 % confidence intervals of a mean over rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    Right for few rows and for shares of 0 and 1, where the textbook interval has no width.

    Args:
        successes: How many rows passed.
        count: How many rows there are, at least 1.

    Example:
        >>> [round(end, 3) for end in wilson(5, 10)]
        [0.237, 0.763]
    """
    share, z2 = successes / count, _Z**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == count else centre + half


def bootstrap(
    values: Sequence[float], weights: Sequence[float] | None = None, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron 1979, doi:10.1214/aos/1176344552); the same for the same values.

    Args:
        values: One value a row, at least one.
        weights: Weight of each row in the mean; all alike when left out.
        resamples: How many times the rows are drawn anew.
        seed: Seed of the draws; the global generator is not used.
    """
    sample = torch.tensor(values, dtype=torch.float64, device="cpu")
    shares = torch.ones_like(sample) if weights is None else torch.tensor(weights, dtype=torch.float64, device="cpu")
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = [torch.randint(len(sample), (len(sample),), generator=generator, device="cpu") for _ in range(resamples)]
    means = torch.stack([(sample[rows] * shares[rows]).sum() / shares[rows].sum() for rows in drawn])
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64, device="cpu")).tolist()
    return low, high


def wins(margins: Tensor) -> Tensor:
    """1 where a margin is above 0, 0 where it is below, 1/2 for a tie: before training a share of wins is one half."""
    return (margins.sign() + 1) / 2


def interval(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """`wilson` where every value is 0 or 1 and all rows count alike, else `bootstrap`; not a number without values."""
    if not values:
        return math.nan, math.nan
    alike = weights is None or len(set(weights)) == 1
    if alike and all(value in (0.0, 1.0) for value in values):
        return wilson(sum(values), len(values))
    return bootstrap(values, weights)


__all__ = ["bootstrap", "interval", "wilson"]
