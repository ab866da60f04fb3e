"""How far the weights have moved from where the run started."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from ftlit.peft.matching import layer_of
from ftlit.ranks import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftlit.peft.base import PEFTStrategy

OUTSIDE = -1
"""Stands for what is in no layer: embeddings, the last norm, the output layer."""


class Drift(NamedTuple):
    """Relative changes of weights, `||W - W_start||_F / ||W_start||_F`.

    Attributes:
        overall: Over all weights of the model, those that cannot change included.
        layers: Over the weights of each layer, by its number; `OUTSIDE` for what is in none.
    """

    overall: float
    layers: dict[int, float]


def start_norms(lm: PreTrainedModel, strategy: PEFTStrategy) -> dict[int, float]:
    """Squared Frobenius norm of the start weights of each layer; all ranks must ask.

    Args:
        lm: The model.
        strategy: The strategy applied to it; parameters that it adds do not count.
    """
    added = set() if strategy.trains_base else set(strategy.trained(lm))
    norms: dict[int, float] = {}
    with torch.no_grad(), strategy.start(lm):
        for name, parameter in lm.named_parameters():
            if name not in added or not parameter.requires_grad:
                layer = _layer(name)
                norms[layer] = norms.get(layer, 0.0) + float(whole(parameter.detach().double().square().sum()))
    return norms


def drift(lm: PreTrainedModel, strategy: PEFTStrategy, norms: dict[int, float]) -> Drift | None:
    """How far the weights are from the start; None for a strategy that changes none; all ranks must ask.

    Args:
        lm: The model.
        strategy: The strategy applied to it.
        norms: What `start_norms` returned.
    """
    moved: dict[int, float] = {}
    with torch.no_grad():
        for change in strategy.changes(lm):
            layer = _layer(change.name)
            moved[layer] = moved.get(layer, 0.0) + float(whole(change.sq_norm()))
    if not moved:
        return None
    layers = {layer: math.sqrt(moved.get(layer, 0.0) / norms[layer]) for layer in sorted(norms) if norms[layer]}
    return Drift(math.sqrt(sum(moved.values()) / sum(norms.values())), layers)


def _layer(name: str) -> int:
    number = layer_of(name)
    return OUTSIDE if number is None else number


__all__ = ["OUTSIDE", "Drift", "drift", "start_norms"]
