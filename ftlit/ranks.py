"""Tensors that lie in shards on several ranks."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together from its shards; all ranks must ask. A plain one is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
