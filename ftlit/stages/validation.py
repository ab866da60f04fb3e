"""Validation and test of a stage: one metric a set of rows, exact over batches and ranks."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import lightning as L
from torch import nn
from torchmetrics import Metric

from ftlit.batch import PackedBatch
from ftlit.data.datamodules import MAIN
from ftlit.models.shard import gathered
from ftlit.rollout.generate import generate
from ftlit.stages.base import Stage


class ValidatedStage(Stage):
    """Base of the stages that measure themselves on held-out rows, and answer prompts.

    Args:
        args: Arguments of every stage.
        max_new_tokens: Most tokens of an answer of `ftlit predict`.
        kwargs: Arguments of every stage.
    """

    def __init__(self, *args: Any, max_new_tokens: int = 256, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_new_tokens = max_new_tokens
        self.metrics = nn.ModuleDict()

    @abstractmethod
    def new_metric(self) -> Metric:
        """What a set of rows is measured with; `compute` gives a dictionary of numbers."""

    @abstractmethod
    def measure(self, metric: Any, batch: PackedBatch, rows: str) -> None:
        """Counts one micro-batch.

        Args:
            metric: What `new_metric` made.
            batch: The micro-batch.
            rows: The set it is from, as the data module calls it: `validation:NAME` or `test`.
        """

    @property
    def measured(self) -> list[str]:
        """Names of all that `new_metric` computes."""
        return []

    def logged_at_validations(self, trainer: L.Trainer) -> list[str]:
        """What is measured, of every set."""
        places = ["val" if name == MAIN else f"val/{name}" for name in self._names("val")]
        return [f"{place}/{name}" for place in places for name in self.measured]

    def _names(self, loop: str) -> list[str]:
        names = getattr(getattr(self.trainer, "datamodule", None), "validation_names", None)
        return names if loop == "val" and names else [MAIN]

    def _reset(self, loop: str) -> None:
        self.metrics = nn.ModuleDict({name: self.new_metric() for name in self._names(loop)}).to(self.device)

    def _update(self, loop: str, batch: PackedBatch, number: int) -> None:
        name = self._names(loop)[number]
        self.measure(self.metrics[name], batch, f"validation:{name}" if loop == "val" else "test")

    def _log(self, loop: str) -> None:
        values: dict[str, float] = {}
        metrics: Any = self.metrics
        for name, metric in metrics.items():
            place = loop if name == MAIN else f"{loop}/{name}"
            values |= {f"{place}/{key}": value.item() for key, value in metric.compute().items()}
        self.log_evaluation(loop, values)

    def on_validation_epoch_start(self) -> None:
        """Starts the counts anew."""
        self._reset("val")

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Counts one micro-batch."""
        self._update("val", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs what was measured as `val/...`, and as `val/NAME/...` of other sets."""
        super().on_validation_epoch_end()
        self._log("val")

    def on_test_epoch_start(self) -> None:
        """Starts the counts anew."""
        self._reset("test")

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Counts one micro-batch."""
        self._update("test", batch, 0)

    def on_test_epoch_end(self) -> None:
        """Logs what was measured as `test/...`."""
        self._log("test")

    def predict_step(self, batch: list[list[int]], batch_idx: int) -> list[str]:
        """Answers some prompts greedily."""
        assert self.policy is not None
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        with gathered(self.policy):
            answers = generate(self.policy.lm, self.strategy, self.tokenizer, batch, **options)
        return [self.tokenizer.decode(answer).strip() for answer in answers]


__all__ = ["ValidatedStage"]
