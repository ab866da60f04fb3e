"""The largest share of the way within a limit: never beyond it, near it, by few measurements."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlit.forgetting.share import largest_share


class Lost:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, share):
        self.asked.append(share)
        return self.function(share)


@given(st.floats(0.01, 5.0), st.floats(0.0, 1.0), st.floats(0.5, 3.0), st.floats(0.002, 0.2))
def test_of_a_curve_that_grows(size, straight, power, limit):
    lost = Lost(lambda a: size * (straight * a + (1 - straight) * a**power))
    share = largest_share(lost, limit)
    assert all(0 < a <= 1 for a in lost.asked)
    assert len(lost.asked) <= 8
    if lost.function(1.0) <= limit:
        assert share == 1.0
        assert len(lost.asked) == 1
        return
    assert share in lost.asked
    assert lost.function(share) <= limit
    best = max(a for a in (i / 4096 for i in range(4097)) if lost.function(a) <= limit)
    assert share >= 0.8 * best - 1 / 64


def test_a_square_needs_two_measurements():
    lost = Lost(lambda a: 0.1 * a * a)
    assert largest_share(lost, math.log(1.02)) == pytest.approx(math.sqrt(math.log(1.02) / 0.1), rel=0.02)
    assert len(lost.asked) == 2


@given(st.lists(st.floats(-0.1, 1.0), min_size=9, max_size=9), st.floats(0.01, 0.5))
def test_of_whatever_is_measured_nothing_beyond_the_limit_is_taken(values, limit):
    values = iter([limit + 1.0, *values])
    said = {}

    def lost(share):
        said[share] = next(values)
        return said[share]

    share = largest_share(lost, limit)
    assert share == 0.0 or said[share] <= limit


def test_a_limit_that_no_share_meets():
    assert largest_share(lambda a: 1.0, 0.01) == 0.0
