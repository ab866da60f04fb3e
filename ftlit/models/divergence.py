"""KL divergence from the start model to the present one at chosen positions, without building `[N, V]`.

Logits of both models are made in row chunks. With a frozen head the gradient of each divergence with respect to its
hidden state (`(p - p_start) W` through scale and soft-cap, `N x D`) is stored in forward and scaled in backward, as
`ftlit.models.score` does; with a trained head the chunks are recomputed in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ftlit.models.score import TILE_BYTES, Head, product, product_dtype


def token_kl(hidden: Tensor, head: Head, start_hidden: Tensor, start_head: Head, temperature: float = 1.0) -> Tensor:
    """`KL(p_start || p)` of each row, nats.

    With a temperature T both distributions are those of `logits / T`, and the divergence is multiplied by T^2, which
    keeps the size of its gradient (Hinton et al. 2015, arXiv:1503.02531, section 2.1).

    Args:
        hidden: Hidden states of the present model, `[N, D]`.
        head: Its output layer.
        start_hidden: Those of the start model, `[N, D]`; a constant.
        start_head: The output layer of the start model.
        temperature: T.

    Returns:
        `[N]`, at least float32; differentiable with respect to `hidden`, and to the head where it requires gradients.
    """
    rows = max(1, TILE_BYTES.get(hidden.device.type, TILE_BYTES["cuda"]) // (8 * head.weight.shape[0]))
    trained = any(isinstance(part, Tensor) and part.requires_grad for part in (*head, *(head.low_rank or ())))
    parts = []
    for start in range(0, hidden.shape[0], rows):
        some = slice(start, start + rows)
        inputs = (hidden[some], head, start_hidden[some].detach(), start_head, temperature)
        if torch.is_grad_enabled() and trained:
            parts.append(checkpoint(_divergence, *inputs, use_reentrant=False))
        elif torch.is_grad_enabled() and hidden.requires_grad:
            parts.append(_StoredSlope.apply(*inputs))
        else:
            parts.append(_divergence(*inputs))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """The logits of some rows, `[n, V]`, at least float32.

    Args:
        hidden: `[n, D]`.
        head: The output layer.
    """
    dtype = product_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = _Logits.apply(hidden, head.weight, dtype)
        if head.low_rank is not None:
            down, up, factor, dropout = head.low_rank
            low = factor * F.linear(F.dropout(hidden.to(dtype), dropout), down.to(dtype))
            logits = logits + F.linear(low.to(logits.dtype), up.to(logits.dtype))
        if head.bias is not None:
            logits = logits + head.bias
        logits = logits * head.scale
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


class _Logits(torch.autograd.Function):
    """`hidden @ weight.T` of factors in one type, never rounded to half precision.

    A rounding that is independent in two models adds to every divergence between them: in bfloat16 2e-4 nats a token,
    more than a few steps of training do. Where a device rounds, the factors are widened first.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.dtype = dtype
        return product(hidden.to(dtype), weight.to(dtype).t(), exact=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        grad = grad.to(ctx.dtype)
        of_hidden = of_weight = None
        if ctx.needs_input_grad[0]:
            of_hidden = (grad @ weight.to(ctx.dtype)).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = product(grad.t(), hidden.to(ctx.dtype), exact=True).to(weight.dtype)
        return of_hidden, of_weight, None


def _divergence(hidden: Tensor, head: Head, start_hidden: Tensor, start_head: Head, temperature: float) -> Tensor:
    with torch.no_grad():
        first = logits_of(start_hidden, start_head)
    logits = logits_of(hidden, head)
    with torch.autocast(hidden.device.type, enabled=False):  # which would sum in half precision
        start = torch.log_softmax(first / temperature, dim=-1)
        now = torch.log_softmax(logits / temperature, dim=-1)
        return temperature**2 * torch.einsum("nv,nv->n", start.exp(), start - now)


class _StoredSlope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, start_hidden: Tensor, start_head: Head, temperature: float
    ) -> Tensor:
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            values = _divergence(leaf, head, start_hidden, start_head, temperature)
            # Each row's divergence depends on its own hidden state only: the gradient of the sum holds those of all.
            (slope,) = torch.autograd.grad(values.sum(), leaf)
        ctx.save_for_backward(slope)
        return values.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return slope * grad[:, None].to(slope.dtype), None, None, None, None


__all__ = ["logits_of", "token_kl"]
