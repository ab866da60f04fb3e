"""Modules of a model that a strategy does not see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def without(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Context in which some modules are not there: a strategy neither freezes nor adapts them.

    Args:
        model: The model.
        names: The modules.
    """
    kept = {name: model.get_submodule(name) for name in names}
    try:
        for name in kept:
            model.set_submodule(name, nn.Identity())
        yield
    finally:
        for name, part in kept.items():
            model.set_submodule(name, part)


__all__ = ["without"]
