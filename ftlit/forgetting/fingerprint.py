"""A name for the weights of a model, so that what was made with them can be found again."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ftlit.ranks import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftlit.peft.base import PEFTStrategy

_SAMPLED = 1024
# Parts of a config that change no score.
_NOT_THE_MODEL = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(lm: PreTrainedModel, strategy: PEFTStrategy) -> str:
    """Names the model as it was at the start of the run, whatever device it is on; all ranks must ask.

    Of every frozen tensor the sum of its bits and 1,024 entries spread over it are hashed: a change of any one entry
    shows, and a model of seven billion weights takes a second. The config counts too: other positions or norms make
    another model of the same weights. Trained parameters of an adapter do not count, because
    the model at the start does without them;
    where it goes on from another adapter, the factor on that one's product does.

    Args:
        lm: The model.
        strategy: The strategy applied to it; `remember_start` must have been called where it trains the model itself.

    Returns:
        32 hexadecimal digits.
    """
    added = set() if strategy.trains_base else set(strategy.trained(lm))
    settings = {key: value for key, value in lm.config.to_dict().items() if key not in _NOT_THE_MODEL}
    digest = hashlib.blake2b(type(lm).__name__.encode(), digest_size=16)
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(strategy.start_settings(lm).encode())
    with strategy.start(lm):
        for name, parameter in sorted(lm.named_parameters()):
            if name in added and parameter.requires_grad:
                continue
            digest.update(of_tensor(name, parameter.detach()))
    return digest.hexdigest()


def of_tensor(name: str, value: Tensor) -> bytes:
    """What is hashed of a tensor: its name, shape and type, the sum of its bits, entries spread over it."""
    tensor = whole(value)
    return f"{name} {tuple(tensor.shape)} {tensor.dtype} {_bits(tensor)}".encode() + _spread(tensor)


def _bits(tensor: Tensor) -> int:
    """Sum of the entries read as whole numbers: exact, so the same in any order and on any device."""
    return int(tensor.contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))


def _spread(tensor: Tensor) -> bytes:
    flat = tensor.reshape(-1)
    places = np.unique(np.linspace(0, max(0, flat.numel() - 1), min(_SAMPLED, flat.numel())).astype(np.int64))
    taken = flat[torch.from_numpy(places).to(flat.device)].contiguous()
    return taken.view(torch.uint8).cpu().numpy().tobytes()


__all__ = ["fingerprint", "of_tensor"]
