"""Half precision: the product of states and output layer is in half precision, and nothing that is summed after it."""

import pytest
import torch

from ftlit.models.divergence import token_kl
from ftlit.models.heads import apply_head
from ftlit.models.score import Head, token_scores
from ftlit.peft.lora_layers import LowRank
from ftlit.testing import tiny_classifier

WIDTH, VOCABULARY, ROWS = 64, 1500, 96


def inputs(dtype=torch.bfloat16):
    """States of two models that differ little, and an output layer, all exact in half precision."""
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=make).to(dtype)
    moved = hidden + (0.02 * torch.randn(ROWS, WIDTH, generator=make)).to(dtype)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=make) / 4).to(dtype)
    return hidden, moved, weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_small_divergence_is_not_drowned_by_rounding(dtype, autocast):
    hidden, moved, weight = inputs(dtype)
    exact = token_kl(moved.double(), Head(weight.double()), hidden.double(), Head(weight.double()))
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        found = token_kl(moved, Head(weight), hidden, Head(weight))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", ["frozen", "trained", "low rank", "bias"])
def test_the_gradient_of_a_divergence_under_autocast_follows_float32(head):
    hidden, moved, weight = inputs()

    def gradients(autocast, wide):
        states = moved.to(wide).requires_grad_()
        own = weight.to(wide).requires_grad_(head == "trained")
        bias = torch.linspace(-1, 1, VOCABULARY, dtype=wide) if head == "bias" else None
        factors = [torch.full(shape, 0.05, dtype=torch.float32) for shape in ((4, WIDTH), (VOCABULARY, 4))]
        factors[1][::2] = -0.05
        low = LowRank(*(factor.requires_grad_() for factor in factors), 1.0, 0.0) if head == "low rank" else None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = token_kl(states, Head(own, bias, low_rank=low), hidden.to(wide), Head(weight.to(wide)))
        leaves = [leaf for leaf in (states, own, *(factors if low else ())) if leaf.requires_grad]
        return torch.autograd.grad(value.sum(), leaves)

    for half, full in zip(gradients(True, torch.bfloat16), gradients(False, torch.float32), strict=True):
        assert (half.float() - full).norm() < 5e-2 * full.norm()


def test_entropy_and_collision_are_summed_in_float32_under_autocast():
    """In bfloat16 a sum of 1,500 terms is right to three digits at best."""
    hidden, _, weight = inputs()
    targets = torch.arange(ROWS)
    want = token_scores(hidden.float(), Head(weight.float()), targets, watch={"entropy", "log_sum_sq"})
    rounded = (hidden @ weight.t()).float()  # the product alone is rounded
    logps = torch.log_softmax(rounded, dim=-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_scores(hidden, Head(weight), targets, watch={"entropy", "log_sum_sq"})
    torch.testing.assert_close(found.entropy, -(logps.exp() * logps).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.log_sum_sq, (2 * logps).logsumexp(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy, want.entropy, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("family", ["llama", "bert", "roberta"])
def test_scores_of_examples_are_not_rounded_by_autocast(family):
    lm = tiny_classifier(family)
    states = torch.randn(32, lm.config.hidden_size)
    with torch.no_grad():
        want = apply_head(lm, states)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(apply_head(lm, states), want, rtol=0, atol=0)


@pytest.mark.parametrize("tile_rows", [7, 1000])
@pytest.mark.parametrize("keep", [0, 1 << 30])
def test_a_trained_head_multiplies_in_half_precision_in_backward_too(monkeypatch, tile_rows, keep):
    """And its gradient is summed over tiles, and left, in float32."""
    monkeypatch.setattr("ftlit.models.score.KEEP_BYTES", keep)
    hidden, _, weight = inputs()
    targets, seen = torch.arange(ROWS), []

    def gradients(autocast):
        states, own = hidden.float().requires_grad_(), weight.float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logps = token_scores(states, Head(own), targets, tile_bytes=tile_rows * VOCABULARY * 4).logps
        return torch.autograd.grad(logps.sum(), [states, own])

    whole = gradients(False)
    own = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append((a.dtype, a.shape)) or own(a, b))
    half = gradients(True)
    for one, two in zip(half, whole, strict=True):
        assert one.dtype == torch.float32
        assert (one - two).norm() < 1e-2 * two.norm()
    assert {dtype for dtype, shape in seen if shape[0] != VOCABULARY} == {torch.bfloat16}
