import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.models import score as score_module
from ftlit.models.score import Head, token_scores
from ftlit.peft.lora_layers import LowRank


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


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (1.7, 0.5)])
@pytest.mark.parametrize("temperature", [0.3, 0.7, 2.0])
def test_a_temperature_divides_the_logits(trained, scale, softcap, temperature):
    """After the soft-cap, as sampling does; the mean and the entropy too."""
    hidden, head, targets, upstream = problem(11, trained=trained, scale=scale, softcap=softcap)
    scores = token_scores(hidden, head, targets, {"entropy", "mean_logps"}, tile_bytes=600, temperature=temperature)
    logits = hidden @ head.weight.t() * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logps = torch.log_softmax(logits / temperature, -1)
    expected = (logps.gather(1, targets[:, None])[:, 0], logps.mean(1), -(logps.exp() * logps).sum(1))
    inputs = [hidden, *([head.weight] if trained else [])]
    for mine, other in zip((scores.logps, scores.mean_logps, scores.entropy), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
        ours, theirs = (torch.autograd.grad((one * upstream).sum(), inputs, retain_graph=True) for one in (mine, other))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_gradcheck():
    hidden, head, targets, _ = problem(4, vocabulary=6, trained=True, bias=True, scale=0.5, softcap=3.0)
    function = lambda h, w, b: token_scores(h, Head(w, b, 0.5, 3.0), targets).logps  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden, head.weight, head.bias))


def test_a_frozen_head_keeps_no_probabilities():
    hidden, head, targets, _ = problem(20)
    scores = token_scores(hidden, head, targets)
    saved = [t.numel() for t in scores.logps.grad_fn.saved_tensors if t is not None]
    assert max(saved) == hidden.numel()


@pytest.mark.parametrize("trained", [False, True])
def test_the_likeliest_token_is_watched_and_changes_no_gradient(trained):
    hidden, head, targets, upstream = problem(11, trained=trained, bias=True, softcap=2.0)
    plain = token_scores(hidden, head, targets, tile_bytes=600)
    scores = token_scores(hidden, head, targets, watch={"choice"}, tile_bytes=600)
    assert plain.choice is None
    logits = hidden @ head.weight.t() + head.bias
    assert torch.equal(scores.choice, logits.argmax(1))
    assert torch.equal(scores.correct, scores.choice == targets)
    (ours,) = torch.autograd.grad((scores.logps * upstream).sum(), [hidden])
    (theirs,) = torch.autograd.grad((plain.logps * upstream).sum(), [hidden])
    assert torch.equal(ours, theirs)


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


# ---- scores on request ----------------------------------------------------------------------------------------------


def all_logps(hidden, head):
    """Log-probabilities of the whole vocabulary, independent of the code under test."""
    weight = head.weight
    if head.low_rank is not None:
        weight = weight + head.low_rank.scale * head.low_rank.up @ head.low_rank.down
    logits = hidden @ weight.t()
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits, -1)


def expected_scores(hidden, head, targets):
    logps = all_logps(hidden, head)
    return {
        "logps": logps.gather(1, targets[:, None])[:, 0],
        "entropy": -(logps.exp() * logps).sum(1),
        "mean_logps": logps.mean(1),
    }


def with_product(head, rank=3, width=8, vocabulary=50, seed=5):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, width, generator=generator, dtype=torch.float64).requires_grad_()
    up = torch.randn(vocabulary, rank, generator=generator, dtype=torch.float64).requires_grad_()
    return head._replace(low_rank=LowRank(down, up, 0.7, 0.0))


NEEDS = [set(), {"entropy"}, {"mean_logps"}, {"entropy", "mean_logps"}]


@pytest.mark.parametrize("needs", NEEDS, ids=lambda needs: "+".join(sorted(needs)) or "logps")
@pytest.mark.parametrize(
    ("kind", "keep_rows"),
    [("frozen", 0), *((kind, rows) for kind in ("trained", "product", "trained product") for rows in (0, 4, 1000))],
)
@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.3, None), (True, 1.7, 0.5)])
def test_every_score_and_gradient_equals_plain_torch(monkeypatch, needs, keep_rows, kind, bias, scale, softcap):
    trained = kind.startswith("trained")
    hidden, head, targets, _ = problem(11, trained=trained, bias=bias, scale=scale, softcap=softcap)
    if kind.endswith("product"):
        head = with_product(head)
    # exponentials, their sums, and the slope of a soft-cap
    row_bytes = (50 * (1 if softcap is None else 2) + 1) * 8
    monkeypatch.setattr(score_module, "KEEP_BYTES", keep_rows * row_bytes)
    scores = token_scores(hidden, head, targets, needs, tile_bytes=3 * 50 * 4)
    wanted = expected_scores(hidden, head, targets)
    inputs = [hidden, *([head.weight] if trained else []), *([head.bias] if trained and bias else [])]
    inputs += [head.low_rank.down, head.low_rank.up] if head.low_rank else []
    generator = torch.Generator().manual_seed(1)
    ours = theirs = 0.0
    for name in ("logps", *sorted(needs)):
        value = getattr(scores, name)
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-12)
        upstream = torch.randn(11, generator=generator, dtype=torch.float64)
        ours, theirs = ours + (value * upstream).sum(), theirs + (wanted[name] * upstream).sum()
    for name in {"entropy", "mean_logps"} - needs:
        assert getattr(scores, name) is None
    for mine, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["frozen", "product"])
def test_gradcheck_of_every_score(kind):
    hidden, head, targets, _ = problem(4, vocabulary=6, bias=True, scale=0.5, softcap=3.0)
    if kind == "product":
        head = with_product(head, vocabulary=6)
    parts = [] if head.low_rank is None else [head.low_rank.down, head.low_rank.up]

    def function(hidden, *parts):
        own = head if not parts else head._replace(low_rank=LowRank(*parts, 0.7, 0.0))
        scores = token_scores(hidden, own, targets, {"entropy", "mean_logps"}, tile_bytes=2 * 6 * 4)
        return scores.logps, scores.entropy, scores.mean_logps

    assert torch.autograd.gradcheck(function, (hidden, *parts))


@given(num=st.integers(0, 9), rows=st.integers(1, 12), kind=st.sampled_from(["frozen", "trained", "product"]))
@settings(max_examples=40, deadline=None)
def test_the_tile_does_not_show_in_any_score(num, rows, kind):
    hidden, head, targets, upstream = problem(num, trained=kind == "trained", softcap=2.0)
    head = with_product(head) if kind == "product" else head
    needs = {"entropy", "mean_logps"}
    sums = []
    for tile in (None, rows * 50 * 4):
        scores = token_scores(hidden, head, targets, needs, tile_bytes=tile)
        total = (upstream * (scores.logps + 2 * scores.entropy - 3 * scores.mean_logps)).sum()
        sums.append((total, *torch.autograd.grad(total, [hidden])))
    for whole, tiled in zip(*sums, strict=True):
        torch.testing.assert_close(whole, tiled, rtol=0, atol=1e-12)


def test_what_is_only_watched_has_a_value_and_costs_no_memory():
    hidden, head, targets, _ = problem(20)
    scores = token_scores(hidden, head, targets, watch={"entropy", "mean_logps"})
    wanted = expected_scores(hidden, head, targets)
    for name in ("entropy", "mean_logps"):
        torch.testing.assert_close(getattr(scores, name), wanted[name], rtol=0, atol=1e-12)
        assert not getattr(scores, name).requires_grad
    kept = [t for t in scores.logps.grad_fn.saved_tensors if t is not None]
    assert [t.shape for t in kept] == [hidden.shape]
    (ours,) = torch.autograd.grad(scores.logps.sum(), [hidden])
    torch.testing.assert_close(ours, *torch.autograd.grad(wanted["logps"].sum(), [hidden]))


def test_each_score_with_a_gradient_keeps_one_vector_a_row():
    hidden, head, targets, _ = problem(20)
    scores = token_scores(hidden, head, targets, {"entropy", "mean_logps"})
    kept = [t for t in scores.logps.grad_fn.saved_tensors if t is not None]
    assert [t.shape for t in kept] == [hidden.shape] * 3


def test_a_product_beside_the_head_builds_no_matrix():
    """Nothing as large as the weight is kept beside it, forward or backward."""
    hidden, head, targets, _ = problem(3, vocabulary=4000)
    head = with_product(head, vocabulary=4000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        scores = token_scores(hidden, head, targets)
    others = [t for t in kept if t.data_ptr() not in (head.weight.data_ptr(), head.low_rank.up.data_ptr())]
    assert max(t.numel() for t in others) == 3 * 4000  # exponentials of the three rows
    scores.logps.sum().backward()
    assert head.weight.grad is None


def test_entropy_of_sure_and_of_even_rows():
    weight = torch.zeros(4, 1, dtype=torch.float64)
    weight[0] = 1e4
    hidden = torch.tensor([[0.0], [1.0]], dtype=torch.float64, requires_grad=True)
    scores = token_scores(hidden, Head(weight), torch.tensor([0, 0]), {"entropy", "mean_logps"})
    torch.testing.assert_close(scores.entropy, torch.tensor([4.0, 1.0], dtype=torch.float64).log())
    assert torch.isfinite(torch.autograd.grad(scores.entropy.sum() + scores.mean_logps.sum(), [hidden])[0]).all()


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_sum_of_the_squares(trained):
    """`log sum_v p_v^2` equals what whole logits give, in tiles, and has no gradient; 1 / V where all are alike."""
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=trained)
    targets = torch.randint(11, (7,))
    scores = token_scores(hidden, Head(weight, softcap=3.0), targets, watch={"log_sum_sq"}, tile_bytes=90)
    logps = torch.log_softmax(3 * torch.tanh(hidden @ weight.t() / 3), 1)
    torch.testing.assert_close(scores.log_sum_sq, (2 * logps).logsumexp(1).detach())
    assert not scores.log_sum_sq.requires_grad
    scores.logps.sum().backward()
    flat = token_scores(hidden * 0, Head(weight), targets, watch={"log_sum_sq"}).log_sum_sq
    torch.testing.assert_close(flat, torch.full_like(flat, -math.log(11)))
