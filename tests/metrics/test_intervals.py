import math

import pytest
import torch

from ftlit.metrics.intervals import bootstrap, interval, wilson


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [  # where |successes/count - p| = z * sqrt(p (1 - p) / count)
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (5, 10, 0.23659, 0.76341),
        (81, 263, 0.25527, 0.36623),  # Newcombe 1998, table I
        (1, 1, 0.20655, 1.0),
    ],
)
def test_wilson(successes, count, low, high):
    assert wilson(successes, count) == pytest.approx((low, high), abs=1e-4)
    for end in wilson(successes, count):
        if 1e-9 < end < 1 - 1e-9:
            half = 1.959964 * math.sqrt(end * (1 - end) / count)
            assert abs(successes / count - end) == pytest.approx(half, rel=1e-5)


def test_bootstrap_is_near_the_normal_interval_of_many_values():
    values = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    low, high = bootstrap(values.tolist())
    half = 1.96 * values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean().item() + half, abs=0.1 * half)


def test_bootstrap_is_repeatable_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    assert bootstrap([0.1, 0.5, 0.7]) == bootstrap([0.1, 0.5, 0.7])
    assert bootstrap([0.3, 0.3]) == pytest.approx((0.3, 0.3))
    assert torch.equal(torch.get_rng_state(), state)


def test_interval_chooses():
    assert interval([0.0, 1.0, 1.0]) == wilson(2, 3)
    assert interval([0.0, 0.5, 1.0]) == bootstrap([0.0, 0.5, 1.0])
    assert all(math.isnan(end) for end in interval([]))
