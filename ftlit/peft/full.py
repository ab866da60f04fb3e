"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from ftlit.errors import ConfigError
from ftlit.peft.base import Change, DenseChange, PEFTStrategy, input_dim, move
from ftlit.ranks import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full(PEFTStrategy):
    """Train every weight of the model."""

    trains_base: ClassVar[bool] = True

    def __init__(self) -> None:
        self._start: dict[str, Tensor] | None = None

    @override
    def apply(self, model: PreTrainedModel) -> None:
        model.requires_grad_(True)

    @override
    def remember_start(self, model: PreTrainedModel) -> None:
        if self._start is None:
            self._start = {name: _compact(p.detach()) for name, p in model.named_parameters()}

    def _remembered(self) -> dict[str, Tensor]:
        if self._start is None:
            raise ConfigError(
                "full fine-tuning overwrites the start weights: call remember_start(model) before training, "
                "then changes() and start() can be used."
            )
        return self._start

    @override
    def changes(self, model: PreTrainedModel) -> Iterator[Change]:
        start = self._remembered()
        for name, parameter in model.named_parameters():
            path, _, own = name.rpartition(".")
            delta = parameter - start[name].to(parameter.device, parameter.dtype)
            yield DenseChange(name, delta, input_dim(model.get_submodule(path), own))

    @override
    def num_changed(self, model: PreTrainedModel) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    @override
    @contextmanager
    def start(self, model: PreTrainedModel) -> Iterator[None]:
        start = self._remembered()
        now = dict(model.named_parameters())
        shards = {name: _shard(p).clone() for name, p in now.items() if isinstance(p, DTensor)}
        values = {name: p.data for name, p in now.items() if name not in shards}
        try:
            for name, parameter in now.items():
                value = start[name].to(parameter.device, parameter.dtype)
                if name in shards:  # in place: FSDP gathers from this memory
                    _shard(parameter).copy_(_shard(value))
                else:
                    parameter.data = whole(value)
            yield
        finally:
            for name, parameter in now.items():
                if name in shards:
                    _shard(parameter).copy_(shards[name])
                else:
                    parameter.data = values[name]
            for name, parameter in model.named_parameters():
                if name in shards and not isinstance(parameter, DTensor):  # gathered meanwhile, and left so
                    parameter.data.copy_(whole(now[name].data))

    @override
    def not_between(self, model: PreTrainedModel) -> str | None:
        return None

    @override
    def _interpolate(self, model: PreTrainedModel, alpha: Callable[[str], float]) -> None:
        start = self._remembered()
        for name, parameter in model.named_parameters():
            move(parameter, start[name], alpha(name))

    def merge(self, model: PreTrainedModel) -> None:
        """Nothing to fold: the weights are the result."""


def _shard(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor."""
    assert isinstance(tensor, DTensor)
    local: Tensor = tensor.to_local()
    return local.detach()


def _compact(tensor: Tensor) -> Tensor:
    """A copy in the memory of the CPU; in bfloat16 where that loses nothing, as with weights that came in it."""
    half = tensor.to(torch.bfloat16)
    kept = half if torch.equal(half.to(tensor.dtype), tensor) else tensor
    return kept.to("cpu", copy=True)


__all__ = ["Full"]
