"""Weights of the model itself that a strategy trains beside an adapter; the frozen first value stays next to each.

The trained parameter takes the place of the original in its module, and the original moves to `start_NAME` in the same
module: the class of the module, its name and what other code reads of it stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ftlit.errors import ConfigError

START = "start_"


class Copy(NamedTuple):
    """A trained parameter and its frozen start.

    Attributes:
        path: Name of the module in the model.
        module: The module that holds both.
        name: Name of the parameter in the module, such as `weight`.
    """

    path: str
    module: nn.Module
    name: str

    @property
    def full_name(self) -> str:
        """Name of the parameter in the model."""
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def trained(self) -> nn.Parameter:
        """What training moves."""
        return self.module.get_parameter(self.name)

    @property
    def start(self) -> nn.Parameter:
        """What it was when the run started."""
        return self.module.get_parameter(START + self.name)


def train_copy(module: nn.Module, name: str) -> None:
    """Replaces a frozen parameter by a trained copy, in float32 at least: half precision would lose small updates.

    A second call makes the present value the start.

    Args:
        module: The module that holds the parameter.
        name: Its name in the module.
    """
    present = module.get_parameter(name)
    if START + name in dict(module.named_parameters(recurse=False)):
        setattr(module, START + name, nn.Parameter(present.detach().clone(), requires_grad=False))
        return
    wide = torch.promote_types(present.dtype, torch.float32)
    setattr(module, START + name, present.requires_grad_(False))
    setattr(module, name, nn.Parameter(present.detach().to(wide, copy=True)))


def keep_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Lets a module whose parameters became wider take and return tensors of the model's own type.

    Args:
        module: A module with trained copies of all its parameters.
        dtype: Type of the model's weights.
    """
    module.register_forward_pre_hook(_widen_inputs)
    module.register_forward_hook(_Narrow(dtype))


def _widen_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    wide = next(module.parameters(recurse=False)).dtype
    if any(isinstance(a, Tensor) and torch.is_autocast_enabled(a.device.type) for a in args):
        return args
    return tuple(a.to(wide) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


class _Narrow:
    """A hook that can be told from others when it is taken off again."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.to(self.dtype)


def copies(model: nn.Module) -> Iterator[Copy]:
    """All trained copies of a model."""
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        for name in names:
            if START + name in names:
                yield Copy(path, module, name)


@contextmanager
def at_start(model: nn.Module) -> Iterator[None]:
    """Context in which the starts stand in the places of the trained copies.

    Raises:
        ConfigError: If the weights are sharded: FSDP would put the trained ones back.
    """
    now = [(copy, copy.trained) for copy in copies(model)]
    if any(isinstance(trained, DTensor) for _, trained in now):
        raise ConfigError("the start of trained modules cannot be restored while they are sharded; use DDP.")
    try:
        for copy, _ in now:
            setattr(copy.module, copy.name, copy.start)
        yield
    finally:
        for copy, trained in now:
            setattr(copy.module, copy.name, trained)


@torch.no_grad()
def merge_copies(model: nn.Module) -> None:
    """Keeps the trained values, in the type that the model had, and removes the starts."""
    found = list(copies(model))
    for copy in found:
        narrow = [hook.dtype for hook in copy.module._forward_hooks.values() if isinstance(hook, _Narrow)]
        value = copy.trained.detach().to(narrow[0] if narrow else copy.start.dtype)
        setattr(copy.module, copy.name, nn.Parameter(value, requires_grad=False))
        delattr(copy.module, START + copy.name)
    for copy in found:
        hooks: Any
        for hooks in (copy.module._forward_hooks, copy.module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook is _widen_inputs or isinstance(hook, _Narrow)]:
                del hooks[key]


__all__ = ["START", "Copy", "at_start", "copies", "keep_dtype", "merge_copies", "train_copy"]
