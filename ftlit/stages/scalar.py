"""What the stages with a head on whole examples share: the model, validation, what is saved with the weights."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import Any

from torch import nn
from torchmetrics import Metric
from typing_extensions import override

from ftlit.batch import PackedBatch, StepTotals
from ftlit.data.datamodules import MAIN
from ftlit.data.padding import pad_token
from ftlit.errors import ConfigError
from ftlit.forgetting.base import ForgettingControl
from ftlit.models.heads import ScalarPolicy, reads_first
from ftlit.models.load import load_classifier
from ftlit.models.policy import recompute_activations
from ftlit.stages.base import Stage


class ScalarStage(Stage):
    """Base of the stages that train a sequence classifier of transformers: a trunk and a head on each example.

    The policy can be a language model (its head over tokens goes, a new one comes), an encoder, or a classifier.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.metrics = nn.ModuleDict()

    # ---- what a stage says ----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def outputs(self) -> list[str]:
        """Names of the outputs of the head."""

    @abstractmethod
    def new_metric(self) -> Metric:
        """What validation counts with; `compute` gives a dictionary of numbers."""

    @abstractmethod
    def measure(self, metric: Any, batch: PackedBatch, rows: str) -> None:
        """Counts one micro-batch.

        Args:
            metric: What `new_metric` made.
            batch: The micro-batch.
            rows: The set it is from, as the data module calls it: `validation:NAME` or `test`.
        """

    def total(self, totals: StepTotals) -> float:
        """The weight of the step's targets."""
        return totals.weight

    # ---- the model ------------------------------------------------------------------------------------------------

    @override
    def make_policy(self) -> Any:
        self._refuse_controls()
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        lm, new = load_classifier(
            self.source, self.outputs, self._load_dtype(), seed=seed, trust_remote_code=self.trust_remote_code
        )
        if "score" in new and not reads_first(lm):
            lm.config.get_text_config().pad_token_id = pad_token(self.tokenizer)
        if self.gradient_checkpointing:
            recompute_activations(lm)
        return ScalarPolicy(lm, self.strategy, new)

    def _refuse_controls(self) -> None:
        for control in self.controls if self._trainer is not None else ():
            rows = type(control).added_rows is not ForgettingControl.added_rows
            if rows or control.needs or type(control).kl is not ForgettingControl.kl:
                raise ConfigError(
                    f"{type(control).__name__} cannot be used here: it scores tokens, and the model that "
                    f"{type(self).__name__} trains has no output layer over tokens."
                )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        assert self.policy is not None
        checkpoint["ftlit"]["classifier"] = self.about_head()

    def about_head(self) -> dict[str, Any]:
        """What is needed besides config and weights to make the model again."""
        assert self.policy is not None
        config = self.policy.lm.config
        return {
            "outputs": self.outputs,
            "pad_token_id": config.get_text_config().pad_token_id,
            "problem_type": config.problem_type,
        }

    # ---- validation and test --------------------------------------------------------------------------------------

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
        if self.trainer.sanity_checking and self.trainer.ckpt_path:
            return  # a run that goes on has its start behind it
        if self.trainer.sanity_checking:
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
        """Logs what was counted as `val/...`, and `val/NAME/...` of other sets."""
        super().on_validation_epoch_end()
        self._log("val")

    def on_test_epoch_start(self) -> None:
        """Starts the counts anew."""
        self._reset("test")

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Counts one micro-batch."""
        self._update("test", batch, 0)

    def on_test_epoch_end(self) -> None:
        """Logs what was counted as `test/...`."""
        self._log("test")


__all__ = ["ScalarStage"]
