"""The token-score head: log-probabilities of chosen tokens without ever building `[T, V]`.

`lm_head` runs on the target positions only, in row chunks. With a frozen head the gradient of each score with respect
to its hidden state is stored in forward (`W[target] - softmax(z) W` for the log-probability; `N x D` for each score
that is asked for) and scaled in backward: exact, and no matrix product is done twice. A trained head keeps the
exponentials of its first rows up to `KEEP_BYTES` and recomputes the others in backward, because the coefficients of
`dW` are unknown until then.

With `p = softmax(z)` over V tokens, the gradients of a row's scores with respect to its logits are
`onehot - p` (log-probability), `1/V - p` (mean log-probability), `-p (log p + entropy)` (entropy).
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ftlit.objectives.scores import TokenScores
from ftlit.peft.lora_layers import LowRank

# Logits in flight at once, bytes: large enough to keep a matrix product busy, small enough for a cache or a GPU.
TILE_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
# What a trained head may keep of its logits between forward and backward, bytes.
KEEP_BYTES = 512 << 20


class Head(NamedTuple):
    """How a model turns hidden states into logits: `cap(scale * (hidden @ weight.T + bias))`.

    Attributes:
        weight: `[V, D]`.
        bias: `[V]` or None.
        scale: Factor on the logits (Cohere `logit_scale`, Granite `1 / logits_scaling`).
        softcap: Logits become `softcap * tanh(logits / softcap)` (Gemma 2), or None.
        low_rank: A trained product that is added to `weight`; the sum is never built.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    low_rank: LowRank | None = None

    def detach(self) -> Head:
        """The same numbers as constants."""
        bias = None if self.bias is None else self.bias.detach()
        low_rank = None
        if self.low_rank is not None:
            low_rank = self.low_rank._replace(down=self.low_rank.down.detach(), up=self.low_rank.up.detach())
        return self._replace(weight=self.weight.detach(), bias=bias, low_rank=low_rank)


def token_scores(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    needs: AbstractSet[str] = frozenset(),
    watch: AbstractSet[str] = frozenset(),
    tile_bytes: int | None = None,
    temperature: float = 1.0,
) -> TokenScores:
    """Log-probability of each target token, and what else is asked for.

    Args:
        hidden: The hidden states that predict the targets, `[N, D]`.
        head: The output layer.
        targets: Token ids, int64 `[N]`.
        needs: `entropy`, `mean_logps`: with their gradients.
        watch: The same names, `choice` and `log_sum_sq`: values without gradients, which cost no memory.
        tile_bytes: Memory for logits in flight, bytes; chosen by device when left out.
        temperature: All scores are those of the distribution `softmax(logits / temperature)`.

    Returns:
        The scores; differentiable with respect to `hidden`, and to the head where it requires gradients.
    """
    tile = TILE_BYTES.get(hidden.device.type, TILE_BYTES["cuda"]) if tile_bytes is None else tile_bytes
    rows = max(1, tile // (head.weight.shape[0] * 4))
    low, up = None, None
    if head.low_rank is not None:
        down, up, factor, dropout = head.low_rank
        low = factor * F.linear(F.dropout(hidden, dropout), down.to(hidden.dtype))
        low, up = low.to(hidden.dtype), up.to(hidden.dtype)
    plan = _Plan(
        product_dtype(hidden), head.scale, head.softcap, float(temperature), rows,
        "mean_logps" in needs, "mean_logps" in needs | watch, "entropy" in needs, "entropy" in needs | watch,
        "choice" in watch, "log_sum_sq" in watch,
    )  # fmt: skip
    values = _TokenScores.apply(hidden, low, head.weight, up, head.bias, targets, plan)
    logps, correct, mean_logps, entropy, choice, log_sum_sq = values
    return TokenScores(logps, correct, entropy, mean_logps, choice=choice, log_sum_sq=log_sum_sq)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The type in which hidden states are multiplied with the output layer: that of autocast, else their own."""
    device = hidden.device.type
    narrow = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(device) if narrow else hidden.dtype


def product(left: Tensor, right: Tensor, exact: bool = False) -> Tensor:
    """A matrix product, at least float32; that of factors in half precision is not rounded where the device can.

    Args:
        left: `[n, k]`.
        right: `[k, m]`, of the same type.
        exact: Whether factors are widened first where it cannot, which takes longer.
    """
    if left.dtype.itemsize >= 4:
        return left @ right
    if sums_in_float32(left.device.type, left.dtype):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float() if exact else (left @ right).float()


@lru_cache
def sums_in_float32(device: str, dtype: torch.dtype) -> bool:
    """Whether a device gives products of half-precision matrices without rounding them to half precision.

    Args:
        device: Its kind, such as `cuda`.
        dtype: Type of the factors.
    """
    some = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(some, some, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


class _Plan(NamedTuple):
    """The settings of one call.

    The type of the matrix product, what the head does besides, rows a tile, and for each extra score its gradient and
    its value.
    """

    dtype: torch.dtype
    scale: float
    softcap: float | None
    temperature: float
    rows: int
    mean_grad: bool
    mean: bool
    entropy_grad: bool
    entropy: bool
    choice: bool
    sum_sq: bool


class _Inputs(NamedTuple):
    """Rows of hidden states (with their low-rank products) and the head's weights."""

    hidden: Tensor
    low: Tensor | None
    weight: Tensor
    up: Tensor | None
    bias: Tensor | None
    targets: Tensor

    def rows(self, part: slice) -> _Inputs:
        """Some of the rows."""
        low = None if self.low is None else self.low[part]
        return self._replace(hidden=self.hidden[part], low=low, targets=self.targets[part])

    def to(self, dtype: torch.dtype) -> _Inputs:
        """The factors of the product in another type."""
        return self._replace(hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))


class _Tile(NamedTuple):
    """What a chunk of n rows leaves for its gradients.

    Attributes:
        exps: `exp(z - max)`, `[n, V]`.
        sums: Their sums, `[n, 1]`.
        slope: Derivative of the soft-cap, `[n, V]`; None without one.
    """

    exps: Tensor
    sums: Tensor
    slope: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return sum(t.numel() * t.element_size() for t in self if t is not None)


def _forward(inputs: _Inputs, plan: _Plan) -> tuple[tuple[Tensor | None, ...], _Tile]:
    """Scores of a chunk, each `[n]`, and what its gradients need.

    The scores are `logps, correct, mean_logps, entropy, choice, log_sum_sq`.
    """
    hidden, low, weight, up, bias, targets = inputs
    logits = product(hidden, weight.t())
    if low is not None and up is not None:
        logits = logits.addmm_(low.to(logits.dtype), up.to(logits.dtype).t())
    if bias is not None:
        logits = logits + bias
    if plan.scale != 1.0:
        logits *= plan.scale
    slope = None
    if plan.softcap is not None:
        bent = torch.tanh_(logits / plan.softcap)
        slope = 1 - bent.square()
        logits = bent.mul_(plan.softcap)
    if plan.temperature != 1.0:
        logits /= plan.temperature
    chosen = logits.gather(1, targets[:, None])
    top = logits.amax(1, keepdim=True)
    choice = logits.argmax(1) if plan.choice else None
    shifted = logits.sub_(top)
    mean = shifted.mean(1) if plan.mean else None
    exps = shifted.exp() if plan.entropy else shifted.exp_()
    sums = exps.sum(1, keepdim=True)
    log_sums = sums.log()
    logps = (chosen - top - log_sums).squeeze(1)
    entropy = None
    if plan.entropy:  # log sum - sum p (z - max)
        entropy = log_sums.squeeze(1) - torch.einsum("nv,nv->n", exps, shifted) / sums.squeeze(1)
    log_sum_sq = None
    if plan.sum_sq:
        log_sum_sq = torch.einsum("nv,nv->n", exps, exps).log() - 2 * log_sums.squeeze(1)
    correct = (chosen >= top).squeeze(1)
    mean = None if mean is None else mean - log_sums.squeeze(1)
    return (logps, correct, mean, entropy, choice, log_sum_sq), _Tile(exps, sums, slope)


def _dlogits(
    tile: _Tile,
    targets: Tensor,
    plan: _Plan,
    logps: Tensor | float = 0.0,
    mean: Tensor | float = 0.0,
    entropy: Tensor | float | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Gradient of `logps . log p + mean . mean_logps + entropy . H` with respect to the raw logits, `[n, V]`.

    Args:
        tile: The chunk.
        targets: Its targets, `[n]`.
        plan: The settings.
        logps: Coefficient of each row's log-probability, `[n, 1]` or one number.
        mean: That of the mean log-probability.
        entropy: That of the entropy, or None.
        overwrite: Whether the exponentials are no longer needed.
    """
    exps, sums, slope = tile
    factor = -(logps + mean) / sums
    if entropy is None:
        grad = exps.mul_(factor) if overwrite else exps * factor
    else:  # -p (log p + H) = -(e log e - e sum(e log e) / s) / s with e = exps, s = sums
        grad = torch.special.xlogy(exps, exps)
        grad = grad.sub_(exps * (grad.sum(1, keepdim=True) / sums)).mul_(-entropy / sums)
        grad.addcmul_(exps, factor)
    if not isinstance(mean, float) or mean:
        grad += mean / exps.shape[1]
    if not isinstance(logps, float) or logps:
        grad.scatter_add_(1, targets[:, None], torch.zeros_like(sums) + logps)
    if slope is not None:
        grad *= slope
    outer = plan.scale / plan.temperature
    return grad.mul_(outer) if outer != 1.0 else grad


class _TokenScores(torch.autograd.Function):
    """Scores of all rows; autocast is off inside, and the product alone is in its type."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        low: Tensor | None,
        weight: Tensor,
        up: Tensor | None,
        bias: Tensor | None,
        targets: Tensor,
        plan: _Plan,
    ) -> tuple[Tensor | None, ...]:
        given = _Inputs(hidden, low, weight, up, bias, targets)
        inputs = given.to(plan.dtype)
        num = hidden.shape[0]
        options: dict[str, Any] = {
            "dtype": torch.promote_types(hidden.dtype, torch.float32),
            "device": hidden.device,
        }
        logps = torch.empty(num, **options)
        correct = torch.empty(num, dtype=torch.bool, device=hidden.device)
        mean = torch.empty(num, **options) if plan.mean else None
        entropy = torch.empty(num, **options) if plan.entropy else None
        choice = torch.empty_like(targets) if plan.choice else None
        log_sum_sq = torch.empty(num, **options) if plan.sum_sq else None
        wants_head = any(ctx.needs_input_grad[place] for place in (1, 2, 3, 4))
        wants_hidden = ctx.needs_input_grad[0] and not wants_head
        # One N x D gradient for each score that has one: log-probability, mean, entropy.
        wanted = [True, plan.mean_grad, plan.entropy_grad] if wants_hidden else [False] * 3
        slopes: list[Tensor | None] = [torch.empty_like(hidden) if one else None for one in wanted]
        kept: list[_Tile] = []
        kept_bytes = 0
        for start in range(0, num, plan.rows):
            part = slice(start, start + plan.rows)
            rows = inputs.rows(part)
            with torch.autocast(hidden.device.type, enabled=False):
                values, tile = _forward(rows, plan)
                if wants_hidden:
                    _store_slopes(slopes, part, tile, rows, plan)
            for whole, value in zip((logps, correct, mean, entropy, choice, log_sum_sq), values, strict=True):
                if whole is not None and value is not None:
                    whole[part] = value
            if wants_hidden:
                continue
            if wants_head and kept_bytes + tile.num_bytes <= KEEP_BYTES:
                kept.append(tile)
                kept_bytes += tile.num_bytes
            elif wants_head:
                kept_bytes = KEEP_BYTES  # keep a leading run only: the rest is recomputed
        ctx.plan, ctx.kept, ctx.frozen_head = plan, len(kept), wants_hidden
        if wants_hidden:
            ctx.save_for_backward(*slopes)
        elif wants_head:
            ctx.save_for_backward(*given, *(tensor for tile in kept for tensor in tile))
        plain = [correct] if choice is None else [correct, choice]
        plain += [] if mean is None or plan.mean_grad else [mean]
        plain += [] if entropy is None or plan.entropy_grad else [entropy]
        plain += [] if log_sum_sq is None else [log_sum_sq]
        ctx.mark_non_differentiable(*plain)
        return logps, correct, mean, entropy, choice, log_sum_sq

    @staticmethod
    def backward(
        ctx: Any, d_logps: Tensor, _: Tensor, d_mean: Tensor | None, d_entropy: Tensor | None, *__: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        coefficients = (d_logps, d_mean if plan.mean_grad else None, d_entropy if plan.entropy_grad else None)
        if ctx.frozen_head:
            products = [
                slope * grad[:, None].to(slope.dtype)
                for slope, grad in zip(ctx.saved_tensors, coefficients, strict=True)
                if slope is not None and grad is not None
            ]
            return sum(products[1:], start=products[0]), *[None] * 6
        saved = ctx.saved_tensors
        given = _Inputs(*saved[:6])
        hidden, low, weight, up, bias, _ = given
        inputs = given.to(plan.dtype)
        wide = torch.promote_types(weight.dtype, torch.float32)  # what is summed over chunks
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_low = None if low is None else torch.empty_like(low)
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[2] else None
        grad_up = None if up is None else torch.zeros_like(up, dtype=wide)
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[4] else None
        for number, start in enumerate(range(0, hidden.shape[0], plan.rows)):
            part = slice(start, start + plan.rows)
            rows = inputs.rows(part)
            # Outside of autocast, as Lightning's own backward.
            tile = _Tile(*saved[6 + 3 * number : 9 + 3 * number]) if number < ctx.kept else _forward(rows, plan)[1]
            d_one, d_mean, d_entropy = (None if grad is None else grad[part, None] for grad in coefficients)
            assert d_one is not None
            dlogits = _dlogits(tile, rows.targets, plan, d_one, 0.0 if d_mean is None else d_mean, d_entropy)
            if grad_bias is not None:
                grad_bias += dlogits.sum(0)
            dlogits = dlogits.to(plan.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = dlogits @ rows.weight
            if grad_low is not None and up is not None:
                grad_low[part] = dlogits @ up.to(plan.dtype)
            if grad_weight is not None:
                grad_weight += product(dlogits.t(), rows.hidden, exact=True)
            if grad_up is not None and rows.low is not None:
                grad_up += product(dlogits.t(), rows.low.to(plan.dtype), exact=True)
        return (
            grad_hidden,
            grad_low,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_up is None or up is None else grad_up.to(up.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _store_slopes(slopes: list[Tensor | None], part: slice, tile: _Tile, rows: _Inputs, plan: _Plan) -> None:
    """Writes the gradients of a chunk's scores with respect to its hidden states; the exponentials are used up."""
    of_logps, of_mean, of_entropy = slopes
    if of_entropy is not None:
        of_entropy[part] = _dlogits(tile, rows.targets, plan, entropy=1.0).to(rows.weight.dtype) @ rows.weight
    if of_mean is not None:
        of_mean[part] = _dlogits(tile, rows.targets, plan, mean=1.0).to(rows.weight.dtype) @ rows.weight
    if of_logps is not None:
        grad = _dlogits(tile, rows.targets, plan, logps=1.0, overwrite=True)
        of_logps[part] = grad.to(rows.weight.dtype) @ rows.weight


__all__ = ["Head", "TokenScores", "product", "product_dtype", "token_scores"]
