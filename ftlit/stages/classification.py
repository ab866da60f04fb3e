"""Classification of conversations and texts, with decoders and encoders."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from ftlit.batch import PackedBatch
from ftlit.data.classification import ClassificationData
from ftlit.data.formats.classification import name_of
from ftlit.errors import ConfigError, nearest
from ftlit.metrics.classification import ClassificationMetric
from ftlit.metrics.regression import RegressionMetric
from ftlit.objectives.scores import TokenScores
from ftlit.stages.base import MicroLoss
from ftlit.stages.scalar import ScalarStage


class Classification(ScalarStage):
    """Trains a classifier: one label a row by cross-entropy, any number of labels by a binary cross-entropy each.

    Where rows have scores it is a regression: one output, trained by the squared error, as transformers does it. On
    answers with scores that makes a reward model.

    Args:
        args: Arguments of every stage.
        class_weights: Factor on the loss of the rows of a label, such as `{spam: 5}` (1 for the others); `balanced`:
            rows / (labels x rows of the label). Where a row can have several labels it is the factor on the loss of
            having the label; `balanced` is then rows without it / rows with it. The loss is divided by the plain number
            of rows.
        label_smoothing: Share of each target that is spread over all labels.
        kwargs: Arguments of every stage.

    Raises:
        ConfigError: If a number is out of range, or the data have no labels.
    """

    loss_unit: ClassVar[str] = "nats a row"

    def __init__(
        self,
        *args: Any,
        class_weights: dict[str, float] | Literal["balanced"] | None = None,
        label_smoothing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"model.label_smoothing must be in [0, 1), got {label_smoothing}.")
        if isinstance(class_weights, str) and class_weights != "balanced":
            raise ConfigError(f"model.class_weights must be balanced or a weight a label, got {class_weights!r}.")
        for label, weight in class_weights.items() if isinstance(class_weights, dict) else ():
            if not 0 <= weight < float("inf"):
                raise ConfigError(f"model.class_weights: the weight of {label!r} must be at least 0, got {weight}.")
        if isinstance(class_weights, dict):  # YAML reads 0 and true as what they are
            class_weights = {name_of("model.class_weights", label): weight for label, weight in class_weights.items()}
        self.class_weights, self.label_smoothing = class_weights, label_smoothing
        self._order: list[int] = []
        self._weights: Tensor | None = None

    @property
    def data(self) -> ClassificationData:
        """The labelled rows.

        Raises:
            ConfigError: If the data have no labels.
        """
        data = getattr(self._trainer, "datamodule", None)
        if not isinstance(data, ClassificationData):
            raise ConfigError("Classification needs labelled rows: set data.class_path to ClassificationData.")
        return data

    @property
    def outputs(self) -> list[str]:
        """The labels, as the data name and order them."""
        return self.data.labels

    @override
    def make_policy(self) -> Any:
        policy = super().make_policy()
        config = policy.lm.config
        config.problem_type = ("multi" if self.data.multi_label else "single") + "_label_classification"
        if self.data.regression:
            if self.class_weights is not None or self.label_smoothing:
                raise ConfigError(
                    "model.class_weights and label_smoothing are about labels, and these rows have scores."
                )
            config.problem_type = "regression"
            self.loss_unit = "squared error a row"  # type: ignore[misc]
        # A classifier that is trained further keeps the order of its outputs.
        self._order = [config.label2id[label] for label in self.outputs]
        self._weights = self._class_weights()
        return policy

    @override
    def about_head(self) -> dict[str, Any]:
        assert self.policy is not None
        names = self.policy.lm.config.id2label
        return {**super().about_head(), "outputs": [names[number] for number in range(len(names))]}

    def _class_weights(self) -> Tensor | None:
        """A factor for each label, in the order of the data, `[L]`."""
        data, given = self.data, self.class_weights
        if given is None:
            return None
        counts = torch.tensor([max(1, data.counts[label]) for label in data.labels], dtype=torch.float32)
        if given == "balanced":
            if data.multi_label:
                return (data.num_rows - counts).clamp(min=1) / counts
            return data.num_rows / (len(counts) * counts)
        assert isinstance(given, dict)
        if unknown := [label for label in given if label not in data.labels]:
            raise ConfigError(
                f"model.class_weights: there is no label {unknown[0]!r}: {nearest(unknown[0], data.labels)}"
            )
        return torch.tensor([given.get(label, 1.0) for label in data.labels], dtype=torch.float32)

    def _in_order(self, scores: Tensor) -> Tensor:
        """Logits in the order of the data's labels, `[N, L]`, from those in the order of the model."""
        return scores.index_select(1, torch.tensor(self._order, device=scores.device))

    def _losses(self, batch: PackedBatch, scores: Tensor, *, weighted: bool) -> Tensor:
        """Loss of each row, nats, `[N]`.

        Args:
            batch: The micro-batch, with its labels.
            scores: Logits in the order of the data's labels, `[N, L]`.
            weighted: Whether class weights and label smoothing count.
        """
        weights = None if self._weights is None or not weighted else self._weights.to(scores)
        smoothing = self.label_smoothing if weighted else 0.0
        labels = batch.target_ids
        if self.data.regression:
            return (scores[:, 0] - labels.to(scores.dtype)).square()
        if labels.ndim == 1:
            losses = F.cross_entropy(scores, labels, reduction="none", label_smoothing=smoothing)
            return losses if weights is None else losses * weights[labels]
        wanted = labels.to(scores.dtype) * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(scores, wanted, pos_weight=weights, reduction="none").mean(1)

    @override
    def micro_loss(self, batch: PackedBatch, scores: TokenScores | Tensor) -> MicroLoss:
        """Weighted sum of the rows' losses."""
        assert isinstance(scores, Tensor)
        scores = self._in_order(scores)
        weights = batch.target_weights.to(scores.dtype)
        if self.data.regression:
            loss = (self._losses(batch, scores, weighted=True) * weights).sum()
            return MicroLoss(loss=loss, sums={"loss": loss.detach()})
        if batch.target_ids.ndim == 1:
            hits = (scores.argmax(1) == batch.target_ids).to(scores.dtype)
        else:
            hits = ((scores > 0) == (batch.target_ids > 0)).to(scores.dtype).mean(1)
        with torch.no_grad():
            plain = self._losses(batch, scores, weighted=False)
        return MicroLoss(
            loss=(self._losses(batch, scores, weighted=True) * weights).sum(),
            sums={"loss": (plain * weights).sum(), "accuracy": (hits * weights).sum()},
        )

    @property
    @override
    def of_a_step(self) -> list[str]:
        return ["loss"] if self.data.regression else ["loss", "accuracy"]

    @property
    @override
    def measured(self) -> list[str]:
        if self.data.regression:
            return ["loss", "pearson", "spearman"]
        share = "exact_match" if self.data.multi_label else "accuracy"
        return list(dict.fromkeys([*self.of_a_step, share, f"{share}_low", f"{share}_high", "f1", "auroc"]))

    @override
    def new_metric(self) -> ClassificationMetric | RegressionMetric:
        if self.data.regression:
            return RegressionMetric()
        return ClassificationMetric(len(self.outputs), self.data.multi_label)

    @override
    def measure(self, metric: Any, batch: PackedBatch, rows: str) -> None:
        assert self.policy is not None
        scores = self._in_order(self.policy(batch))
        metric.update(scores, batch.target_ids, self._losses(batch, scores, weighted=False), batch.target_weights)


__all__ = ["Classification"]
