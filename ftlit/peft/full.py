"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from typing_extensions import override

from ftlit.errors import ConfigError
from ftlit.peft.base import Change, DenseChange, PEFTStrategy, input_dim

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
            self._start = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}

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
            delta = parameter - start[name].to(parameter.device)
            yield DenseChange(name, delta, input_dim(model.get_submodule(path), own))

    @override
    def num_changed(self, model: PreTrainedModel) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    @override
    @contextmanager
    def start(self, model: PreTrainedModel) -> Iterator[None]:
        start = self._remembered()
        now = {name: parameter.data for name, parameter in model.named_parameters()}
        try:
            for name, parameter in model.named_parameters():
                parameter.data = start[name].to(parameter.device)
            yield
        finally:
            for name, parameter in model.named_parameters():
                parameter.data = now[name]

    def merge(self, model: PreTrainedModel) -> None:
        """Nothing to fold: the weights are the result."""


__all__ = ["Full"]
