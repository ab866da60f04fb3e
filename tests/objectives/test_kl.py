"""Estimators of the KL divergence, and its steered penalty."""

import pytest
import torch

from ftlit.errors import ConfigError
from ftlit.objectives.kl import KLPenalty, kl_estimate


def two(seed=0, size=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.log_softmax(torch.randn(size, generator=generator, dtype=torch.float64), 0) for _ in range(2)]


def test_their_means_over_the_distribution():
    """k1 and k3 are the divergence in expectation; k2 comes near it where the two are close; k3 is never negative."""
    policy, reference = two()
    exact = (policy.exp() * (policy - reference)).sum().item()
    mean = {k: (policy.exp() * kl_estimate(policy, reference, k)).sum().item() for k in ("k1", "k2", "k3")}
    assert mean["k1"] == pytest.approx(exact, abs=1e-12)
    assert mean["k3"] == pytest.approx(exact, abs=1e-12)
    assert (kl_estimate(policy, reference, "k3") >= 0).all()
    close = torch.log_softmax(policy + 0.01 * (reference - policy), 0)
    exact = (policy.exp() * (policy - close)).sum().item()
    assert (policy.exp() * kl_estimate(policy, close, "k2")).sum().item() == pytest.approx(exact, rel=0.03)


def test_their_gradients_as_a_loss():
    """In expectation that of k2 is the gradient of KL(policy || reference), k1 has none, k3 that of the reverse KL."""
    logits, reference = two(1)
    logits = logits.clone().requires_grad_()

    def gradient(function):
        return torch.autograd.grad(function(torch.log_softmax(logits, 0)), logits)[0]

    def expected(estimator):
        return gradient(lambda p: (p.exp().detach() * kl_estimate(p, reference, estimator)).sum())

    forward = gradient(lambda p: (p.exp() * (p - reference)).sum())
    reverse = gradient(lambda p: (reference.exp() * (reference - p)).sum())
    torch.testing.assert_close(expected("k1"), torch.zeros(7, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(expected("k2"), forward, rtol=0, atol=1e-12)
    torch.testing.assert_close(expected("k3"), reverse, rtol=0, atol=1e-12)


def test_the_weight_follows_ziegler():
    penalty = KLPenalty(coef=0.2, target=6.0)
    assert penalty.adapted(0.2, 6.0) == pytest.approx(0.2)
    assert penalty.adapted(0.2, 6.6) == pytest.approx(0.2 * 1.01)
    assert penalty.adapted(0.2, 60.0) == pytest.approx(0.2 * 1.02)
    assert penalty.adapted(0.2, 0.0) == pytest.approx(0.2 * 0.98)
    assert KLPenalty(coef=0.2).adapted(0.2, 99.0) == 0.2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"coef": -1}, "coef >= 0"),
        ({"target": 0}, "positive target"),
        ({"rate": 2}, "rate in"),
        ({"place": "los"}, "reward or loss"),
        ({"estimator": "k4"}, "k1, k2 or k3"),
        ({"place": "loss"}, "k1 has no gradient"),
        ({"coef": 0, "target": 1}, "must not be 0"),
    ],
)
def test_mistakes(settings, says):
    with pytest.raises(ConfigError, match=says):
        KLPenalty(**settings)
