import collections
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ftlit.errors import ConfigError
from ftlit.objectives.reward import BradleyTerry, PlackettLuce, RewardScores

number = st.floats(-8, 8)


def scores_of(rewards, pairs, margins=None):
    better, worse = torch.tensor(pairs).unbind(1)
    margins = torch.tensor([0.0] * len(pairs) if margins is None else margins, dtype=torch.float64)
    return RewardScores(torch.tensor(rewards, dtype=torch.float64, requires_grad=True), better, worse, margins)


def ranking(count, first=0):
    return [(first + i, first + j) for i in range(count) for j in range(i + 1, count)]


def by_hand(rewards, pairs, margins, center):
    """Scalars and a loop: `log(1 + exp(-(b - w - m)))`."""
    out = []
    for (b, w), m in zip(pairs, margins, strict=True):
        gap = rewards[b] - rewards[w] - m
        out.append(math.log1p(math.exp(-gap)) + center * (rewards[b] + rewards[w]) ** 2)
    return out


@settings(max_examples=50, deadline=None)
@given(st.lists(number, min_size=4, max_size=4), st.lists(st.floats(0, 3), min_size=6, max_size=6), st.floats(0, 1))
def test_bradley_terry_is_the_formula(rewards, margins, center):
    pairs = ranking(4)
    got = BradleyTerry(center=center)(scores_of(rewards, pairs, margins))
    assert got.tolist() == pytest.approx(by_hand(rewards, pairs, margins, center), rel=1e-9, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(number, min_size=2, max_size=6))
def test_plackett_luce_is_the_likelihood_of_the_ranking(rewards):
    """`-log prod_k exp(r_k) / sum_{j >= k} exp(r_j)`: the parts of a ranking add up to it; two answers are a pair."""
    likelihood = 1.0
    for k in range(len(rewards) - 1):
        likelihood *= math.exp(rewards[k]) / sum(math.exp(r) for r in rewards[k:])
    scores = scores_of(rewards, ranking(len(rewards)))
    assert PlackettLuce()(scores).sum().item() == pytest.approx(-math.log(likelihood), rel=1e-9, abs=1e-9)
    if len(rewards) == 2:
        torch.testing.assert_close(PlackettLuce()(scores), BradleyTerry()(scores))


def test_plackett_luce_over_rankings_side_by_side_and_best_against_rest():
    together = PlackettLuce()(scores_of([1.0, 0.5, -1.0, 2.0, 0.0], [*ranking(3), *ranking(2, first=3)]))
    apart = [PlackettLuce()(scores_of([1.0, 0.5, -1.0], ranking(3))), PlackettLuce()(scores_of([2.0, 0.0], ranking(2)))]
    torch.testing.assert_close(together, torch.cat(apart))
    rewards = [0.3, 1.0, -0.5]
    best = PlackettLuce()(scores_of(rewards, [(0, 1), (0, 2)])).sum()
    torch.testing.assert_close(best, -torch.log_softmax(torch.tensor(rewards, dtype=torch.float64), 0)[0])


def test_margins_of_a_pair_mean_the_same_in_both():
    scores = scores_of([0.4, -0.3], [(0, 1)], [0.7])
    torch.testing.assert_close(PlackettLuce()(scores), BradleyTerry()(scores))


@pytest.mark.parametrize("loss", [BradleyTerry(), BradleyTerry(center=0.3), PlackettLuce(), PlackettLuce(center=0.3)])
def test_gradients(loss):
    pairs = ranking(4)
    better, worse = torch.tensor(pairs).unbind(1)
    margins = torch.linspace(0, 1, 6, dtype=torch.float64)
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: loss(RewardScores(r, better, worse, margins)), rewards)


def test_finite_far_out():
    for loss in (BradleyTerry(), PlackettLuce()):
        for rewards in ([1e4, -1e4], [-1e4, 1e4]):
            scores = scores_of(rewards, [(0, 1)])
            value = loss(scores)
            value.sum().backward()
            assert value.isfinite().all()
            assert scores.rewards.grad.isfinite().all()


@pytest.mark.parametrize(("center", "margin"), [(None, False), (0.01, False), (0.5, True)])
def test_equal_to_trl(center, margin):
    """The lines of TRL's own `RewardTrainer.compute_loss`, called on logits that a stub returns."""
    trl = pytest.importorskip("trl")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 1, generator=generator, dtype=torch.float64)
    margins = torch.rand(5, generator=generator, dtype=torch.float64)

    class Model(nn.Module):
        def forward(self, **inputs):
            return type("Output", (), {"logits": inputs["input_ids"]})()

    class Accelerator:
        gather = gather_for_metrics = staticmethod(lambda value: value)

    trainer = object.__new__(trl.RewardTrainer)
    trainer.model = Model().train()
    trainer.args = type("Args", (), {"center_rewards_coefficient": center})()
    trainer.accelerator, trainer._tp_size, trainer._total_train_tokens = Accelerator(), 1, 0
    trainer._metrics = {"train": collections.defaultdict(list)}
    inputs = {"input_ids": logits, "attention_mask": torch.ones(10, 3), **({"margin": margins} if margin else {})}
    theirs = trainer.compute_loss(trainer.model, inputs)
    pairs = [(i, i + 5) for i in range(5)]
    scores = scores_of(logits[:, 0].tolist(), pairs, margins.tolist() if margin else None)
    ours = BradleyTerry(center=center or 0.0)(scores).mean()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_negative_center_is_refused():
    with pytest.raises(ConfigError, match="center"):
        BradleyTerry(center=-1)
