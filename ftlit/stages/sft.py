"""Supervised fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

from torch import Tensor, nn

from ftlit.batch import PackedBatch, StepTotals
from ftlit.data.datamodules import MAIN
from ftlit.errors import ConfigError, nearest
from ftlit.metrics import TokenNLL
from ftlit.models.shard import gathered
from ftlit.objectives.scores import EXTRAS, TokenScores
from ftlit.objectives.sft import CrossEntropy, TokenObjective
from ftlit.rollout.generate import generate
from ftlit.stages.base import MicroLoss, Stage


class SFT(Stage):
    """Trains the answers of conversations.

    Args:
        args: Arguments of every stage.
        objective: Loss of each trained token; cross-entropy when left out.
        extra_metrics: Logged besides loss, perplexity and accuracy, in training and validation: `entropy` of the
            predicted distributions (nats a trained token). It costs a pass over the logits.
        max_new_tokens: Most tokens of an answer of `ftlit predict`.
        kwargs: Arguments of every stage.

    Raises:
        ConfigError: If an objective needs, or `extra_metrics` names, a score that does not exist.
    """

    def __init__(
        self,
        *args: Any,
        objective: TokenObjective | None = None,
        extra_metrics: list[Literal["entropy"]] | None = None,
        max_new_tokens: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.max_new_tokens = max_new_tokens
        self.objective = objective or CrossEntropy()
        self.extra_metrics = tuple(extra_metrics or ())
        _check_names(f"{type(self.objective).__name__}.needs", self.objective.needs, EXTRAS)
        _check_names("model.extra_metrics", self.extra_metrics, ("entropy",))
        self.metrics = nn.ModuleDict()

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

    # ---- validation and test --------------------------------------------------------------------------------------

    def _names(self, loop: str) -> list[str]:
        names = getattr(getattr(self.trainer, "datamodule", None), "validation_names", None)
        return names if loop == "val" and names else [MAIN]

    def _reset(self, loop: str) -> None:
        metrics = {name: TokenNLL(self.extra_metrics) for name in self._names(loop)}
        self.metrics = nn.ModuleDict(metrics).to(self.device)

    def _update(self, loop: str, batch: PackedBatch, number: int) -> None:
        assert self.policy is not None
        scores = self.policy(batch, watch=self.watch)
        metric: Any = self.metrics[self._names(loop)[number]]
        metric.update(scores.logps, scores.correct, batch.target_weights, **self._extra(scores))

    def _log(self, loop: str) -> None:
        values: dict[str, float] = {}
        metrics: Any = self.metrics
        for name, metric in metrics.items():
            place = loop if name == MAIN else f"{loop}/{name}"
            values |= {f"{place}/{key}": value.item() for key, value in metric.compute().items()}
        if self.trainer.sanity_checking and self.trainer.ckpt_path:
            return  # a run that goes on has its start behind it
        if self.trainer.sanity_checking:
            # The whole validation runs once before training: where the run starts from.
            self.start_metrics = values
            for logger in self.trainer.loggers:
                logger.log_metrics({**values}, step=0)
            return
        self.last_metrics = values
        if loop == "val" and self.trainer.state.fn == "fit":
            self.log_position()
        for key, value in values.items():
            # Already reduced over ranks; the mean of equal numbers only keeps Lightning from warning.
            self.log(key, value, prog_bar=key == "val/loss", sync_dist=self.trainer.world_size > 1, batch_size=1)

    def on_validation_epoch_start(self) -> None:
        """Starts the counts anew."""
        self._reset("val")

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts one micro-batch."""
        self._update("val", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss`, `val/perplexity`, `val/accuracy`, and `val/NAME/...` of other sets."""
        super().on_validation_epoch_end()
        self._log("val")

    def on_test_epoch_start(self) -> None:
        """Starts the counts anew."""
        self._reset("test")

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Counts one micro-batch."""
        self._update("test", batch, 0)

    def on_test_epoch_end(self) -> None:
        """Logs `test/loss`, `test/perplexity`, `test/accuracy`."""
        self._log("test")

    def predict_step(self, batch: list[list[int]], batch_idx: int) -> list[str]:
        """Answers some prompts greedily."""
        assert self.policy is not None
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        with gathered(self.policy):
            answers = generate(self.policy.lm, self.strategy, self.tokenizer, batch, **options)
        return [self.tokenizer.decode(answer).strip() for answer in answers]


def _check_names(where: str, names: Iterable[str], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{where}: there is no score {name!r}: {nearest(name, known)}")
