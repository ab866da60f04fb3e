"""What is not as it was when a run goes on: the weights it stands on, its precision, and its rate."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from ftlit.forgetting.fingerprint import of_tensor
from ftlit.stages.optimizers import rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftlit.peft import PEFTStrategy


@torch.no_grad()
def base_print(lm: PreTrainedModel, strategy: PEFTStrategy) -> str:
    """Names the weights of a model that has just been loaded, before it is trained or sharded.

    Trained parameters that a strategy adds do not count; the type does, for other types round otherwise.

    Args:
        lm: The model with its strategy.
        strategy: The strategy.
    """
    digest = hashlib.blake2b(digest_size=16)
    kinds = set()
    for name, parameter in sorted(lm.named_parameters()):
        if parameter.is_meta or (parameter.requires_grad and not strategy.trains_base):
            continue
        kinds.add(str(parameter.dtype).removeprefix("torch."))
        digest.update(of_tensor(name, parameter.detach()))
    return f"{' '.join(sorted(kinds))} {digest.hexdigest()}"


def going_on(saved: Mapping[str, Any], base: str, here: Mapping[str, Any], step: int) -> Iterator[str]:
    """What is to be said of a run that goes on with something else than it began with.

    Args:
        saved: What its checkpoint says.
        base: `base_print` of the model that it goes on with.
        here: The precision and the schedule that it goes on with.
        step: Optimizer steps taken.
    """
    before = saved.get("base") or ""
    if before.rpartition(" ")[0] == base.rpartition(" ")[0] and before != base:
        yield (
            "the base model is not the one that the run began with: what a reference and measures of forgetting stand "
            "on has changed"
        )
    if (precision := saved.get("precision")) and precision != here["precision"]:
        yield f"another precision: {precision} -> {here['precision']}"
    was, schedule = saved.get("schedule") or {}, here["schedule"]
    if was and schedule and was != schedule:
        changed = [f"{key} {was[key]} -> {value}" for key, value in schedule.items() if was.get(key) != value]
        before_, after = (_rate(one, step) for one in (was, schedule))
        yield f"another schedule ({', '.join(changed)}): the rate of the next step is {after:.3g}, not {before_:.3g}"


def _rate(schedule: Mapping[str, Any], step: int) -> float:
    """The rate of the step after `step`."""
    shape = {key: schedule[key] for key in ("schedule", "warmup", "min_lr", "decay")}
    factor: float = rate(schedule["steps"], **shape)(step)
    return float(schedule["lr"]) * factor


__all__ = ["base_print", "going_on"]
