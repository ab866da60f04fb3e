"""Tensors that are costly to make and depend on the start model alone: made once, kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from ftlit.cache import cache_dir
from ftlit.files import replacing
from ftlit.forgetting.fingerprint import fingerprint

if TYPE_CHECKING:
    from ftlit.stages.base import Stage


def kept(stage: Stage, kind: str, settings: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Reads tensors from the cache, or makes and keeps them; all ranks must call and get the same.

    Args:
        stage: The stage, its model at its start.
        kind: Folder of the cache, such as `fisher`.
        settings: What decides them besides the weights; primitive types.
        make: Makes them.
    """
    assert stage.policy is not None
    trainer = stage.trainer
    device = next(stage.policy.parameters()).device
    arithmetic = [str(trainer.precision), device.type, torch.__version__]
    key = [fingerprint(stage.policy.lm, stage.strategy), settings, *arithmetic]
    name = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
    path = cache_dir() / kind / f"{name}.pt"
    found = _read(path, device)
    here = torch.tensor(float(found is not None), device=device)
    if trainer.world_size > 1:  # ranks on several machines may have caches of their own
        here = trainer.strategy.reduce(here, reduce_op="sum")
    if found is not None and float(here) >= trainer.world_size:
        return found
    made = make()
    if trainer.is_global_zero:
        try:
            with replacing(path) as scratch:
                torch.save({name: tensor.cpu() for name, tensor in made.items()}, scratch)
        except OSError as error:
            rank_zero_only(print)(f"{kind} is not kept: {path.parent} cannot be written ({error})", flush=True)
    return made


def _read(path: Path, device: torch.device) -> dict[str, Tensor] | None:
    """Tensors of the cache; None where there are none, or torn ones."""
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError):
        return None
    return found if isinstance(found, dict) else None


__all__ = ["kept"]
