"""Which parts of a model text runs through, and which of its layers are gates or experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel as Model
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def setting(config: Any, *names: str) -> Any:
    """The first of some fields of a config that is set; None where none is, or where it differs from layer to layer."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:
            continue
        if value is not None:
            return value
    return None


def beside_text(model: PreTrainedModel) -> list[str]:
    """The topmost modules that text never reaches: towers and projectors for images and sound."""
    text, embedding = model.config.get_text_config(), model.get_input_embeddings()
    inner = [(name, part) for name, part in model.named_modules() if name and isinstance(part, Model)]
    if text is model.config:
        towers = [name for name, part in inner if type(part.config) is not type(text)]
        return [name for name in towers if not any(name.startswith(f"{other}.") for other in towers)]
    trunk = next(
        (n for n, p in inner if type(p.config) is type(text) and any(m is embedding for m in p.modules())), None
    )
    if trunk is None:
        return []
    head = model.get_output_embeddings()
    names, place = [], ""
    for step in trunk.split("."):
        children = model.get_submodule(place).named_children()
        others = [(f"{place}.{name}".lstrip("."), part) for name, part in children if name != step]
        names += [name for name, part in others if part is not head and next(part.parameters(), None) is not None]
        place = f"{place}.{step}".lstrip(".")
    return names


def is_gate(model: PreTrainedModel, layer: nn.Module, rank: int) -> bool:
    """Whether a linear layer is a gate or a router: a product of this rank would be larger than the layer.

    An attention head is the narrowest thing that a token's states are projected to; what is narrower than that weighs
    or chooses.

    Args:
        model: The model that it is of.
        layer: A linear layer.
        rank: Rank of the product that would be put beside it.
    """
    config = model.config.get_text_config()
    width, heads = setting(config, "hidden_size", "n_embd", "d_model"), setting(config, "num_attention_heads", "n_head")
    head = setting(config, "head_dim") or (width // heads if width and heads else rank)
    weight: Any = layer.weight
    return bool(min(weight.shape) < min(rank, head)) or not is_plain(layer)


def is_plain(layer: nn.Module) -> bool:
    """Whether a linear layer or an embedding does nothing but multiply or look up."""
    return type(layer).forward in (nn.Linear.forward, Conv1D.forward, nn.Embedding.forward)


def experts(model: PreTrainedModel) -> dict[str, int]:
    """The modules whose weights are matrices of many experts in one tensor, with how many numbers they hold."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d):
            continue
        size = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 3 and p.shape[0] > 1)
        if size:
            found[name] = size
    return found


__all__ = ["beside_text", "experts", "is_gate", "is_plain", "setting"]
