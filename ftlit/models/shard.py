"""Sharding a policy over ranks with FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from ftlit.batch import Example, pack
from ftlit.errors import ConfigError
from ftlit.models.policy import Policy

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    from ftlit.peft.base import PEFTStrategy


def shard(policy: Policy, mesh: DeviceMesh) -> None:
    """Shards each decoder layer, and what is outside of them (embedding, output layer) as one more group.

    Args:
        policy: The policy with its strategy applied, whole on every rank; changed in place.
        mesh: One dimension: the ranks to shard over.
    """
    for parameter in policy.parameters():
        if parameter.requires_grad:  # ranks may have drawn their first values differently
            _broadcast(parameter)
    for layer in decoder_layers(policy.lm):
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    _refuse_swaps(policy.strategy)


def _refuse_swaps(strategy: PEFTStrategy) -> None:
    """Makes a strategy whose `start` gives sharded weights other memory an error.

    FSDP2 keeps reading the old memory: the start would be the present model, or the process would end without a word.
    """
    enter = strategy.start

    @contextmanager
    def start(model: PreTrainedModel) -> Iterator[None]:
        with ExitStack() as stack:
            with _NoSwaps(type(strategy).__name__):
                stack.enter_context(enter(model))
            yield

    strategy.start = start  # type: ignore[method-assign]


class _NoSwaps(TorchFunctionMode):
    """Refuses `parameter.data = value` where either is sharded.

    Args:
        name: Name of the strategy, for the error.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__set__ and any(isinstance(value, DTensor) for value in args):  # type: ignore[attr-defined]
            raise ConfigError(
                f"{self._name}.start sets parameter.data, which FSDP2 does not follow: subclass "
                "ftlit.SelectiveStrategy, or copy into the memory of each shard (parameter.to_local().copy_(...))."
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """Context in which a sharded model is whole on every rank, and no layer needs the other ranks.

    For generation, where ranks run the model unequally often. All ranks must enter; a model that is not sharded is left
    as it is.
    """
    parts = [part for part in policy.modules() if isinstance(part, FSDPModule)]
    if parts:  # FSDP2 takes what runs first for the root, and generation runs only what is inside
        with torch.no_grad():
            policy(pack([Example([0, 0], [0, 1])]).to(next(policy.parameters()).device))
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(not isinstance(part, Policy), recurse=False)


def decoder_layers(lm: nn.Module) -> list[nn.Module]:
    """The layers that a model says must not be split."""
    names = set(getattr(lm, "_no_split_modules", None) or ())
    return [module for module in lm.modules() if type(module).__name__ in names]


@torch.no_grad()
def _broadcast(parameter: Tensor) -> None:
    if dist.get_backend() == "nccl" and not parameter.is_cuda:
        moved = parameter.cuda()
        dist.broadcast(moved, src=0)
        parameter.copy_(moved)
    else:
        dist.broadcast(parameter.data, src=0)
