"""Lightning's own callbacks that cannot work here: what replaces batches, weights or the rate behind a stage's back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import callbacks as own

from ftlit.errors import ConfigError

_AVERAGES = (
    "checkpoints, adapters and `--ckpt_path last` hold the weights that are trained, not an average of them; let "
    "`--config forgetting/interpolate` or a `schedule` that ends at 0 do what averaging does."
)
# Each with why, and what to do instead.
_REFUSED: dict[type, str] = {
    own.BatchSizeFinder: (
        "a batch is a whole optimizer step, so that another size is another training; data.max_tokens bounds the "
        "memory of a micro-batch and changes nothing else."
    ),
    own.LearningRateFinder: (
        "the rate that it finds is not the one that is trained with; try two or three values of model.lr with a few "
        "trainer.max_steps, and compare them with `ftlit compare`."
    ),
    own.GradientAccumulationScheduler: (
        "a batch is a whole optimizer step, planned ahead; set trainer.accumulate_grad_batches."
    ),
    own.StochasticWeightAveraging: _AVERAGES,
    own.WeightAveraging: _AVERAGES,
    own.BaseFinetuning: (
        "what is trained is said by model.peft, and what is frozen never comes into the optimizer; name a strategy, "
        "such as `--config peft/lora` with layers_to_transform, or model.layer_decay."
    ),
    own.ModelPruning: (
        "checkpoints hold what is trained under its own name, and a pruned weight is two others; prune the model that "
        "`ftlit export` writes."
    ),
    own.SpikeDetection: (
        "it looks at the last micro-batch alone, and leaves batches out by numbers that are those of optimizer steps; "
        "trainer.gradient_clip_val bounds what one step can do, and a loss that is no number stops the run."
    ),
}


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Refuses callbacks that would train something else than the stage says.

    Args:
        callbacks: Those of the trainer.

    Raises:
        ConfigError: Naming the first, with what to do instead.
    """
    for callback in callbacks:
        for kind, why in _REFUSED.items():
            if isinstance(callback, kind):
                raise ConfigError(f"{type(callback).__name__} does not work with ftlit: {why}")


__all__ = ["check_callbacks"]
