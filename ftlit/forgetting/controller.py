"""Integral control of a weight from a measured excess."""

from __future__ import annotations

from ftlit.errors import ConfigError

_IN_A_ROW = 4
_MARGIN = 1.25  # for the noise of a measurement and for what has not settled yet


class IntegralController:
    """Turns a weight so that what is measured stays within a limit.

    With the excess `e = clip((measured - limit) / limit, -1, 3)` of a measurement, smoothed to `s` by an exponential
    mean that halves what was before, the weight is `clip(I + proportional * s, 0, most)`, and the integral `I` grows by
    `integral * e` within `[0, most]`, and not while the weight is at its most (anti-windup): a long stretch on one side
    of the limit is not paid back on the other. This is dual ascent on
    the constraint (Platt and Barr 1987) with a proportional part (PID-Lagrangian, Stooke et al. 2020,
    arXiv:2007.03964), on an error in units of the limit, so that its gains mean the same for every budget.

    Args:
        limit: What is allowed, such as nats a token; positive.
        integral: Gain of the integral, weight a measurement that exceeds the limit by itself.
        proportional: Gain of the proportional part.
        most: Largest weight.
        first: Weight before the first measurement.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(
        self, limit: float, integral: float = 0.5, proportional: float = 1.0, most: float = 20.0, first: float = 1.0
    ) -> None:
        if limit <= 0 or integral <= 0 or proportional < 0 or most <= 0 or not 0 <= first <= most:
            raise ConfigError(
                "a controller needs a positive limit, integral gain and largest weight, a proportional gain of at "
                f"least 0 and a first weight up to the largest; got {limit}, {integral}, {most}, {proportional}, "
                f"{first}."
            )
        self.limit, self.integral, self.proportional, self.most = limit, integral, proportional, most
        self.sum, self.smooth, self.weight = first, 0.0, first
        self.measurements = 0
        self.hopeless = 0  # measurements in a row from which the limit seems out of reach

    def update(self, measured: float, left: int | None = None) -> float:
        """Takes a measurement and returns the new weight.

        Args:
            measured: The measurement.
            left: How many follow; None: as many as it takes.
        """
        error = min(3.0, max(-1.0, (measured - self.limit) / self.limit))
        before = self.weight
        self.smooth = error if self.measurements == 0 else 0.5 * (self.smooth + error)
        self.measurements += 1
        if self.weight < self.most or error < 0:
            self.sum = min(self.most, max(0.0, self.sum + self.integral * error))
        self.weight = min(self.most, max(0.0, self.sum + self.proportional * self.smooth))
        # At best what is measured falls as 1 / (1 + weight), the target's share of the loss.
        reach = self.most if left is None else min(self.most, self.weight + left * self.integral * max(0.0, error))
        best = measured * (1 + before) / (1 + max(before, reach))
        self.hopeless = self.hopeless + 1 if best > _MARGIN * self.limit else 0
        return self.weight

    @property
    def out_of_reach(self) -> bool:
        """Whether four measurements in a row say that the weight cannot grow to where the limit would be kept."""
        return self.hopeless >= _IN_A_ROW

    def state_dict(self) -> dict[str, float]:
        """What a run that goes on needs."""
        names = ("sum", "smooth", "weight", "measurements", "hopeless")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from it."""
        for name, value in state.items():
            setattr(self, name, value)


__all__ = ["IntegralController"]
