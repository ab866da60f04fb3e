"""Fewer passes over memory and less kept for backward in the layers of Llama-like models.

`fuse` gives single modules of a transformers model another `forward`, on the instance: names, types and weights stay as
they are, `unfuse` takes it away. A module is recognised by what it has, and its new forward is compared with its own on
random numbers first; a module that is not known, or does not agree, is left alone. Each forward looks at what it is
given at every call and hands anything it does not know (half precision, autocast, dropout, adapters of other kinds,
hooks) to the module's own.

- The normalisation keeps its input and one number a token.
- The gated MLP keeps its input and the two products with it; what lies between is computed again in backward.
- Queries and keys are rotated without copies of their halves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ftlit.peft.lora import LoRALinear

_ROTATION = "apply_rotary_pos_emb"
_FULL = (torch.float32, torch.float64)


def fuse(lm: nn.Module) -> dict[str, int]:
    """Gives the modules that ftlit knows a faster forward.

    Args:
        lm: A transformers model with its weights loaded, no strategy applied yet. Applying it again does nothing.

    Returns:
        How many modules of each class now have one.
    """
    agreed: dict[Any, bool] = {}
    counts: dict[str, int] = {}
    for module in lm.modules():
        if "forward" in module.__dict__:
            continue  # ours already, or somebody else's
        for kind in (_Norm, _MLP, _Rotary):
            forward = kind.of(module)
            if forward is None:
                continue
            first = (type(module), kind, *forward.settings())
            if first not in agreed:
                agreed[first] = forward.agrees()
            if agreed[first]:
                module.forward = forward
                counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
            break
    return counts


def unfuse(lm: nn.Module) -> None:
    """Gives every module its own forward back."""
    for module in lm.modules():
        if isinstance(module.__dict__.get("forward"), _Forward):
            del module.__dict__["forward"]


class _Forward:
    """A forward for one module; a plain object, so that models can still be copied and pickled."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @classmethod
    def of(cls, module: nn.Module) -> _Forward | None:
        """The forward for a module, or None where it is of another kind."""
        raise NotImplementedError

    def settings(self) -> tuple[Any, ...]:
        """What tells two modules of one class apart."""
        return ()

    def agrees(self) -> bool:
        """Whether it gives what the module's own gives."""
        raise NotImplementedError

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return type(self.module).forward(self.module, *args, **kwargs)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Equal up to rounding."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    tolerance = 64 * torch.finfo(theirs.dtype).eps * max(1.0, theirs.abs().max().item())
    return bool((ours - theirs).abs().max() <= tolerance)


def _random(like: Tensor, *shape: int) -> Tensor:
    """Random numbers that leave the global generator alone; the same on any device."""
    generator = torch.Generator("cpu").manual_seed(0)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return numbers.to(like.device, like.dtype)


# ---- normalisation ----------------------------------------------------------------------------------------------


class _Norm(_Forward):
    """RMSNorm of float32 states: `x / sqrt(mean(x^2) + eps) * (offset + weight)`, with offset 1 in Gemma."""

    def __init__(self, module: nn.Module, eps: float) -> None:
        super().__init__(module)
        self.eps, self.offset = eps, 0.0

    @classmethod
    def of(cls, module: nn.Module) -> _Norm | None:
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        names = [name for name, _ in module.named_parameters()]
        if not type(module).__name__.endswith("RMSNorm") or names != ["weight"] or not isinstance(eps, float):
            return None
        weight: Any = module.weight
        if weight.ndim != 1 or weight.is_meta:
            return None
        forward = cls(module, eps)
        forward.offset = 1.0 if "Gemma" in type(module).__name__ else 0.0
        return forward

    def settings(self) -> tuple[Any, ...]:
        return self.eps, self.offset

    def agrees(self) -> bool:
        weight = cast(Tensor, self.module.weight).detach().float()
        x = 3 * _random(weight, 5, weight.shape[0])
        with torch.no_grad():
            theirs = self.own(x)
            return theirs.dtype == torch.float32 and _close(_RMSNorm.apply(x, weight, self.eps, self.offset), theirs)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight = cast(Tensor, self.module.weight)
        # float64 would not be what transformers computes: it rounds to float32 inside.
        plain = hidden_states.dtype == weight.dtype == torch.float32
        if not plain or torch.is_autocast_enabled(hidden_states.device.type):
            return self.own(hidden_states)
        return _RMSNorm.apply(hidden_states, weight, self.eps, self.offset)


class _RMSNorm(torch.autograd.Function):
    """Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        ctx.offset = offset
        return (x * scale).mul_(weight + offset if offset else weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        factor = weight + ctx.offset if ctx.offset else weight
        width = x.shape[-1]
        product = grad * x
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = scale.reshape(-1) @ product.reshape(-1, width)
        if ctx.needs_input_grad[0]:
            along = (product @ factor).unsqueeze(-1).mul_(scale.pow(3)).div_(-width)
            # The product is not needed any more: its memory takes the result.
            grad_x = torch.mul(grad, scale, out=product).mul_(factor).addcmul_(x, along)
        return grad_x, grad_weight, None, None


# ---- the gated MLP ----------------------------------------------------------------------------------------------


class _Projection(NamedTuple):
    """A linear layer with the low-rank product beside it, where it has one.

    Attributes:
        weight: `[out, in]`.
        bias: `[out]`.
        down: A, `[r, in]`.
        up: B, `[out, r]`.
    """

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None


def _projection(layer: Any) -> tuple[_Projection, float] | None:
    """The tensors of a layer and the factor on its low-rank product; None if more happens in it than we know."""
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or "forward" in layer.__dict__:
        return None
    if type(layer) is LoRALinear:
        # Conv1D, which the same class adapts, stores its weight the other way round.
        if getattr(layer, "transposed", False) or (layer.dropout and layer.training):
            return None
        if layer.enabled:
            return _Projection(layer.weight, layer.bias, layer.lora_A, layer.lora_B), layer.scale
    elif type(layer) is not nn.Linear:
        return None
    return _Projection(layer.weight, layer.bias, None, None), 0.0


def _silu(x: Tensor) -> Tensor:
    return torch.sigmoid(x).mul_(x)  # half the time of F.silu on a CPU


def _silu_backward(x: Tensor) -> tuple[Tensor, Tensor]:
    """`silu(x)` and its slope `s + silu(x) (1 - s)` with `s = sigmoid(x)`."""
    gate = torch.sigmoid(x)
    value = gate * x
    return value, gate.addcmul_(value, 1 - gate)


def _gelu_backward(x: Tensor) -> tuple[Tensor, Tensor]:
    slope = torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate="tanh")
    return F.gelu(x, approximate="tanh"), slope


_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "silu": (_silu, _silu_backward),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), _gelu_backward),
}


class _MLP(_Forward):
    """`down_proj(act_fn(gate_proj(x)) * up_proj(x))`."""

    def __init__(self, module: nn.Module, activation: str) -> None:
        super().__init__(module)
        self.activation = activation

    @classmethod
    def of(cls, module: nn.Module) -> _MLP | None:
        layers = dict(module.named_children())
        if set(layers) != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            return None
        linears = [layers[name] for name in ("gate_proj", "up_proj", "down_proj")]
        if any(type(layer) is not nn.Linear or layer.weight.is_meta for layer in linears):
            return None
        probe = torch.linspace(-6, 6, 49, dtype=torch.float64)
        for name, (function, _) in _ACTIVATIONS.items():
            if _close(function(probe), layers["act_fn"](probe)):
                return cls(module, name)
        return None

    def settings(self) -> tuple[Any, ...]:
        return (self.activation,)

    def agrees(self) -> bool:
        weight = cast(Any, self.module).gate_proj.weight
        x = _random(weight, 3, weight.shape[1])
        with torch.no_grad():
            return _close(self(x), self.own(x))

    def __call__(self, x: Tensor) -> Tensor:
        module: Any = self.module
        layers = [_projection(layer) for layer in (module.gate_proj, module.up_proj, module.down_proj)]
        known = [layer for layer in layers if layer is not None and layer[0].weight.dtype == x.dtype]
        # In half precision every pass rounds, and transformers' own has fewer.
        full = x.dtype in _FULL and not torch.is_autocast_enabled(x.device.type)
        if len(known) < 3 or not full:
            return self.own(x)
        tensors = [tensor for projection, _ in known for tensor in projection]
        return _GatedMLP.apply(x, self.activation, tuple(scale for _, scale in known), *tensors)


def _project(
    x: Tensor, projection: _Projection, scale: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`x W^T + b + scale * x A^T B^T`, `[T, out]` (written into `out` where it is given), and `A x^T`, `[r, T]`."""
    if out is None:
        out = F.linear(x, projection.weight, projection.bias)
    elif projection.bias is None:
        torch.mm(x, projection.weight.t(), out=out)
    else:
        torch.addmm(projection.bias, x, projection.weight.t(), out=out)
    if projection.down is None or projection.up is None:
        return out, None
    low = projection.down.to(x.dtype) @ x.t()  # the thin matrix first: with it second, CPU kernels take twice as long
    return out.addmm_(low.t(), projection.up.to(x.dtype).t(), alpha=scale), low


def _project_backward(
    grad: Tensor,
    x: Tensor,
    projection: _Projection,
    low: Tensor | None,
    scale: float,
    wants: Sequence[bool],
    grad_x: Tensor | None,
    wants_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradient of the input, added to `grad_x` where it is given, and those of weight, bias, A, B; None: not wanted."""
    weight, bias, down, up = projection
    if wants_x:
        grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
    grad_weight = grad.t() @ x if wants[0] else None
    grad_bias = grad.sum(0) if bias is not None and wants[1] else None
    if low is None or down is None or up is None:
        return grad_x, [grad_weight, grad_bias, None, None]
    grad_low = (up.to(grad.dtype).t() @ grad.t()).mul_(scale)  # [r, T]
    grad_down = (grad_low @ x).to(down.dtype) if wants[2] else None
    grad_up = (low @ grad).mul_(scale).t().to(up.dtype) if wants[3] else None
    if grad_x is not None:
        grad_x.addmm_(grad_low.t(), down.to(grad.dtype))
    return grad_x, [grad_weight, grad_bias, grad_down, grad_up]


class _GatedMLP(torch.autograd.Function):
    """The whole MLP; see `_MLP`. Tensors come as gate, up, down, of each weight, bias, A, B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, activation: str, scales: tuple[float, float, float], *tensors: Tensor | None
    ) -> Tensor:
        gate_proj, up_proj, down_proj = _split(tensors)
        flat = x.reshape(-1, x.shape[-1])
        gate, gate_low = _project(flat, gate_proj, scales[0])
        up, up_low = _project(flat, up_proj, scales[1])
        inner = _ACTIVATIONS[activation][0](gate).mul_(up)
        # The result is no view: a model may change it in place, and torch refuses that for a view made in here.
        out = x.new_empty(*x.shape[:-1], down_proj.weight.shape[0])
        _, inner_low = _project(inner, down_proj, scales[2], out.view(-1, out.shape[-1]))
        ctx.save_for_backward(flat, gate, up, gate_low, up_low, inner_low, *tensors)
        ctx.activation, ctx.scales, ctx.shape = activation, scales, x.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, gate, up, gate_low, up_low, inner_low, *tensors = ctx.saved_tensors
        gate_proj, up_proj, down_proj = _split(tensors)
        wants = ctx.needs_input_grad[3:]
        value, slope = _ACTIVATIONS[ctx.activation][1](gate)
        inner = value * up
        grad = grad.reshape(-1, grad.shape[-1])
        grad_inner, of_down = _project_backward(
            grad, inner, down_proj, inner_low, ctx.scales[2], wants[8:12], None, True
        )
        grad_inner = cast(Tensor, grad_inner)
        # From here on `inner` and `grad_inner` are only memory.
        grad_up = torch.mul(grad_inner, value, out=inner)
        grad_gate = grad_inner.mul_(up).mul_(slope)
        del value, slope
        wants_x = ctx.needs_input_grad[0]
        grad_x, of_up = _project_backward(grad_up, flat, up_proj, up_low, ctx.scales[1], wants[4:8], None, wants_x)
        grad_x, of_gate = _project_backward(
            grad_gate, flat, gate_proj, gate_low, ctx.scales[0], wants[0:4], grad_x, wants_x
        )
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        return grad_x, None, None, *of_gate, *of_up, *of_down


def _split(tensors: Sequence[Any]) -> tuple[_Projection, _Projection, _Projection]:
    """The three projections again."""
    return _Projection(*tensors[:4]), _Projection(*tensors[4:8]), _Projection(*tensors[8:])


# ---- rotary positions -------------------------------------------------------------------------------------------


class _Rotary(_Forward):
    """The attention layer's own forward in which `apply_rotary_pos_emb` is ours."""

    @classmethod
    def of(cls, module: nn.Module) -> _Rotary | None:
        forward = type(module).forward
        code = getattr(forward, "__code__", None)
        if code is None or _ROTATION not in code.co_names or _ROTATION not in forward.__globals__:
            return None
        return cls(module)

    def settings(self) -> tuple[Any, ...]:
        return (type(self.module).forward,)

    def agrees(self) -> bool:
        theirs = type(self.module).forward.__globals__[_ROTATION]
        numbers = _random(torch.empty(0, dtype=torch.float64), 4, 2, 3, 5, 8)
        query, key, cos, sin = numbers[0], numbers[1, :, :1], numbers[2, :, 0], numbers[3, :, 0]
        try:
            pairs = zip(_rotation(theirs)(query, key, cos, sin), theirs(query, key, cos, sin), strict=True)
            return all(_close(ours, own) for ours, own in pairs)
        except (TypeError, RuntimeError, ValueError):
            return False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _with_rotation(type(self.module).forward)(self.module, *args, **kwargs)


@lru_cache
def _with_rotation(forward: Any) -> Any:
    """A copy of a function that finds our rotation under the name of its own."""
    names = {**forward.__globals__, _ROTATION: _rotation(forward.__globals__[_ROTATION])}
    copy = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _rotation(own: Any) -> Any:
    """Ours, and `own` for what it does not know."""

    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        known = query.dtype == key.dtype == cos.dtype and query.dtype in _FULL
        if args or kwargs or not known or cos.ndim != 3 or cos.shape[-1] != query.shape[-1]:
            return own(query, key, cos, sin, *args, **kwargs)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return _Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin)

    return rotate


class _Rotate(torch.autograd.Function):
    """`x cos + (-x_2, x_1) sin` for the halves `x_1`, `x_2` of each head; Su et al. 2021, arXiv:2104.09864, eq. 34."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        (first, second), (cos_1, cos_2), (sin_1, sin_2) = (t.chunk(2, -1) for t in (x, cos, sin))
        out = x.new_empty(x.shape)  # [B, H, T, d] in this order, whatever the order of x
        out_1, out_2 = out.chunk(2, -1)
        torch.mul(first, cos_1, out=out_1).addcmul_(second, sin_1, value=-1)
        torch.mul(second, cos_2, out=out_2).addcmul_(first, sin_2)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        (first, second), (cos_1, cos_2), (sin_1, sin_2) = (t.chunk(2, -1) for t in (grad, cos, sin))
        batch, heads, tokens, width = grad.shape
        # In the order of the projection that made x, whose backward then needs no copy.
        out = grad.new_empty(batch, tokens, heads, width).transpose(1, 2)
        out_1, out_2 = out.chunk(2, -1)
        torch.mul(first, cos_1, out=out_1).addcmul_(second, sin_2)
        torch.mul(second, cos_2, out=out_2).addcmul_(first, sin_1, value=-1)
        return out, None, None
