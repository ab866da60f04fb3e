"""Direct preference optimization and its family."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from ftlit.batch import PackedBatch, StepBatch, StepTotals
from ftlit.data.comparisons import Comparisons, Crossed
from ftlit.data.store import Joined
from ftlit.errors import ConfigError
from ftlit.metrics.intervals import wins
from ftlit.metrics.pairs import PairMetric
from ftlit.objectives.preference import PreferenceLoss, PreferenceScores
from ftlit.objectives.preference_sums import loss_of
from ftlit.objectives.scores import TokenScores
from ftlit.stages.base import MicroLoss
from ftlit.stages.reference import StoredScores, start_logps, stored_scores
from ftlit.stages.validation import ValidatedStage

_OF_SIDES = ("rewards", "logps", "lengths")
_OF_PAIRS = ("rewards/margins", "rewards/accuracies", "logps/accuracies")
SUMS = (
    *("weight", "chosen", "rejected", "both", "loss", *_OF_PAIRS),
    *(f"{name}/{side}" for name in _OF_SIDES for side in ("chosen", "rejected")),
)


class _Measured(NamedTuple):
    """Of one micro-batch: the loss, sums over its pairs, and of each pair margin, weight and row.

    The weight is 0 where a pair has one answer only.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    margins: Tensor
    weights: Tensor
    rows: Tensor


class DPO(ValidatedStage):
    """Trains a model on which of two answers to a prompt is the better one.

    Rows come from `PreferenceData`. Prompt and answers run through the model as one tree, the prompt once. The
    reference is the model at the **start of this run**: what is trained is switched off (an adapter), or put back (full
    fine-tuning, which keeps a copy of the start weights in memory); so it costs a second forward pass and no second
    model. Dropout never touches it. With an adapter that starts at zero the first loss of DPO is `ln 2`.

    Logged as means over the pairs by weight, in validation with `val/` before it: `train/loss`; `rewards/chosen`,
    `rewards/rejected` (`beta` times the log-ratio; see the loss), `rewards/margins`, `rewards/accuracies` (share of
    pairs whose better answer has the higher reward, a tie counts one half), `logps/chosen`, `logps/rejected` (nats an
    answer),
    `logps/accuracies` (share of pairs whose better answer is the likelier one, whatever the reference says of them),
    `lengths/chosen`, `lengths/rejected` (trained tokens an answer); and `train/kl` where the loss has a reference
    point. In validation also the ends of 95 % intervals over the rows, `val/rewards/margins_low` and so on.

    Args:
        args: Arguments of every stage.
        loss: A preference loss, or what TRL calls one (`sigmoid`, `ipo`, `kto`, `simpo`, ...); a list of names, such as
            `[sigmoid, sft]`, is their sum.
        cache_reference: Score all rows with the reference once, before training, and keep the scores on disk
            (`$FTLIT_CACHE` or `~/.cache/ftlit`); found again by the start weights and the tokens. Saves the reference's
            forward pass from the second epoch or the second run on.
        kwargs: Arguments of every stage.

    Raises:
        ConfigError: If there is no such loss.
    """

    loss_unit: ClassVar[str] = "nats a pair"
    predicts_tokens: ClassVar[bool] = True

    def __init__(
        self,
        *args: Any,
        loss: PreferenceLoss | list[str] | str = "sigmoid",
        cache_reference: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.loss = loss_of(loss)
        self.cache_reference = cache_reference
        self._stored: dict[str, StoredScores] = {}
        self._crossed: dict[str, Crossed] = {}
        self._points: dict[str, Tensor] = {}
        self._point: Tensor | None = None
        if cache_reference and not self.loss.needs_reference:
            raise ConfigError(f"model.cache_reference: {type(self.loss).__name__} needs no reference; leave it out.")

    @property
    def couples(self) -> bool:
        """Whether the rows of a micro-batch must stay together."""
        return self.loss.couples

    @property
    @override
    def watch(self) -> frozenset[str]:
        return self.loss.watch

    def total(self, totals: StepTotals) -> float:
        """The weight of the step's pairs."""
        return totals.weight

    # ---- the model and its reference ------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._stored, self._crossed = {}, {}  # of the rows of an earlier run
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and self.couples and getattr(data, "batch_size", 2) < 2:
            raise ConfigError(
                f"{type(self.loss).__name__} compares the rows of a micro-batch with each other: set "
                f"data.batch_size to at least 2, got {data.batch_size}."
            )
        for key, rows in getattr(data, "sets", {}).items():
            if not key.startswith("added:"):
                check_rows(self.loss, rows)
                if self.loss.needs_kl:
                    self._crossed[key] = Crossed(rows, data.sets.get("train"), data.max_length)

    @override
    def configure_model(self) -> None:
        super().configure_model()
        if self.loss.needs_reference and self.policy is not None:
            self.strategy.remember_start(self.policy.lm)  # before the weights of a checkpoint are loaded

    def on_train_start(self) -> None:
        """Scores the training rows with the reference, where that is wanted."""
        super().on_train_start()
        if self.cache_reference:
            self._scores_of("train")

    def reference(self, batch: PackedBatch, rows: str) -> Tensor | None:
        """Log-probabilities of the targets under the reference, `[N]`; None where the loss needs none.

        Args:
            batch: The micro-batch.
            rows: The set of rows it is from.
        """
        assert self.policy is not None
        if not self.loss.needs_reference:
            return None
        if self.cache_reference:
            return self._scores_of(rows).of(batch)
        return start_logps(self.policy, batch)

    def _scores_of(self, rows: str) -> StoredScores:
        if rows not in self._stored:
            data: Any = self.trainer.datamodule
            joined = data.sets[rows]
            self._stored[rows] = stored_scores(self, joined, rows, data.batch_size, data.max_tokens)
        return self._stored[rows]

    # ---- one micro-batch ------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        if self.loss.needs_kl:  # one for the whole step, before its first gradient
            own = [micro.only({0}) for micro in batch.micro_batches[: batch.own]]
            self._point = self._reference_point(own, "train")
        return super().training_step(batch, batch_idx)

    def micro_loss(self, batch: PackedBatch, scores: TokenScores) -> MicroLoss:
        """Weighted sum of the losses of the pairs."""
        found = self._measured(batch, scores, "train")
        return MicroLoss(found.loss, found.sums)

    def _measured(self, batch: PackedBatch, scores: TokenScores, rows: str) -> _Measured:
        kl = None
        if self.loss.needs_kl:
            kl = self._point if rows == "train" else self._held_out_point(rows)
        answers = preference_scores(batch, scores, self.reference(batch, rows), kl)
        weights = torch.tensor([pair.weight for pair in batch.pairs], dtype=torch.float64, device=scores.logps.device)
        losses, rewards = self.loss(answers), self.loss.rewards(answers).detach()
        sums = pair_sums(answers, losses.detach(), rewards, weights)
        if kl is not None:
            sums["kl"] = kl * weights.sum()
        both = weights * answers.has_chosen * answers.has_rejected
        owners = torch.tensor([batch.examples[pair.better] for pair in batch.pairs], device=both.device)
        margins = answers.better(rewards) - answers.worse(rewards)
        return _Measured((losses * weights).sum(), sums, margins, both, owners)

    def _reference_point(self, batches: Iterable[PackedBatch], rows: str) -> Tensor:
        """How far the policy has moved on answers to other prompts: the mean of the log-ratios, at least 0, nats.

        Over all micro-batches and ranks, so it does not matter how they are cut.

        Args:
            batches: This rank's micro-batches; every rank has as many.
            rows: The set of rows they are from.
        """
        crossed = self._crossed[rows]
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in batches:
            total += self._moved(crossed.of(batch))
        total = self.trainer.strategy.reduce(total, reduce_op="sum")
        return (total[0] / total[1].clamp(min=1)).clamp(min=0)

    @torch.no_grad()
    def _moved(self, batch: PackedBatch) -> Tensor:
        """Sum of the log-ratios of the answers of a micro-batch, nats, and how many answers there are."""
        assert self.policy is not None
        was = self.policy.training
        self.policy.eval()
        try:
            ratios = self.policy(batch).logps.double() - start_logps(self.policy, batch)
        finally:
            self.policy.train(was)
        real = batch.target_weights.ne(0)
        count = float(len(batch.target_segments[real].unique()))
        return torch.stack([(ratios * real).sum(), torch.tensor(count, dtype=ratios.dtype, device=ratios.device)])

    def _held_out_point(self, rows: str) -> Tensor:
        """The reference point of a set of rows, as far as this validation or test reads it."""
        if rows not in self._points:
            data: Any = self.trainer.datamodule
            loader: Any
            if rows == "test":
                loader, most = data.test_dataloader(), self.trainer.num_test_batches[0]
            else:
                number = data.validation_names.index(rows.removeprefix("validation:"))
                loader = data.val_dataloader()[number]
                is_first = self.trainer.sanity_checking
                most = (self.trainer.num_sanity_val_batches if is_first else self.trainer.num_val_batches)[number]
            batches = itertools.islice(loader, None if math.isinf(most) else int(most))
            self._points[rows] = self._reference_point((batch.to(self.device) for batch in batches), rows)
        return self._points[rows]

    @override
    def step_summary(self, means: dict[str, float]) -> dict[str, float]:
        return summary(means)

    @property
    @override
    def of_a_step(self) -> list[str]:
        sides = [f"{name}/{side}" for name in _OF_SIDES for side in ("chosen", "rejected")]
        return ["loss", *_OF_PAIRS, *sides, *(["kl"] if self.loss.needs_kl else [])]

    @property
    @override
    def measured(self) -> list[str]:
        ends = [f"rewards/{name}_{end}" for name in ("margins", "accuracies") for end in ("low", "high")]
        return [*self.of_a_step, *ends]

    @override
    def _reset(self, loop: str) -> None:
        super()._reset(loop)
        self._points = {}

    @override
    def new_metric(self) -> PairMetric:
        return PairMetric((*SUMS, "kl") if self.loss.needs_kl else SUMS, summary)

    @override
    def measure(self, metric: Any, batch: PackedBatch, rows: str) -> None:
        assert self.policy is not None
        found = self._measured(batch, self.policy(batch, watch=self.watch), rows)
        metric.add(found.sums, found.margins, found.weights, found.rows)


def preference_scores(
    batch: PackedBatch, scores: TokenScores, ref_logps: Tensor | None = None, kl: Tensor | None = None
) -> PreferenceScores:
    """What a preference loss is given of a micro-batch.

    Args:
        batch: The micro-batch, with the targets of its own rows only.
        scores: What the policy says of them.
        ref_logps: What the reference says of them, `[N]`.
        kl: The reference point.
    """
    parents, sources = batch.segments.parents, batch.sources
    answers = [number for number, parent in enumerate(parents) if parent >= 0 and sources[number] == 0]
    place = {segment: number for number, segment in enumerate(answers)}
    counts = torch.bincount(batch.target_segments, minlength=len(parents)).tolist()
    pairs = [(place.get(pair.better, -1), place.get(pair.worse, -1)) for pair in batch.pairs]
    margins = torch.tensor([pair.margin for pair in batch.pairs], dtype=torch.float64, device=scores.logps.device)
    lengths = [counts[segment] for segment in answers]
    return PreferenceScores(scores.logps, lengths, pairs, ref_logps, margins, scores.log_sum_sq, kl)


def pair_sums(answers: PreferenceScores, losses: Tensor, rewards: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Sums over pairs that `summary` makes means of.

    Args:
        answers: Of the micro-batch.
        losses: Loss of each pair, `[P]`.
        rewards: Reward of each answer, `[A]`.
        weights: Of the pairs, `[P]`.
    """
    good, bad = weights * answers.has_chosen, weights * answers.has_rejected
    both = good * answers.has_rejected
    margins = answers.better(rewards) - answers.worse(rewards)
    totals = answers.totals.detach()
    sums = {
        "weight": weights.sum(),
        "chosen": good.sum(),
        "rejected": bad.sum(),
        "both": both.sum(),
        "loss": (losses * weights).sum(),
        "rewards/margins": (margins * both).sum(),
        "rewards/accuracies": (wins(margins) * both).sum(),
        "logps/accuracies": (wins(answers.better(totals) - answers.worse(totals)) * both).sum(),
    }
    for name, values in zip(_OF_SIDES, (rewards, totals, answers.counts), strict=True):
        sums[f"{name}/chosen"] = (answers.better(values) * good).sum()
        sums[f"{name}/rejected"] = (answers.worse(values) * bad).sum()
    return sums


def summary(sums: dict[str, float]) -> dict[str, float]:
    """Metrics from sums, or from sums divided by one number.

    Margins of rows without a partner are the difference of the means; accuracies there are none.
    """
    found: dict[str, float] = {
        name: sums[name] / sums["weight"] for name in ("loss", "kl") if name in sums and sums["weight"]
    }
    for side in ("chosen", "rejected"):
        if sums[side]:
            found |= {f"{name}/{side}": sums[f"{name}/{side}"] / sums[side] for name in _OF_SIDES}
    if sums["both"]:
        found |= {name: sums[name] / sums["both"] for name in _OF_PAIRS}
    elif sums["chosen"] and sums["rejected"]:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found


def check_rows(loss: PreferenceLoss, rows: Any) -> None:
    """Refuses rows that a loss cannot be computed of, or of which it would not use a column.

    Raises:
        ConfigError: If it cannot.
    """
    name = type(loss).__name__
    for part in rows.parts if isinstance(rows, Joined) else []:
        if not isinstance(part, Comparisons):
            raise ConfigError("DPO trains on answers that are compared: set data to PreferenceData.")
        if part.has_single and not loss.unpaired:
            raise ConfigError(
                f"{name} compares answers, and some rows have one answer with a label; train on these with "
                "model.loss=KTO or APOZero."
            )
        if part.has_margins and not loss.uses_margins:
            raise ConfigError(f"{name} does not use a margin column; leave it out with data.columns={{margin: null}}.")
        if part.has_weights and not loss.aligned:
            raise ConfigError(
                f"{name} sorts its pairs, so these cannot have weights; leave them out with "
                "data.columns={weight: null}."
            )


__all__ = ["DPO", "SUMS", "check_rows", "pair_sums", "preference_scores", "summary"]
