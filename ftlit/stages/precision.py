"""In which precision a run computes, and over what its weights are spread: what ftlit decides, and what it refuses."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

from ftlit.errors import ConfigError
from ftlit.stages.fsdp import FSDP2

_KNOWN = ("32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")
_FOREIGN = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


def decided(device: torch.device) -> str:
    """The precision where nobody says one: half on a GPU, bfloat16 where it has that, and float32 on a CPU."""
    if device.type != "cuda":
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def set_precision(trainer: L.Trainer, precision: str) -> None:
    """Gives a Trainer another precision before its model is loaded.

    Args:
        trainer: A Trainer.
        precision: One that needs no change of the model: `32-true`, `bf16-mixed`, `16-mixed`.
    """
    device: Any = trainer.strategy.root_device.type
    kinds: Any = precision
    plugin = MixedPrecision(kinds, device) if precision.endswith("mixed") else Precision()
    trainer.strategy.precision_plugin = plugin


def check_precision(trainer: L.Trainer) -> None:
    """Sees to it that trained weights and the optimizer's moments are in float32 at least.

    Half of the second moments would be 0 in float16, and in bfloat16 most steps are rounded away. Frozen weights are
    held in half precision under `mixed` too, so `bf16-true` has nothing more to offer.

    Args:
        trainer: A Trainer that is about to train.

    Raises:
        ConfigError: If the precision is not for training, or not known.
    """
    precision = str(trainer.precision)
    if precision not in _KNOWN:
        raise ConfigError(f"trainer.precision {precision} is not supported: use bf16-mixed, 16-mixed or 32-true.")
    if precision == "16-true":
        raise ConfigError(
            "trainer.precision 16-true rounds small gradients and most of the optimizer's moments to 0: use 16-mixed, "
            "which holds frozen weights in float16 too."
        )
    if precision == "bf16-true":
        set_precision(trainer, "bf16-mixed")
        say = "note       bf16-true trains as bf16-mixed: frozen weights in bfloat16, trained ones in float32"
        rank_zero_only(print)(say, flush=True)


def widen(module: nn.Module) -> None:
    """Puts what is trained into float32 at least, also in a model that was built in half precision."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def check_strategy(strategy: Any) -> None:
    """Refuses what shards in ways that ftlit does not know.

    Args:
        strategy: A Lightning strategy, or what a config names: a name or a class path.

    Raises:
        ConfigError: Saying what to type instead.
    """
    if isinstance(strategy, str):
        last = strategy.rpartition(".")[2]
        foreign = last in _FOREIGN or last.lower().startswith(("deepspeed", "fsdp_"))
        name = last
    else:
        foreign = isinstance(strategy, DeepSpeedStrategy | FSDPStrategy | ModelParallelStrategy)
        foreign, name = foreign and not isinstance(strategy, FSDP2), type(strategy).__name__
    if foreign:
        raise ConfigError(
            f"trainer.strategy {name} is not supported: --config trainer/fsdp shards weights, gradients and optimizer "
            "over the GPUs (in Python: strategy=ftlit.stages.fsdp.FSDP2())."
        )


__all__ = ["check_precision", "check_strategy", "decided", "set_precision", "widen"]
