"""Supervised fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from torch import Tensor

from ftlit.batch import PackedBatch, StepTotals
from ftlit.errors import ConfigError, nearest
from ftlit.metrics import TokenNLL
from ftlit.objectives.scores import EXTRAS, TokenScores
from ftlit.objectives.sft import CrossEntropy, TokenObjective
from ftlit.stages.base import MicroLoss
from ftlit.stages.validation import ValidatedStage


class SFT(ValidatedStage):
    """Trains the answers of conversations.

    Args:
        args: Arguments of every stage.
        objective: Loss of each trained token; cross-entropy when left out.
        extra_metrics: Logged besides loss, perplexity and accuracy, in training and validation: `entropy` of the
            predicted distributions (nats a trained token). It costs a pass over the logits.
        kwargs: Arguments of every stage.

    Raises:
        ConfigError: If an objective needs, or `extra_metrics` names, a score that does not exist.
    """

    predicts_tokens: ClassVar[bool] = True

    def __init__(
        self,
        *args: Any,
        objective: TokenObjective | None = None,
        extra_metrics: list[Literal["entropy"]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective or CrossEntropy()
        self.extra_metrics = tuple(extra_metrics or ())
        _check_names(f"{type(self.objective).__name__}.needs", self.objective.needs, EXTRAS)
        _check_names("model.extra_metrics", self.extra_metrics, ("entropy",))

    @property
    def needs(self) -> frozenset[str]:
        """What the objective reads."""
        return self.objective.needs

    @property
    def watch(self) -> frozenset[str]:
        """The extra metrics."""
        return frozenset(self.extra_metrics)

    def micro_loss(self, batch: PackedBatch, scores: TokenScores) -> MicroLoss:
        """Weighted sum of the token losses."""
        weights = batch.target_weights.to(scores.logps.dtype)
        means = {"loss": -scores.logps, "accuracy": scores.correct, **self._extra(scores)}
        return MicroLoss(
            loss=(self.objective(scores) * weights).sum(),
            sums={name: (value.detach() * weights).sum() for name, value in means.items()},
        )

    def _extra(self, scores: TokenScores) -> dict[str, Tensor]:
        """The extra metrics of each token."""
        return {name: getattr(scores, name) for name in self.extra_metrics}

    def total(self, totals: StepTotals) -> float:
        """The weight of the step's trained tokens."""
        return totals.weight

    def step_summary(self, means: dict[str, float]) -> dict[str, float]:
        """Adds the perplexity."""
        return {**means, "perplexity": math.exp(min(means["loss"], 700.0))}

    @property
    def of_a_step(self) -> list[str]:
        """The loss and what is made of it."""
        return ["loss", "perplexity", "accuracy", *self.extra_metrics]

    @property
    def measured(self) -> list[str]:
        """The same."""
        return self.of_a_step

    def new_metric(self) -> TokenNLL:
        """Loss, perplexity and accuracy a token."""
        return TokenNLL(self.extra_metrics)

    def measure(self, metric: Any, batch: PackedBatch, rows: str) -> None:
        """Counts one micro-batch."""
        assert self.policy is not None
        scores = self.policy(batch, watch=self.watch)
        metric.update(scores.logps, scores.correct, batch.target_weights, **self._extra(scores))


def _check_names(where: str, names: Iterable[str], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{where}: there is no score {name!r}: {nearest(name, known)}")
