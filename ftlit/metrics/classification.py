"""How well a classifier does: loss, accuracy with its interval, F1, AUROC."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    multiclass_auroc,
    multiclass_f1_score,
    multilabel_auroc,
    multilabel_f1_score,
)

from ftlit.metrics.intervals import wilson


class ClassificationMetric(Metric):
    """Collects what a classifier says of every row, on all ranks; row weights count in the loss only.

    Args:
        num_labels: Number of labels, L.
        multi_label: Whether a row can have any number of labels.
    """

    full_state_update = False
    scores: Any
    labels: Any
    losses: Any
    weights: Any

    def __init__(self, num_labels: int, multi_label: bool = False) -> None:
        super().__init__()
        self.num_labels, self.multi_label = num_labels, multi_label
        for name in ("scores", "labels", "losses", "weights"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, labels: Tensor, losses: Tensor, weights: Tensor) -> None:
        """Adds some rows; those of weight 0 fill a micro-batch and are left out.

        Args:
            scores: Logits, `[N, L]`.
            labels: The label of each row `[N]`, or 0 and 1 for each label `[N, L]`.
            losses: Loss of each row, nats, `[N]`.
            weights: Weight of each row, `[N]`.
        """
        real = weights > 0
        self.scores.append(scores.detach()[real].double())
        self.labels.append(labels[real])
        self.losses.append(losses.detach()[real].double())
        self.weights.append(weights[real].double())

    def compute(self) -> dict[str, Tensor]:
        """`loss` (nats a row), `accuracy` with the ends of its 95 % interval, `f1` (macro), `auroc` (macro).

        With several labels a row, `accuracy` is the share of right yes or no answers over all labels, and
        `exact_match` the share of rows with all of them right; its interval is given then. Labels that no row has, or
        that every row has, have no AUROC and are left out of its mean.
        """
        scores, labels, losses, weights = (_joined(getattr(self, n)) for n in ("scores", "labels", "losses", "weights"))
        values = {"loss": float((losses * weights).sum() / weights.sum())}
        if self.multi_label:
            right = (scores > 0) == (labels > 0)
            exact = right.all(1)
            values["accuracy"] = float(right.double().mean())
            values["exact_match"] = float(exact.double().mean())
            values["exact_match_low"], values["exact_match_high"] = wilson(int(exact.sum()), len(exact))
        else:
            hits = scores.argmax(1) == labels
            values["accuracy"] = float(hits.double().mean())
            values["accuracy_low"], values["accuracy_high"] = wilson(int(hits.sum()), len(hits))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of labels that no row has
            if self.multi_label:
                f1 = multilabel_f1_score(scores.sigmoid(), labels, self.num_labels, average="macro")
                areas = multilabel_auroc(scores.sigmoid(), labels, self.num_labels, average=None)
                share = labels.double().mean(0)
            else:
                f1 = multiclass_f1_score(scores.softmax(1), labels, self.num_labels, average="macro")
                areas = multiclass_auroc(scores.softmax(1), labels, self.num_labels, average=None)
                share = torch.nn.functional.one_hot(labels, self.num_labels).double().mean(0)
        known = (share > 0) & (share < 1)
        auroc = float(areas[known].mean()) if known.any() else math.nan
        values |= {"f1": float(f1), "auroc": auroc}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def _joined(parts: Any) -> Tensor:
    """A list of tensors, or what the ranks made of it."""
    return parts if isinstance(parts, Tensor) else torch.cat(list(parts))


__all__ = ["ClassificationMetric"]
