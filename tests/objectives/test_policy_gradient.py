"""Policy and value losses against loops over sequences, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.errors import ConfigError
from ftlit.objectives.policy_gradient import CISPO, DAPO, GSPO, DrGRPO, PPOClip, reduction_weights, value_loss

LENGTHS = [4, 1, 6, 2]
MOST = 8


def case(seed, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    old = -torch.rand(len(owners), generator=generator, dtype=torch.float64) * 3
    new = (old + 0.15 * torch.randn(len(owners), generator=generator, dtype=torch.float64)).requires_grad_()
    return new, old, torch.randn(len(owners), generator=generator, dtype=torch.float64), owners


def reduced(loss, case):
    """The loss of a step, as the stage makes it."""
    new, old, advantages, owners = case
    lengths = torch.bincount(owners)
    weights = reduction_weights(loss.reduction, lengths, owners, len(owners), len(lengths), MOST)
    return (loss(new, old, advantages, owners).loss * weights).sum() / len(owners)


def by_hand(kind, case, low, high, top=None):
    """The same from the papers, one answer and one token at a time."""
    new, old, advantages, owners = case
    per_answer, all_tokens = [], []
    for one in range(int(owners.max()) + 1):
        at = (owners == one).nonzero()[:, 0].tolist()
        logs = [new[t] - old[t] for t in at]
        terms = []
        for t, log in zip(at, logs, strict=True):
            a = advantages[t].item()
            if kind == "gspo":
                ratio = torch.exp(sum(logs) / len(at))
            elif kind == "rloo":
                ratio = torch.exp(sum(logs))
            else:
                ratio = torch.exp(log)
            if kind == "cispo":
                terms.append(-min(ratio.item(), top) * a * new[t])
                continue
            clipped = min(max(ratio.item(), low), high)
            bounded = ratio if clipped == ratio.item() else torch.tensor(clipped, dtype=torch.float64)
            terms.append(-ratio * a if ratio.item() * a <= clipped * a else -bounded * a)
        per_answer.append(sum(terms) / len(terms))
        all_tokens += terms
    if kind in ("grpo", "gspo", "rloo"):
        return sum(per_answer) / len(per_answer)
    if kind == "dr_grpo":
        return sum(all_tokens) / (len(per_answer) * MOST)
    return sum(all_tokens) / len(all_tokens)


LOSSES = {
    "ppo": (PPOClip(0.2), {"low": 0.8, "high": 1.2}),
    "grpo": (PPOClip(0.1, reduction="sequence"), {"low": 0.9, "high": 1.1}),
    "dapo": (DAPO(0.2, 0.28), {"low": 0.8, "high": 1.28}),
    "dr_grpo": (DrGRPO(0.2), {"low": 0.8, "high": 1.2}),
    "gspo": (GSPO(0.05, 0.08), {"low": 0.95, "high": 1.08}),
    "rloo": (GSPO(0.2, 0.2, length_normalized=False), {"low": 0.8, "high": 1.2}),
    "cispo": (CISPO(1.1), {"low": 0, "high": 0, "top": 1.1}),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("seed", range(4))
def test_losses_and_gradients_equal_the_papers(kind, seed):
    loss, limits = LOSSES[kind]
    one = case(seed)
    if kind in ("gspo", "rloo"):  # their papers give one advantage to an answer
        one = (*one[:2], torch.tensor([0.7, -1.1, 0.4, 2.0], dtype=torch.float64)[one[3]], one[3])
    ours, theirs = reduced(loss, one), by_hand(kind, one, **limits)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    grads = [torch.autograd.grad(value, one[0], retain_graph=True)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize("kind", LOSSES)
def test_at_the_first_update_all_have_the_plain_policy_gradient(kind):
    """With a ratio of 1 nothing is clipped, and the gradient is that of `-A log p`."""
    loss, _ = LOSSES[kind]
    _, old, _, owners = case(0)
    advantages = torch.tensor([0.7, -1.1, 0.4, 2.0], dtype=torch.float64)[owners]
    new = old.clone().requires_grad_()
    said = loss(new, old, advantages, owners)
    assert not said.clipped.any()
    lengths = torch.bincount(owners)
    weights = reduction_weights(loss.reduction, lengths, owners, len(owners), 4, MOST)
    (gradient,) = torch.autograd.grad((said.loss * weights).sum(), new)
    # Product ratios move with every token of their answer.
    factor = lengths[owners] if kind == "rloo" else 1
    torch.testing.assert_close(gradient, -advantages * weights * factor, rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(st.integers(0, 9999), st.floats(0.01, 0.5))
def test_what_is_clipped_has_no_gradient(seed, clip):
    new, old, advantages, owners = case(seed)
    said = PPOClip(clip)(new, old, advantages, owners)
    (gradient,) = torch.autograd.grad(said.loss.sum(), new)
    assert torch.equal(said.clipped, gradient == 0)


def test_the_mean_value_loss_equals_trl_and_openai():
    """`0.5 max((V - R)^2, (clip(V) - R)^2)`, number by number."""
    values, old, returns = [0.5, 2.0, -1.0], [0.4, 1.0, 0.0], [0.0, 3.0, -2.0]
    loss, clipped = value_loss(*(torch.tensor(one, dtype=torch.float64) for one in (values, old, returns)), clip=0.2)
    for v, o, r, found, bound in zip(values, old, returns, loss.tolist(), clipped.tolist(), strict=True):
        moved = min(max(v, o - 0.2), o + 0.2)
        assert found == pytest.approx(0.5 * max((v - r) ** 2, (moved - r) ** 2))
        assert bound == ((moved - r) ** 2 > (v - r) ** 2)
    plain, never = value_loss(*(torch.tensor(one) for one in (values, old, returns)), clip=None)
    assert plain.tolist() == pytest.approx([0.5 * (v - r) ** 2 for v, r in zip(values, returns, strict=True)])
    assert not never.any()


def test_reductions():
    owners = torch.tensor([0, 0, 0, 1])
    lengths = torch.tensor([3, 1])
    # A step of 10 tokens in 4 answers, of which these are two.
    assert reduction_weights("token", lengths, owners, 10, 4, 8).tolist() == [1.0] * 4
    assert reduction_weights("sequence", lengths, owners, 10, 4, 8).tolist() == pytest.approx([10 / 12] * 3 + [2.5])
    assert reduction_weights("constant", lengths, owners, 10, 4, 8).tolist() == pytest.approx([10 / 32] * 4)


@pytest.mark.parametrize(
    "make", [lambda: PPOClip(0), lambda: PPOClip(0.2, -1), lambda: DAPO(2), lambda: GSPO(0), lambda: CISPO(0)]
)
def test_mistakes(make):
    with pytest.raises(ConfigError, match=r"clip|max_ratio"):
        make()
    assert math.isfinite(PPOClip().high)
