import pytest
import torch
from torch.nn import functional as F

from ftlit.errors import ConfigError
from ftlit.models.score import Head, token_scores
from ftlit.objectives.scores import TokenScores
from ftlit.objectives.sft import DFT, CrossEntropy, LabelSmoothing, TokenObjective
from ftlit.stages import SFT
from ftlit.testing import tiny_lm


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(9, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    return hidden, weight, torch.randint(30, (9,), generator=generator)


def compare(objective, reference):
    """Values and gradients of an objective through the token-score head against a formula on all logits."""
    hidden, weight, targets = problem()
    ours = objective(token_scores(hidden, Head(weight), targets, objective.needs, tile_bytes=4 * 30 * 4))
    theirs = reference(hidden @ weight.t(), targets)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    upstream = torch.linspace(0.5, 2, 9, dtype=torch.float64)
    grads = [torch.autograd.grad((loss * upstream).sum(), [hidden])[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_cross_entropy():
    compare(CrossEntropy(), lambda logits, targets: F.cross_entropy(logits, targets, reduction="none"))


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.9])
def test_label_smoothing_is_that_of_torch(epsilon):
    compare(
        LabelSmoothing(epsilon),
        lambda logits, targets: F.cross_entropy(logits, targets, reduction="none", label_smoothing=epsilon),
    )


def test_dft_weighs_by_the_probability_as_a_constant():
    def reference(logits, targets):
        logps = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
        return -logps.detach().exp() * logps

    compare(DFT(), reference)


def test_dft_gradient_on_a_coin():
    """Of two equally likely tokens: half the gradient of cross-entropy."""
    hidden = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    head, target = Head(torch.tensor([[1.0], [-1.0]], dtype=torch.float64)), torch.tensor([0])
    losses = [objective(token_scores(hidden, head, target)) for objective in (DFT(), CrossEntropy())]
    dft, plain = (torch.autograd.grad(loss.sum(), [hidden])[0] for loss in losses)
    torch.testing.assert_close(dft, plain / 2)


@pytest.mark.parametrize("epsilon", [-0.1, 1.0])
def test_a_share_is_between_zero_and_one(epsilon):
    with pytest.raises(ConfigError, match="epsilon must be in"):
        LabelSmoothing(epsilon)


def test_an_objective_that_needs_what_there_is_not():
    class Odd(TokenObjective):
        needs = frozenset({"entropi"})

        def __call__(self, scores: TokenScores):
            return scores.logps

    with pytest.raises(ConfigError, match=r"Odd.needs: there is no score 'entropi': did you mean 'entropy'"):
        SFT(policy=tiny_lm(), objective=Odd())
    with pytest.raises(ConfigError, match=r"model.extra_metrics: there is no score 'x'"):
        SFT(policy=tiny_lm(), extra_metrics=["x"])
