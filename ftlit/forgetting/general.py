"""General rows that a control looks at before training, one micro-batch or one example at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from ftlit.batch import Example
from ftlit.forgetting.own_text import own_text
from ftlit.forgetting.replay import FIRST_OWN, OWN

if TYPE_CHECKING:
    from torch import Tensor

    from ftlit.stages.base import Stage


def general_rows(stage: Stage, name: str, rows: str, num_rows: int) -> Sequence[Example]:
    """The first rows of a source, or texts of the model's own: those that `Replay` uses too, never those of a probe.

    Args:
        stage: The stage, its model at its start.
        name: Name of the control.
        rows: `self`, a file, a folder, a hub id, or `sample:NAME`.
        num_rows: How many.
    """
    if rows == OWN:
        return own_text(stage, None, num_rows, skip=FIRST_OWN)
    data: Any = stage.trainer.datamodule
    return data.load_added(name, rows)[:num_rows]


def digest(examples: Sequence[Example]) -> str:
    """A hash of every token and weight."""
    made = hashlib.blake2b(digest_size=16)
    for example in examples:
        made.update(np.asarray(example.input_ids, np.int64).tobytes())
        made.update(np.asarray(example.weights, np.float64).tobytes())
    return made.hexdigest()


@contextmanager
def weights_with_gradients(stage: Stage, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Context in which the model is at its start, and some of its weights, frozen or not, take gradients.

    Args:
        stage: The stage.
        names: Names of weights in the unadapted model, as `Change.name` gives them.

    Yields:
        These weights by name.
    """
    assert stage.policy is not None
    lm = stage.policy.lm
    with stage.strategy.start(lm):
        weights = {name: lm.get_parameter(name) for name in names}
        frozen = {name: weight for name, weight in weights.items() if not weight.requires_grad}
        try:
            for name, weight in frozen.items():
                # The same numbers under a name of their own: what is adapted in one place may be shared with another.
                weights[name] = nn.Parameter(weight.detach())
                _put(lm, name, weights[name])
            yield dict(weights)
        finally:
            for name, weight in frozen.items():
                _put(lm, name, weight)


def _put(lm: nn.Module, name: str, weight: nn.Parameter) -> None:
    path, _, own = name.rpartition(".")
    setattr(lm.get_submodule(path), own, weight)


__all__ = ["digest", "general_rows", "weights_with_gradients"]
