"""Parameter groups, and the learning rate over a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import Optimizer

from ftlit.errors import ConfigError

Schedule = Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"]
SCHEDULES = get_args(Schedule)


# ---- groups ---------------------------------------------------------------------------------------------------------


def parameter_groups(
    parameters: Mapping[str, nn.Parameter],
    lr_factors: Mapping[str, float],
    decay_all: bool = False,
) -> list[dict[str, Any]]:
    """Groups of parameters that are treated alike.

    Norms and biases (whatever has less than two dimensions) are not decayed, as is usual; embeddings are.

    Args:
        parameters: The trained parameters by name.
        lr_factors: Factor on the learning rate of each.
        decay_all: Decay norms and biases too.

    Returns:
        Groups with `params`, `name`, `lr_factor`, and `weight_decay: 0` where nothing is decayed; the largest rate
        first, so that the rate of the first group is the rate that is logged.
    """
    sorts: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        sorts.setdefault((lr_factors[name], decay_all or parameter.ndim >= 2), []).append(parameter)
    groups = []
    for (factor, decayed), members in sorted(sorts.items(), key=lambda item: item[0], reverse=True):
        words = ([] if factor == 1 else [f"lr x {factor:.4g}"]) + ([] if decayed else ["no decay"])
        group = {"params": members, "name": ", ".join(words) or "all", "lr_factor": factor}
        groups.append(group if decayed else {**group, "weight_decay": 0.0})
    return groups


def build(make: Callable[[Any], Optimizer], groups: list[dict[str, Any]]) -> Optimizer:
    """Makes the optimizer and scales the rate of each group.

    Args:
        make: Makes an optimizer of parameters or groups.
        groups: What `parameter_groups` returned; a single group is handed over as plain parameters, which every
            optimizer takes.
    """
    given = [{key: value for key, value in group.items() if key != "lr_factor"} for group in groups]
    optimizer = make(given if len(given) > 1 or "weight_decay" in given[0] else given[0]["params"])
    for group, source in zip(optimizer.param_groups, groups, strict=True):
        group["lr"] = group["lr"] * source["lr_factor"]
    return optimizer


def layer_factors(names: Iterable[str], num_layers: int, decay: float) -> dict[str, float]:
    """Layer-wise decay of the learning rate (Clark et al. 2020, arXiv:2003.10555, appendix A).

    Args:
        names: Names of parameters in the model.
        num_layers: Layers of the model, L.
        decay: Factor from one layer to the one below it.

    Returns:
        `decay ** depth`: depth 0 is the output layer, the final norm and what has no layer, 1 the last of the layers,
        L the first, L + 1 the embeddings (also where the output layer shares their weight).
    """
    factors = {}
    for name in names:
        if found := re.search(r"\.(\d+)\.", name):
            depth = num_layers - int(found[1])
        elif re.search(r"(^|\.)(embed\w*|wte|wpe|\w*embeddings?)(\.|$)", name):
            depth = num_layers + 1
        else:
            depth = 0
        factors[name] = decay**depth
    return factors


# ---- the rate over a run --------------------------------------------------------------------------------------------


def steps_of(amount: float, total: int) -> int:
    """Optimizer steps: `amount` itself if 1 or more, else that share of all."""
    return round(_steps(amount, total))


def _steps(amount: float, total: int) -> float:
    """The same, not rounded where it is a share."""
    return amount * total if amount < 1 else int(amount)


def rate(
    total: int, schedule: str, warmup: float = 0.0, min_lr: float = 0.0, decay: float = 0.1
) -> Callable[[int], float]:
    """The factor on the learning rate at each optimizer step.

    A decay that is a share takes what a warm-up that is rounded up has left. After a linear warm-up of w steps, with
    `x` the share of the remaining steps that is done: `cosine` `(1 + cos(pi x)) / 2`; `linear` `1 - x`; `constant` 1;
    `wsd` (warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395) 1, then linear over the last `decay` steps; these
    end at `min_lr`. `inverse_sqrt` `sqrt(w / step)` (Vaswani et al. 2017, section 5.3), not below `min_lr`.

    Args:
        total: Optimizer steps of the run.
        schedule: One of `SCHEDULES`.
        warmup: Steps of the warm-up, or their share.
        min_lr: Where the rate ends, as a share of the peak.
        decay: Steps of the decay of `wsd`, or their share.

    Returns:
        A function of the step (0 is the first).

    Raises:
        ConfigError: If warm-up and decay do not fit into the run.
    """
    first = steps_of(warmup, total)
    last = steps_of(decay, total)
    if schedule == "wsd" and first + last > total:
        if _steps(warmup, total) + _steps(decay, total) > total * (1 + 1e-9):
            raise ConfigError(
                f"warmup ({first} steps) and decay ({last} steps) are longer than the run ({total} steps); "
                "shorten them."
            )
        last = total - first  # both were rounded up

    def factor(step: int) -> float:
        if step < first:
            return (step + 1) / (first + 1)
        done = min(1.0, (step - first) / max(1, total - first))
        if schedule == "constant":
            return 1.0
        if schedule == "inverse_sqrt":
            return max(min_lr, math.sqrt(max(1, first) / max(1, first, step)))
        if schedule == "cosine":
            shape = (1 + math.cos(math.pi * done)) / 2
        elif schedule == "wsd":
            shape = min(1.0, max(0, total - step) / max(1, last))
        else:
            shape = 1 - done
        return min_lr + (1 - min_lr) * shape

    return factor


__all__ = ["SCHEDULES", "Schedule", "build", "layer_factors", "parameter_groups", "rate", "steps_of"]
