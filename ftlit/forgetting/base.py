"""The contract of a control of forgetting: a callback that acts through five seams and no other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import lightning as L
from torch import Tensor
from typing_extensions import override

from ftlit.batch import Example, PackedBatch
from ftlit.errors import ConfigError
from ftlit.objectives.scores import TokenScores

if TYPE_CHECKING:
    from ftlit.data.added import AddedRows
    from ftlit.stages.base import Stage


class Penalty(NamedTuple):
    """What a control adds for one micro-batch.

    Attributes:
        loss: Its part of the control's term of the step: the term is the sum over all micro-batches and ranks, before
            it is multiplied by the control's weight. Carries the gradient.
        metrics: Parts of step metrics, likewise sums; the same names for every micro-batch. See `summary`.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class ForgettingControl(L.Callback):
    """Keeps a model from forgetting, in any stage and with any strategy.

    A control acts where it is sound under accumulation, mixed precision, clipping and several ranks:

    - **prepare**: `prepare(stage)` runs once before training with the model at its start, for what needs it (own
      generations, start scores, a Fisher matrix); keep what is costly in a cache on disk.
    - **data**: `added_rows(stage)` gives rows that the planner puts beside the stage's own, counted in tokens.
    - **loss**: `penalty(stage, batch, scores)` adds to the loss of a micro-batch, from the one forward pass of all;
      `needs` and `kl` say which scores it reads.
    - **gradient**: Lightning's `on_before_optimizer_step`, once a step, unscaled and summed, before clipping.
    - **weights**: `after_step(stage)`, once a step that was taken, outside clipping and optimizer.

    What of its state cannot be made again belongs into `state_dict` (numbers, strings, tensors only); the start weights
    are not state, they come from the base model.

    Args:
        weight: Factor on its term; a `ForgettingBudget` turns it while the model trains. 0: training is bitwise what
            it is without the control.
        name: What it is called in the log; its class in snake case when left out.

    Raises:
        ConfigError: If the weight is negative.
    """

    in_loss: ClassVar[bool] = True
    """Whether the control is a term of the loss (its weight then shares in the normalisation of a budget)."""
    has_weight: ClassVar[bool] = True
    """Whether its weight acts while the model trains, so that a budget can turn it."""
    of_a_step: ClassVar[tuple[str, ...]] = ()
    """Names of what it logs of each optimizer step, as `forgetting/NAME/...`."""

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"{type(self).__name__}.weight must be a number of at least 0, got {weight}.")
        self.weight = float(weight)
        self.name = name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()
        self.source = 0
        self.step_values: dict[str, float] = {}
        """What it found of the present step besides the metrics of `penalty`; logged as these are, under its name."""
        self.normalised = False
        """Whether the loss is divided by 1 and the weights of such controls; set by whoever turns the weight."""

    # ---- the seams ------------------------------------------------------------------------------------------------

    def refuse(self, stage: Stage) -> str | None:
        """Why this control makes no sense with a stage and its strategy, in one sentence; None where it does."""
        return None

    def prepare(self, stage: Stage) -> None:
        """Computes what needs the model at its start.

        Called once, after the model is loaded and before training and a checkpoint's weights; the model is in
        evaluation mode on its device.
        """

    def added_rows(self, stage: Stage) -> AddedRows | None:
        """Rows to be trained beside those of the stage; `self.source` is the number they are given in the batches."""
        return None

    def held_out(self) -> Mapping[str, Sequence[Example]]:
        """Documents it measures forgetting on, by name; a run that also trains them is warned of."""
        return {}

    @property
    def needs(self) -> frozenset[str]:
        """Token scores with gradients that `penalty` reads besides `logps` and `correct`."""
        return frozenset()

    @property
    def kl(self) -> Mapping[int, float]:
        """For each source of rows whose divergence from the start `penalty` reads, the temperature.

        Of rows that the control added itself nothing but this divergence is then scored.
        """
        return {}

    def penalty(self, stage: Stage, batch: PackedBatch, scores: TokenScores) -> Penalty | None:
        """The control's part of the loss of one micro-batch; None only if it is None for all.

        Args:
            stage: The stage; `stage.totals` holds the plan of the present step.
            batch: The micro-batch, with the rows of all sources.
            scores: Scores of all its targets; but 0, without a gradient, for rows that were added for their `kl` alone.
        """
        return None

    def summary(self, sums: dict[str, float]) -> dict[str, float]:
        """The step metrics made from the sums of `Penalty.metrics`, logged as `forgetting/NAME/...`."""
        return sums

    def after_step(self, stage: Stage) -> None:
        """Changes the weights after the optimizer has stepped."""

    # ---- state ----------------------------------------------------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        return f"{type(self).__qualname__}[{self.name}]"

    def state_dict(self) -> dict[str, Any]:
        """The weight, which a budget may have turned."""
        return {"weight": self.weight}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from it."""
        self.weight = state_dict["weight"]

    def describe(self) -> str:
        """What the control does in this run, in a line of the summary."""
        return f"{type(self).__name__} ({self.name}), weight {self.weight:g}"


__all__ = ["ForgettingControl", "Penalty"]
