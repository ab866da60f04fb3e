"""The token-score head: log-probabilities of chosen tokens without ever building `[T, V]`.

`lm_head` runs on the target positions only, in row chunks. With a frozen head the gradient of each log-probability with
respect to its hidden state, `W[target] - softmax(z) W`, is stored in forward (`N x D`) and scaled in backward: exact,
and no matrix product is done twice. A trained head keeps the probabilities of its first rows up to `KEEP_BYTES` and
recomputes the others in backward, because the coefficients of `dW` are unknown until then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Logits in flight at once, bytes: large enough to keep a matrix product busy, small enough for a cache or a GPU.
TILE_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# Probabilities a trained head may keep between forward and backward, bytes.
KEEP_BYTES = 512 << 20


class Head(NamedTuple):
    """How a model turns hidden states into logits: `cap(scale * (hidden @ weight.T + bias))`.

    Attributes:
        weight: `[V, D]`.
        bias: `[V]` or None.
        scale: Factor on the logits (Cohere `logit_scale`, Granite `1 / logits_scaling`).
        softcap: Logits become `softcap * tanh(logits / softcap)` (Gemma 2), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


class TokenScores(NamedTuple):
    """What the head says of each target.

    Attributes:
        logps: Log-probability of the target, nats, `[N]`, at least float32; carries the gradient.
        correct: Whether no other token is more likely, bool `[N]`.
    """

    logps: Tensor
    correct: Tensor


def token_scores(hidden: Tensor, head: Head, targets: Tensor, tile_bytes: int | None = None) -> TokenScores:
    """Log-probability of each target token.

    Args:
        hidden: The hidden states that predict the targets, `[N, D]`.
        head: The output layer.
        targets: Token ids, int64 `[N]`.
        tile_bytes: Memory for logits in flight, bytes; chosen by device when left out.

    Returns:
        The scores; `logps` is differentiable with respect to `hidden`, and to the head where it requires gradients.
    """
    tile = TILE_BYTES.get(hidden.device.type, TILE_BYTES["cuda"]) if tile_bytes is None else tile_bytes
    rows = max(1, tile // (head.weight.shape[0] * 4))
    logps, correct = _TokenLogps.apply(hidden, head.weight, head.bias, targets, head.scale, head.softcap, rows)
    return TokenScores(logps, correct)


def _chunk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Forward of one chunk of rows.

    Returns:
        `logps [n]`, `correct [n]`, unnormalised probabilities `exp(z - max) [n, V]`, their sums `[n, 1]`, and the
        derivative of the soft-cap `[n, V]` (None without one).
    """
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale != 1.0:
        logits *= scale
    slope = None
    if softcap is not None:
        bent = torch.tanh_(logits / softcap)
        slope = 1 - bent.square()
        logits = bent.mul_(softcap)
    chosen = logits.gather(1, targets[:, None])
    top = logits.amax(1, keepdim=True)
    exps = logits.sub_(top).exp_()
    sums = exps.sum(1, keepdim=True)
    logps = (chosen - top - sums.log()).squeeze(1)
    return logps, (chosen >= top).squeeze(1), exps, sums, slope


def _dlogits(exps: Tensor, sums: Tensor, slope: Tensor | None, targets: Tensor, scale: float) -> Tensor:
    """Gradient of each row's log-probability with respect to its raw logits, `[n, V]`; overwrites `exps`."""
    grad = exps.div_(-sums)
    grad.scatter_add_(1, targets[:, None], torch.ones_like(sums))
    if slope is not None:
        grad *= slope
    return grad.mul_(scale) if scale != 1.0 else grad


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        num = hidden.shape[0]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logps = torch.empty(num, dtype=dtype, device=hidden.device)
        correct = torch.empty(num, dtype=torch.bool, device=hidden.device)
        wants_head = ctx.needs_input_grad[1] or (bias is not None and ctx.needs_input_grad[2])
        wants_hidden = ctx.needs_input_grad[0] and not wants_head
        slopes = torch.empty_like(hidden) if wants_hidden else None
        kept: list[Tensor] = []
        kept_bytes = 0
        for start in range(0, num, rows):
            part = slice(start, start + rows)
            logps[part], correct[part], exps, sums, slope = _chunk(
                hidden[part], weight, bias, targets[part], scale, softcap
            )
            if slopes is not None:
                slopes[part] = _dlogits(exps, sums, slope, targets[part], scale).to(weight.dtype) @ weight
            elif wants_head and kept_bytes + exps.numel() * exps.element_size() <= KEEP_BYTES:
                kept.append(_dlogits(exps, sums, slope, targets[part], scale))
                kept_bytes += exps.numel() * exps.element_size()
            elif wants_head:
                kept_bytes = KEEP_BYTES  # keep a leading run only: the rest is recomputed
        ctx.scale, ctx.softcap, ctx.rows, ctx.kept = scale, softcap, rows, len(kept)
        ctx.frozen_head = slopes is not None
        if slopes is not None:
            ctx.save_for_backward(slopes)
        elif wants_head:
            ctx.save_for_backward(hidden, weight, bias, targets, *kept)
        ctx.mark_non_differentiable(correct)
        return logps, correct

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.frozen_head:
            (slopes,) = ctx.saved_tensors
            return slopes * grad_logps[:, None].to(slopes.dtype), None, None, None, None, None, None
        hidden, weight, bias, targets, *kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Accumulated over chunks, so in float32 at least.
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if ctx.needs_input_grad[2] else None
        for number, start in enumerate(range(0, hidden.shape[0], ctx.rows)):
            part = slice(start, start + ctx.rows)
            if number < ctx.kept:
                dlogits = kept[number]
            else:
                _, _, exps, sums, slope = _chunk(hidden[part], weight, bias, targets[part], ctx.scale, ctx.softcap)
                dlogits = _dlogits(exps, sums, slope, targets[part], ctx.scale)
            dlogits = (dlogits * grad_logps[part, None]).to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = dlogits @ weight
            if grad_weight is not None:
                grad_weight.addmm_(dlogits.t().to(wide), hidden[part].to(wide))
            if grad_bias is not None:
                grad_bias += dlogits.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


__all__ = ["Head", "TokenScores", "token_scores"]
