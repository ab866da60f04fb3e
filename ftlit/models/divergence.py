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

from ftlit.models.score import TILE_BYTES, Head


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
    weight = head.weight
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
    logits = F.linear(hidden, weight, head.bias)
    if head.low_rank is not None:
        down, up, factor, dropout = head.low_rank
        low = factor * F.linear(F.dropout(hidden, dropout), down.to(hidden.dtype))
        logits = logits + F.linear(low, up.to(hidden.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _divergence(hidden: Tensor, head: Head, start_hidden: Tensor, start_head: Head, temperature: float) -> Tensor:
    with torch.no_grad():
        start = torch.log_softmax(logits_of(start_hidden, start_head) / temperature, dim=-1)
    now = torch.log_softmax(logits_of(hidden, head) / temperature, dim=-1)
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
