"""How far a run may go from its start: the search for the largest share of the way within a limit."""

from __future__ import annotations

import math
from collections.abc import Callable

_TRIES = 7
_NEAR = 0.05  # of the limit: closer from below is not looked for
_FINE = 1 / 128  # of the way, likewise


def largest_share(lost: Callable[[float], float], limit: float) -> float:
    """The largest share of the way from the start with `lost(share) <= limit`, by few measurements.

    What is lost grows about as the square of the share near the start, where its gradient is small: the first guess is
    that of a square, the next ones of the power that two measurements beyond the limit show. Between one within and one
    beyond it they lie on the chord, which of a convex function ends within. Only shares that were measured and are
    within the limit are returned.

    Args:
        lost: What is lost at a share in (0, 1]; 0 at the start. Measured up to 8 times, once if all of the way is fine.
        limit: The most that may be lost, positive.
    """
    whole = lost(1.0)
    if whole <= limit:
        return 1.0
    (low, at_low), (high, at_high), power = (0.0, 0.0), (1.0, whole), 2.0
    for _ in range(_TRIES):
        width = high - low
        if low:
            guess = low + width * (limit - at_low) / (at_high - at_low)
        else:
            guess = high * ((1 - _NEAR / 2) * limit / at_high) ** (1 / power)
        guess = min(max(guess, low + width / 64), high - width / 16)
        found = lost(guess)
        if found <= limit:
            low, at_low = guess, found
        else:
            power = min(2.0, max(0.25, math.log(at_high / found) / math.log(high / guess)))
            high, at_high = guess, found
        if limit - at_low <= _NEAR * limit or (low and high - low <= _FINE):
            break
    return low


__all__ = ["largest_share"]
