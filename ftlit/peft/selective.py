"""Base of strategies that train weights of the model itself, in place: all of them, or some."""

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


class SelectiveStrategy(PEFTStrategy):
    """Trains weights of the model itself; a subclass says which ones in `apply`, and nothing more.

    What training overwrites is copied to the memory of the CPU when something needs the start: a reference model, a
    control of forgetting, the way back. All of it works with weights that FSDP2 shards.

    Example:
        ```python
        class Norms(SelectiveStrategy):
            def apply(self, model):
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_("norm" in name)
        ```
    """

    trains_base: ClassVar[bool] = True

    _first: dict[str, Tensor] | None = None

    @override
    def remember_start(self, model: PreTrainedModel) -> None:
        if self._first is None:
            self._first = {name: _compact(p.detach()) for name, p in self.trained(model).items()}

    def _remembered(self) -> dict[str, Tensor]:
        if self._first is None:
            raise ConfigError(
                f"{type(self).__name__} overwrites the start weights: call remember_start(model) before training, "
                "then changes() and start() can be used."
            )
        return self._first

    @override
    def changes(self, model: PreTrainedModel) -> Iterator[Change]:
        first = self._remembered()
        for name, parameter in self.trained(model).items():
            path, _, own = name.rpartition(".")
            delta = parameter - first[name].to(parameter.device, parameter.dtype)
            yield DenseChange(name, delta, input_dim(model.get_submodule(path), own))

    @override
    def num_changed(self, model: PreTrainedModel) -> int:
        return sum(parameter.numel() for parameter in self.trained(model).values())

    @override
    @contextmanager
    def start(self, model: PreTrainedModel) -> Iterator[None]:
        first = self._remembered()
        now = self.trained(model)
        shards = {name: _shard(p).clone() for name, p in now.items() if isinstance(p, DTensor)}
        values = {name: p.data for name, p in now.items() if name not in shards}
        try:
            for name, parameter in now.items():
                value = first[name].to(parameter.device, parameter.dtype)
                if name in shards:  # in place: FSDP2 gathers from this memory
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
            for name, parameter in self.trained(model).items():
                if name in shards and not isinstance(parameter, DTensor):  # gathered meanwhile, and left so
                    parameter.data.copy_(whole(now[name].data))

    @override
    def not_between(self, model: PreTrainedModel) -> str | None:
        return None

    @override
    def _interpolate(self, model: PreTrainedModel, alpha: Callable[[str], float]) -> None:
        first = self._remembered()
        for name, parameter in self.trained(model).items():
            move(parameter, first[name], alpha(name))

    def merge(self, model: PreTrainedModel) -> None:
        """Nothing to fold: the weights are already in place."""


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


__all__ = ["SelectiveStrategy"]
