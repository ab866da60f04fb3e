"""The layers that LoRA puts in the place of frozen ones. They keep the names `weight` and `bias`."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from ftlit.peft.base import LowRankChange
from ftlit.peft.copies import START


class LowRank(NamedTuple):
    """A trained product `scale * up @ down` beside a matrix.

    Attributes:
        down: A, `[r, in]`.
        up: B, `[out, r]`.
        scale: Factor on the product.
        dropout: Probability of dropping an input of A, now; 0 outside training.
    """

    down: Tensor
    up: Tensor
    scale: float
    dropout: float


class LoRALayer(nn.Module):
    """A frozen layer with a trained low-rank product beside it.

    Args:
        layer: The layer to adapt; its parameters are shared, not copied.
        rank: Rank of the product.
        scale: Factor on the product.
        dropout: Probability of dropping an input of A.
        gaussian: Whether the random factor starts from a normal distribution.
    """

    parts: ClassVar[tuple[str, str]]
    """The parameters A and B."""
    zero: ClassVar[str]
    """The one of them that is zero at first: the product is scaled through it, the other keeps what was drawn."""
    suffix: ClassVar[str]
    """What the PEFT library writes after their names."""
    transposed: bool = False
    """Whether the weight is stored as `[in, out]`, as Conv1D and embeddings store it."""
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module, rank: int, scale: float, dropout: float, gaussian: bool) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, layer.weight)
        self.bias = cast("nn.Parameter | None", getattr(layer, "bias", None))
        # The shell of the layer, to be filled again by `merged`: a tuple, so that it is no child, and without its
        # parameters, so that nothing is held when they are sharded.
        self._original = (layer,)
        for name, _ in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, None)
        self.scale, self.dropout, self.enabled = scale, dropout, True
        # Adapters stay in float32 under a half-precision base: bfloat16 would lose small updates.
        options: dict[str, Any] = {
            "dtype": torch.promote_types(self.weight.dtype, torch.float32),
            "device": self.weight.device,
        }
        out, inputs = self.weight.shape[::-1] if self.transposed else self.weight.shape
        down, up = self.parts
        self.register_parameter(down, nn.Parameter(torch.zeros(rank, inputs, **options)))
        self.register_parameter(up, nn.Parameter(torch.zeros(out, rank, **options)))
        self.reset(gaussian)

    @abstractmethod
    def reset(self, gaussian: bool) -> None:
        """Draws the first values of the random factor; the other is zero."""

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A `[r, in]` and B `[out, r]`."""
        down, up = self.parts
        return self.get_parameter(down), self.get_parameter(up)

    def change(self, name: str) -> LowRankChange:
        """How the weight differs from that of the start of the run.

        Args:
            name: Name of the weight in the unadapted model.
        """
        down: Tensor
        up: Tensor
        down, up = self.factors
        if self.goes_on:  # s (B A - B0 A0), as one product of twice the rank
            first = [self.get_parameter(START + part) for part in self.parts]
            down, up = torch.cat([down, first[0]]), torch.cat([up, -first[1]], dim=1)
        if self.transposed:
            return LowRankChange(name, up.t(), down.t(), self.scale, input_dim=0)
        return LowRankChange(name, down, up, self.scale)

    @property
    def goes_on(self) -> bool:
        """Whether the factors started from another adapter's."""
        return hasattr(self, START + self.parts[0])

    @property
    def low_rank(self) -> LowRank | None:
        """The product, for who computes with the weight itself; None while it is off."""
        if not self.enabled:
            return None
        return LowRank(*self.factors, self.scale, self.dropout if self.training else 0.0)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The original layer with the product in its weight."""
        down, up = self.factors
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        delta = self.scale * (up.to(wide) @ down.to(wide))
        weight = self.weight.to(wide) + (delta.t() if self.transposed else delta)
        layer = self._original[0].to(self.weight.device)
        layer.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        if self.bias is not None:
            layer.bias = self.bias
        return layer.train(self.training)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{list(self.weight.shape)}, rank={self.factors[0].shape[0]}, scale={self.scale}"


class LoRALinear(LoRALayer):
    """`x W^T + b + scale * dropout(x) A^T B^T` for `nn.Linear`, and for GPT-2's Conv1D, which stores `W^T`."""

    parts: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")
    zero: ClassVar[str] = "lora_B"
    suffix: ClassVar[str] = ".weight"
    lora_A: nn.Parameter  # noqa: N815 - the PEFT library's names
    lora_B: nn.Parameter  # noqa: N815

    def __init__(
        self, layer: nn.Linear | Conv1D, rank: int, scale: float, dropout: float = 0.0, gaussian: bool = False
    ) -> None:
        self.transposed = isinstance(layer, Conv1D)
        super().__init__(layer, rank, scale, dropout, gaussian)
        self.out_features, self.in_features = self.weight.shape[::-1] if self.transposed else self.weight.shape

    @override
    def reset(self, gaussian: bool) -> None:
        if gaussian:
            nn.init.normal_(self.lora_A, std=1 / self.lora_A.shape[0])
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Shape `[..., in] -> [..., out]`."""
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        else:
            dtype = self.weight.dtype
        if not self.enabled:
            matrix = (self.weight.t() if self.transposed else self.weight).to(dtype)
            flat = x.reshape(-1, x.shape[-1]).to(dtype)
            return _add_linear(None, flat, matrix, self.bias).view(*x.shape[:-1], -1)
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else x
        out = _LowRankLinear.apply(
            x, dropped, self.weight, self.bias, self.lora_A, self.lora_B, self.scale, self.transposed, dtype
        )
        return cast(Tensor, out)


class LoRAEmbedding(LoRALayer):
    """`W[ids] + scale * (A^T)[ids] B^T`; A starts at zero and B is drawn, as in the PEFT library."""

    parts: ClassVar[tuple[str, str]] = ("lora_embedding_A", "lora_embedding_B")
    zero: ClassVar[str] = "lora_embedding_A"
    suffix: ClassVar[str] = ""
    transposed = True
    lora_embedding_A: nn.Parameter  # noqa: N815 - the PEFT library's names
    lora_embedding_B: nn.Parameter  # noqa: N815

    def __init__(
        self, layer: nn.Embedding, rank: int, scale: float, dropout: float = 0.0, gaussian: bool = False
    ) -> None:
        super().__init__(layer, rank, scale, dropout, gaussian)
        self.num_embeddings, self.embedding_dim = layer.num_embeddings, layer.embedding_dim
        self.padding_idx = layer.padding_idx
        embed_scale = getattr(layer, "embed_scale", None)  # Gemma 3 multiplies inside its embedding
        self.register_buffer("embed_scale", embed_scale if isinstance(embed_scale, Tensor) else None, persistent=False)

    @override
    def reset(self, gaussian: bool) -> None:
        nn.init.normal_(self.lora_embedding_B)

    def forward(self, ids: Tensor) -> Tensor:
        """Shape `[...] -> [..., D]`."""
        out = F.embedding(ids, self.weight, self.padding_idx)
        if self.enabled:
            low = F.embedding(ids, self.lora_embedding_A.t(), self.padding_idx)
            out = out + (self.scale * (low @ self.lora_embedding_B.t())).to(out.dtype)
        scale = cast("Tensor | None", self.embed_scale)
        return out if scale is None else out * scale.to(out.dtype)


class _LowRankLinear(torch.autograd.Function):
    """The layer as one function.

    It saves its input as it came, the `r`-wide product and the parameters: layers that share an input (q, k and v)
    share what is saved, also under autocast, whose casts are made again in backward; no gradient of W is made.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        transposed: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        flat = dropped.reshape(-1, dropped.shape[-1]).to(dtype)
        # The thin matrix goes first in each product: with it second, CPU kernels take twice as long.
        low = down.to(dtype) @ flat.t()  # [r, T]
        matrix = (weight.t() if transposed else weight).to(dtype)
        own = flat if dropped is x else x.reshape(flat.shape).to(dtype)
        # No view is returned: models may change the result in place (OLMo clips it), and torch refuses that for a view.
        out = flat.new_empty(*x.shape[:-1], matrix.shape[0])
        product = torch.mm(low.t(), up.to(dtype).t(), out=out.view(-1, matrix.shape[0]))
        _add_linear(product.mul_(scale), own, matrix, bias)
        ctx.save_for_backward(dropped, low, weight, down, up)
        ctx.scale, ctx.transposed, ctx.dtype = scale, transposed, dtype
        ctx.shape, ctx.x_dtype, ctx.same = x.shape, x.dtype, dropped is x
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dropped, low, weight, down, up = ctx.saved_tensors
        dtype = ctx.dtype
        flat = dropped.reshape(-1, dropped.shape[-1]).to(dtype)
        grad = grad.reshape(-1, grad.shape[-1]).to(dtype)
        low_t = (up.to(dtype).t() @ grad.t()).mul_(ctx.scale)  # [r, T]
        grad_down = (low_t @ flat).to(down.dtype) if ctx.needs_input_grad[4] else None
        grad_up = (low @ grad).mul_(ctx.scale).t().to(up.dtype) if ctx.needs_input_grad[5] else None
        grad_bias = grad.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            matrix = (weight.t() if ctx.transposed else weight).to(dtype)
            through = low_t.t() @ down.to(dtype)
            if ctx.same:
                grad_x = through.addmm_(grad, matrix)
            else:
                grad_x, grad_dropped = grad @ matrix, through.view(ctx.shape).to(ctx.x_dtype)
            grad_x = grad_x.view(ctx.shape).to(ctx.x_dtype)
        return grad_x, grad_dropped, None, grad_bias, grad_down, grad_up, None, None, None


def _add_linear(product: Tensor | None, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """`product + x matrix^T + bias`, the first sum rounded once.

    Half precision rounds `x matrix^T` to a grid coarser than a small product: one that is added afterwards is rounded
    away, the same way every time. Added inside the matrix product, before it is rounded, it is kept on average.

    Args:
        product: `[T, out]`, overwritten. None is zero, by the same computation: an adapter that is zero changes no bit.
        x: `[T, in]`.
        matrix: `[out, in]`.
        bias: `[out]`.
    """
    out = x.new_zeros(x.shape[0], matrix.shape[0]) if product is None else product
    out.addmm_(x, matrix.t())
    return out if bias is None else out.add_(bias.to(x.dtype))


__all__ = ["LoRAEmbedding", "LoRALayer", "LoRALinear", "LowRank"]
