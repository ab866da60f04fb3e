import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.models import score as score_module
from ftlit.models.score import Head, token_scores


def reference(hidden, head, targets):
    """Independent: all logits at once, torch's own log-softmax."""
    logits = hidden @ head.weight.t()
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0], logits.argmax(-1) == targets


def problem(num, width=8, vocabulary=50, trained=False, bias=False, scale=1.0, softcap=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden = draw(num, width).requires_grad_()
    weight = draw(vocabulary, width).requires_grad_(trained)
    head = Head(weight, draw(vocabulary).requires_grad_(trained) if bias else None, scale, softcap)
    targets = torch.randint(vocabulary, (num,), generator=generator)
    return hidden, head, targets, draw(num)


@pytest.mark.parametrize("keep_rows", [0, 4, 1000])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 2.0), (1.7, 0.5)])
def test_values_and_gradients_equal_plain_log_softmax(monkeypatch, keep_rows, trained, bias, scale, softcap):
    hidden, head, targets, upstream = problem(11, trained=trained, bias=bias, scale=scale, softcap=softcap)
    monkeypatch.setattr(score_module, "KEEP_BYTES", keep_rows * 50 * 8)
    scores = token_scores(hidden, head, targets, tile_bytes=3 * 50 * 4)
    logps, correct = reference(hidden, head, targets)
    torch.testing.assert_close(scores.logps, logps, rtol=0, atol=1e-12)
    assert torch.equal(scores.correct, correct)
    inputs = [hidden, *([head.weight] if trained else []), *([head.bias] if trained and bias else [])]
    ours = torch.autograd.grad((scores.logps * upstream).sum(), inputs)
    theirs = torch.autograd.grad((logps * upstream).sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@given(num=st.integers(0, 9), rows=st.integers(1, 12), trained=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_tile_does_not_show(num, rows, trained):
    hidden, head, targets, upstream = problem(num, trained=trained)
    whole = token_scores(hidden, head, targets)
    tiled = token_scores(hidden, head, targets, tile_bytes=rows * 50 * 4)
    torch.testing.assert_close(whole.logps, tiled.logps, rtol=0, atol=1e-13)
    (a,) = torch.autograd.grad((whole.logps * upstream).sum(), [hidden])
    (b,) = torch.autograd.grad((tiled.logps * upstream).sum(), [hidden])
    torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_gradcheck():
    hidden, head, targets, _ = problem(4, vocabulary=6, trained=True, bias=True, scale=0.5, softcap=3.0)
    function = lambda h, w, b: token_scores(h, Head(w, b, 0.5, 3.0), targets).logps  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden, head.weight, head.bias))


def test_a_frozen_head_keeps_no_probabilities():
    hidden, head, targets, _ = problem(20)
    scores = token_scores(hidden, head, targets)
    saved = [t.numel() for t in scores.logps.grad_fn.saved_tensors if t is not None]
    assert max(saved) == hidden.numel()


def test_no_gradient_no_work_kept():
    hidden, head, targets, _ = problem(20)
    with torch.no_grad():
        assert token_scores(hidden, head, targets).logps.grad_fn is None


def test_huge_logits_stay_finite():
    head = Head(torch.tensor([[1e4], [-1e4]], dtype=torch.float64))
    hidden = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    scores = token_scores(hidden, head, torch.tensor([0, 1]))
    torch.testing.assert_close(scores.logps, torch.tensor([0.0, -2e4], dtype=torch.float64))
    assert torch.isfinite(torch.autograd.grad(scores.logps.sum(), [hidden])[0]).all()


def test_half_precision_is_scored_in_float32():
    hidden, head, targets, _ = problem(20, vocabulary=300)
    half = token_scores(hidden.bfloat16(), Head(head.weight.bfloat16()), targets)
    assert half.logps.dtype == torch.float32
    expected, _ = reference(hidden.bfloat16().double(), Head(head.weight.bfloat16().double()), targets)
    assert (half.logps - expected).abs().max() < 0.1
