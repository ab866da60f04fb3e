"""Integral control of a weight from a measured excess."""

from __future__ import annotations

import math

from ftlit.errors import ConfigError

_LEAST = 0.05
"""A weight this small counts as 0; from it the weight grows again."""
_IN_A_ROW = 4
_MARGIN = 1.25  # for the noise of a measurement and for what has not settled yet


class IntegralController:
    """Turns a weight so that what is measured stays within a limit.

    The logarithm of the weight is the integral over time of the excess `e = clip(ln(measured / allowed), -1, 2)`: a
    measurement multiplies the weight by `exp(integral * e * elapsed)`, within `[0.05, most]` (anti-windup: a long
    stretch on one side of the limit is not paid back on the other), and at 0.05 the weight is 0. This is dual ascent on
    the constraint (Platt and Barr 1987) by multiplicative updates (exponentiated gradient, Kivinen and Warmuth 1997).
    What is forgotten falls about as a power of the weight, over several orders of magnitude; so logarithms on both
    sides make the gain mean the same for every budget, and slack early on does not switch the control off.

    Args:
        limit: What is allowed in the end, such as nats a token; positive.
        integral: Gain: how much the logarithm of the weight grows in a unit of time with e times what is allowed.
        most: Largest weight.
        first: Weight before the first measurement.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(self, limit: float, integral: float = 1.0, most: float = 20.0, first: float = 1.0) -> None:
        if limit <= 0 or integral <= 0 or most <= 0 or not 0 <= first <= most:
            raise ConfigError(
                "a controller needs a positive limit, gain and largest weight, and a first weight up to the largest; "
                f"got {limit}, {integral}, {most}, {first}."
            )
        self.limit, self.integral, self.most = limit, integral, most
        self.least = min(_LEAST, most)
        self.log = math.log(max(first, self.least))
        self.weight = first
        self.hopeless = 0  # measurements in a row from which the limit seems out of reach

    def update(self, measured: float, share: float = 1.0, elapsed: float = 1.0, left: float | None = None) -> float:
        """Takes a measurement and returns the new weight.

        Args:
            measured: The measurement.
            share: What is allowed by now, as a multiple of the limit; positive.
            elapsed: Time since the measurement before, in the unit of the gain.
            left: Time in which the weight can still be turned; None: as long as it takes.
        """
        allowed = share * self.limit
        error = min(2.0, max(-1.0, math.log(max(measured, allowed / 8) / allowed)))
        before = self.weight
        low, high = math.log(self.least), math.log(self.most)
        self.log = min(high, max(low, self.log + self.integral * error * elapsed))
        self.weight = self.most if self.log == high else 0.0 if self.log == low else math.exp(self.log)
        # At best what is measured falls as 1 / (1 + weight), the target's share of the loss.
        growth = math.exp(min(50.0, self.integral * max(0.0, error) * left)) if left is not None else math.inf
        reach = min(self.most, max(self.weight, self.least) * growth)
        best = measured * (1 + before) / (1 + max(before, reach))
        self.hopeless = self.hopeless + 1 if best > _MARGIN * max(1.0, share) * self.limit else 0
        return self.weight

    @property
    def out_of_reach(self) -> bool:
        """Whether four measurements in a row say that the weight cannot grow to where the limit would be kept."""
        return self.hopeless >= _IN_A_ROW

    def state_dict(self) -> dict[str, float]:
        """What a run that goes on needs."""
        return {name: getattr(self, name) for name in ("log", "weight", "hopeless")}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from it."""
        for name, value in state.items():
            setattr(self, name, value)


__all__ = ["IntegralController"]
