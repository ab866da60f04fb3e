"""Sharding a policy over ranks with FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from ftlit.batch import Example, pack
from ftlit.models.policy import Policy

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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
