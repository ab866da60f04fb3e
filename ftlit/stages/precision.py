"""In which precision a run computes, and over what its weights are spread: what ftlit decides, and what it refuses."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import DoublePrecision, MixedPrecision, Precision
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
        precision: `32-true`, `64-true`, `bf16-mixed` or `16-mixed`: one that a checkpoint can name.
    """
    device: Any = trainer.strategy.root_device.type
    kinds: Any = precision
    plugin: Precision = DoublePrecision() if precision == "64-true" else Precision()
    if precision.endswith("mixed"):
        plugin = MixedPrecision(kinds, device)
    trainer.strategy.precision_plugin = plugin


def note_slow(trainer: L.Trainer) -> None:
    """Says that a GPU trains in float32, unless the Trainer is one that decides: Lightning's own default says nothing.

    Args:
        trainer: A Trainer that is about to train.
    """
    device = trainer.strategy.root_device
    if device.type == "cpu" or str(trainer.precision) != "32-true" or getattr(trainer, "decides_precision", False):
        return
    half = decided(device)
    if half == "32-true":
        half = "bf16-mixed"
    say = (
        f'note       trains in float32 on {device.type}: L.Trainer(precision="{half}") is faster and takes less memory'
    )
    rank_zero_only(print)(say, flush=True)


def check_precision(trainer: L.Trainer) -> None:
    """Sees to it that trained weights and the optimizer's moments are in float32 at least.

    Half of the second moments would be 0 in float16, and in bfloat16 most steps are rounded away. Frozen weights are
    held in half precision under `mixed` too, so `bf16-true` has nothing more to offer.

    Args:
        trainer: A Trainer that is about to train, or to evaluate what was trained, in the same numbers.

    Raises:
        ConfigError: If the precision is not for training, or not known.
    """
    precision = str(trainer.precision)
    if precision not in _KNOWN:
        raise ConfigError(f"trainer.precision {precision} is not supported: use bf16-mixed, 16-mixed or 32-true.")
    if precision == "16-true" and trainer.state.fn == "fit":
        raise ConfigError(
            "trainer.precision 16-true rounds small gradients and most of the optimizer's moments to 0: use 16-mixed, "
            "which holds frozen weights in float16 too."
        )
    if precision == "bf16-true":
        set_precision(trainer, "bf16-mixed")
        say = "note       bf16-true runs as bf16-mixed: frozen weights in bfloat16, trained ones in float32"
        rank_zero_only(print)(say, flush=True)


def widen(module: nn.Module, mixed: bool) -> None:
    """Puts what is trained into float32 at least, also in a model that was built in half precision.

    Args:
        module: What is trained, with what is frozen beside it.
        mixed: Whether autocast lets weights of two types meet; where it does not, the frozen ones go along.
    """
    narrow = [p for p in module.parameters() if p.is_floating_point() and p.dtype.itemsize < 4]
    trained = [parameter for parameter in narrow if parameter.requires_grad]
    for parameter in trained if mixed or not trained else narrow:
        parameter.data = parameter.data.float()


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


__all__ = ["check_precision", "check_strategy", "decided", "note_slow", "set_precision", "widen"]
