"""LoRA: a trained low-rank product beside frozen matrices (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ftlit.errors import ConfigError
from ftlit.peft.base import Change, LowRankChange, PEFTStrategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."

# Fields of a LoRA `adapter_config.json` that may say something: read below, or without influence on the loaded model
# (which modules are adapted is read off the tensors).
_UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "auto_mapping", "peft_version", "qalora_group_size", "megatron_core", "ensure_weight_tying"),
}


class LoRA(PEFTStrategy):
    """Adds `scale * B A x` to linear layers and trains only A and B.

    Args:
        rank: Rank r of the product (PEFT's `r`).
        alpha: Numerator of the scale `alpha / rank` (PEFT's `lora_alpha`); twice the rank when left out.
        dropout: Probability of dropping an input of A. 0 is faster and needs less memory.
        target_modules: `all-linear` (every linear layer but the output layer), a list of name endings such as
            `[q_proj, v_proj]`, or one regular expression that whole module names must match.
        rslora: Scale by `alpha / sqrt(rank)` instead (Kalajdzievski 2023, arXiv:2312.03732).

    Raises:
        ConfigError: If a number is out of range.
    """

    peft_type: ClassVar[str | None] = "LORA"

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: list[str] | str = "all-linear",
        rslora: bool = False,
    ) -> None:
        if rank < 1:
            raise ConfigError(f"LoRA's rank must be at least 1, got {rank}.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"LoRA's dropout must be in [0, 1), got {dropout}.")
        self.rank, self.dropout, self.rslora = rank, dropout, rslora
        self.alpha = 2.0 * rank if alpha is None else float(alpha)
        self.target_modules = target_modules

    @property
    def scale(self) -> float:
        """The factor on `B A`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @override
    def apply(self, model: PreTrainedModel) -> None:
        model.requires_grad_(False)
        for name in self._targets(model):
            linear = cast(nn.Linear, model.get_submodule(name))
            if min(linear.weight.shape) < self.rank:
                raise ConfigError(
                    f"LoRA's rank {self.rank} exceeds the smaller side of {name!r} ({list(linear.weight.shape)}); "
                    "choose a smaller rank or other target_modules."
                )
            _swap(model, name, LoRALinear(linear, self.rank, self.scale, self.dropout))

    def _targets(self, model: PreTrainedModel) -> list[str]:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        linear = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        wanted = self.target_modules
        if wanted == "all-linear":
            found = list(linear)
        elif isinstance(wanted, str):
            found = [name for name in linear if re.fullmatch(wanted, name)]
        else:
            endings = {ending: [n for n in linear if n == ending or n.endswith("." + ending)] for ending in wanted}
            for ending, names in endings.items():
                if not names:
                    self._no_match(ending, linear)
            chosen = {name for names in endings.values() for name in names}
            found = [name for name in linear if name in chosen]
        if not found:
            self._no_match(str(wanted), linear)
        return found

    def _no_match(self, pattern: str, linear: Mapping[str, nn.Module]) -> None:
        endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
        has = (
            f"this model has: {', '.join(endings)}."
            if endings
            else "this model has no torch.nn.Linear (GPT-2 has none)."
        )
        raise ConfigError(f"LoRA's target_modules {pattern!r} matches no linear layer that can be adapted; {has}")

    @staticmethod
    def _adapters(model: PreTrainedModel) -> dict[str, LoRALinear]:
        return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}

    @override
    def changes(self, model: PreTrainedModel) -> Iterator[Change]:
        for name, module in self._adapters(model).items():
            yield LowRankChange(f"{name}.weight", module.lora_A, module.lora_B, module.scale)

    @override
    @contextmanager
    def start(self, model: PreTrainedModel) -> Iterator[None]:
        adapters = self._adapters(model).values()
        was = [module.enabled for module in adapters]
        try:
            for module in adapters:
                module.enabled = False
            yield
        finally:
            for module, enabled in zip(adapters, was, strict=True):
                module.enabled = enabled

    @override
    def state(self, model: PreTrainedModel) -> dict[str, Tensor]:
        return {
            f"{_PREFIX}{name}.{part}.weight": getattr(module, part).detach()
            for name, module in self._adapters(model).items()
            for part in ("lora_A", "lora_B")
        }

    @override
    @torch.no_grad()
    def merge(self, model: PreTrainedModel) -> None:
        for name, module in self._adapters(model).items():
            wide = torch.promote_types(module.weight.dtype, torch.float32)
            delta = module.scale * (module.lora_B.to(wide) @ module.lora_A.to(wide))
            linear = nn.Linear(1, 1, bias=module.bias is not None, device="meta")
            linear.in_features, linear.out_features = module.in_features, module.out_features
            linear.weight = nn.Parameter((module.weight.to(wide) + delta).to(module.weight.dtype), requires_grad=False)
            if module.bias is not None:
                linear.bias = module.bias
            _swap(model, name, linear)

    @override
    def peft_config(self, model: PreTrainedModel) -> dict[str, Any]:
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": _endings(list(self._adapters(model)), model),
            "use_rslora": self.rslora,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }

    @override
    @classmethod
    def from_peft(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> PEFTStrategy:
        unsupported = sorted(field for field, value in config.items() if value and field not in _UNDERSTOOD)
        if config.get("bias", "none") != "none":
            unsupported.append("bias")
        if config.get("init_lora_weights", True) not in (True, False, None, "gaussian", "orthogonal"):
            # PiSSA, OLoRA and their kin also change the base model when they are loaded.
            unsupported.append(f"init_lora_weights={config['init_lora_weights']!r}")
        unsupported += sorted({"other tensors" for key in state if not re.search(r"\.lora_[AB]\.weight$", key)})
        if unsupported:
            raise ConfigError(f"this LoRA adapter uses {', '.join(unsupported)}, which ftlit cannot read yet.")
        # The tensors say which modules are adapted; the config may say it by pattern, layer number or default.
        modules = sorted({key.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for key in state})
        return cls(
            rank=int(config.get("r", 8)),
            alpha=float(config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout", 0.0)),
            target_modules=modules,
            rslora=bool(config.get("use_rslora", False)),
        )


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained low-rank product beside it; it keeps the names `weight` and `bias`.

    Args:
        linear: The layer to adapt; its weight and bias are shared, not copied.
        rank: Rank of the product.
        scale: Factor on the product.
        dropout: Probability of dropping an input of A.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.dropout, self.enabled = scale, dropout, True
        # Adapters stay in float32 under a half-precision base: bfloat16 would lose small updates.
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        options: dict[str, Any] = {"dtype": dtype, "device": linear.weight.device}
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, **options))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, rank={self.lora_A.shape[0]}, scale={self.scale}"

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + b + scale * dropout(x) A^T B^T`, shape `[..., in] -> [..., out]`."""
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        else:
            dtype = self.weight.dtype
        x = x.to(dtype)
        if not self.enabled:
            return F.linear(x, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        dropped = F.dropout(x, self.dropout) if self.training and self.dropout else x
        return cast(
            Tensor,
            _LowRankLinear.apply(
                x,
                dropped,
                self.weight.to(dtype),
                None if self.bias is None else self.bias.to(dtype),
                self.lora_A,
                self.lora_B,
                self.scale,
            ),
        )


class _LowRankLinear(torch.autograd.Function):
    """The layer as one function: it saves the input of A and the `r`-wide product, and no gradient of W is made."""

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
    ) -> Tensor:
        flat = dropped.reshape(-1, dropped.shape[-1])
        low = flat @ down.to(x.dtype).t()
        out = F.linear(x.reshape(flat.shape), weight, bias)
        out.addmm_(low, up.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(flat, low, weight, down, up)
        ctx.scale, ctx.shape, ctx.same = scale, x.shape, dropped is x
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, weight, down, up = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        # The thin matrix goes first in each product: with it second, CPU kernels take twice as long.
        low_t = (up.to(grad.dtype).t() @ grad.t()).mul_(ctx.scale)  # [r, T]
        grad_down = (low_t @ flat).to(down.dtype) if ctx.needs_input_grad[4] else None
        grad_up = (low.t() @ grad).mul_(ctx.scale).t().to(up.dtype) if ctx.needs_input_grad[5] else None
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            if ctx.same:
                grad_x.addmm_(low_t.t(), down.to(grad.dtype))
            else:
                grad_dropped = (low_t.t() @ down.to(grad.dtype)).view(ctx.shape)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_dropped, None, None, grad_down, grad_up, None


def _swap(model: PreTrainedModel, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)


def _endings(names: list[str], model: PreTrainedModel) -> list[str]:
    """The shortest list of name endings that selects exactly `names`, for PEFT's `target_modules`."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | LoRALinear)]
    selected = {name for name in every if name.rsplit(".", 1)[-1] in endings}
    return endings if selected == set(names) else sorted(names)
