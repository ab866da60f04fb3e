"""Adapters whose run gave the model more, or fewer, tokens: the base gets the same vocabulary first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ftlit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BASE = ".base_layer.weight"
# A module that is trained whole, a second and third time.
_DOUBLE = re.compile(r"\.(original_module|modules_to_save)\.(?=\w+$)")


@torch.no_grad()
def take_vocabulary(
    model: PreTrainedModel, state: Mapping[str, Tensor], inside: str, saved_whole: Iterable[str] = ()
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Gives a model the embeddings that an adapter brings with it.

    The PEFT library writes the embedding and the output layer beside an adapter whose model was resized
    (`save_embedding_layers`); they are part of the frozen model, and whoever writes the adapter again writes them too.

    Args:
        model: The base model, without an adapter; resized where the adapter's vocabulary has another size.
        state: The tensors of the adapter.
        inside: What their names begin with.
        saved_whole: Name endings of the modules that are trained whole: their tensors are the strategy's own.

    Returns:
        The tensors that are left for the strategy, and the names of the parameters that were brought along.

    Raises:
        ConfigError: If the vocabulary cannot be had.
    """
    ends = _ends(model)
    sizes = {name: size for name in ends if (size := _rows(state, f"{inside}{name}")) is not None}
    had = model.get_input_embeddings().weight.shape[0]
    # Trained whole and saved with the embeddings, a module is written three times; the plain name is the trained one.
    rest = {name: one for name, one in state.items() if not _DOUBLE.search(name) or _DOUBLE.sub(".", name) not in state}
    brought = list[str]()
    resized = bool(sizes) and set(sizes.values()) != {had}
    if resized:
        _check(model, sizes, state, inside, had)
        model.resize_token_embeddings(next(iter(sizes.values())), mean_resizing=False)
    for name in ends:
        weight = model.get_submodule(name).get_parameter("weight")
        key, base = f"{inside}{name}.weight", f"{inside}{name}{_BASE}"
        if any(name.endswith(ending) for ending in saved_whole):
            continue
        if key in rest:
            weight.copy_(rest.pop(key))
            brought.append(f"{name}.weight")
        elif base in rest and resized:
            weight.copy_(rest[base])
            brought.append(f"{name}.weight")
    return rest, tuple(brought)


def _ends(model: PreTrainedModel) -> list[str]:
    """Names of the input embedding and of the output layer."""
    modules: list[nn.Module | None] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [name for name, module in model.named_modules() if any(module is one for one in modules if one is not None)]


def _rows(state: Mapping[str, Tensor], name: str) -> int | None:
    """How many tokens an adapter knows at one of the ends; None where it has nothing to do with it."""
    for ending in (".weight", _BASE, ".lora_B.weight"):
        if f"{name}{ending}" in state:
            return state[f"{name}{ending}"].shape[0]
    if (factor := state.get(f"{name}.lora_embedding_A")) is not None:
        return factor.shape[1]
    return None


def _check(
    model: PreTrainedModel, sizes: Mapping[str, int], state: Mapping[str, Tensor], inside: str, had: int
) -> None:
    """Refuses a vocabulary of which rows are missing, or which is not that of this model with more tokens.

    Raises:
        ConfigError: If so.
    """
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        raise ConfigError(f"the adapter knows different numbers of tokens at both ends ({listed}): it is torn.")
    (rows,) = set(sizes.values())
    own, tied = _ends(model), model.get_output_embeddings() is not None
    tied = tied and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    whole = [name for name in own if f"{inside}{name}.weight" in state or f"{inside}{name}{_BASE}" in state]
    if rows > had and (missing := [name for name in own if name not in whole]) and not (tied and whole):
        raise ConfigError(
            f"the adapter was trained on a model with {rows:,} tokens, this one has {had:,}, and the rows of the "
            f"others in {missing[0]} are not in the adapter; give a base model with {rows:,} tokens (--base), or save "
            "the adapter with save_embedding_layers=True."
        )
    for name in whole:
        kept = state.get(f"{inside}{name}{_BASE}")
        if kept is None:
            continue
        weight = model.get_submodule(name).get_parameter("weight")
        most = min(rows, had)
        ours, theirs = weight[:most].float(), kept[:most].to(weight.device).float()
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3):
            raise ConfigError(
                f"the adapter carries a weight {name!r} that is not this model's; give the base model it was trained "
                "on."
            )


__all__ = ["take_vocabulary"]
