"""The divergence from the start equals the one of whole distributions, with its gradients."""

import pytest
import torch

from ftlit.models import divergence
from ftlit.models.divergence import token_kl
from ftlit.models.score import Head
from ftlit.peft.lora_layers import LowRank

torch.set_default_dtype(torch.float32)


def plain(hidden, head, start, start_head, temperature=1.0):
    """Written out with torch.distributions on whole logits."""

    def logits(h, given):
        weight = given.weight
        if given.low_rank is not None:
            weight = weight + given.low_rank.scale * given.low_rank.up @ given.low_rank.down
        z = h @ weight.t()
        if given.bias is not None:
            z = z + given.bias
        z = given.scale * z
        return (given.softcap * torch.tanh(z / given.softcap) if given.softcap else z) / temperature

    p0, p = (torch.distributions.Categorical(logits=logits(*pair)) for pair in ((start, start_head), (hidden, head)))
    return temperature**2 * torch.distributions.kl_divergence(p0, p)


@pytest.fixture
def parts():
    make = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64)  # noqa: E731
    return draw(11, 6), draw(11, 6), draw(23, 6), draw(23), draw(2, 6), draw(23, 2), draw(11)


@pytest.mark.parametrize("case", ["frozen", "trained", "low_rank", "softcap", "warm"])
def test_value_and_gradient(parts, case, monkeypatch):
    hidden, start, weight, bias, down, up, coefficients = parts
    monkeypatch.setitem(divergence.TILE_BYTES, "cpu", 8 * 23 * 4)  # four rows a chunk
    hidden.requires_grad_()
    head = Head(weight, bias, 0.7, 3.0 if case == "softcap" else None)
    start_head = head
    leaves = [hidden]
    if case == "trained":
        head = head._replace(weight=(weight * 1.1).requires_grad_(), bias=(bias + 0.1).requires_grad_())
        leaves += [head.weight, head.bias]
    if case == "low_rank":
        head = head._replace(low_rank=LowRank(down.requires_grad_(), up.requires_grad_(), 0.5, 0.0))
        leaves += [down, up]
    temperature = 2.5 if case == "warm" else 1.0
    ours = token_kl(hidden, head, start, start_head, temperature)
    theirs = plain(hidden, head, start, start_head, temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    mine = torch.autograd.grad((ours * coefficients).sum(), leaves)
    other = torch.autograd.grad((theirs * coefficients).sum(), leaves)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_no_rows_and_the_same_model(parts):
    hidden, _, weight, *_ = parts
    head = Head(weight)
    assert token_kl(hidden[:0], head, hidden[:0], head).shape == (0,)
    assert token_kl(hidden, head, hidden, head).abs().max() < 1e-14
