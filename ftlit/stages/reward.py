"""Reward models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from typing_extensions import override

from ftlit.batch import PackedBatch, StepBatch
from ftlit.data.comparisons import Comparisons
from ftlit.data.datamodules import MAIN
from ftlit.data.store import Joined
from ftlit.errors import ConfigError
from ftlit.metrics.calibration import draw_reliability
from ftlit.metrics.intervals import wins
from ftlit.metrics.rewards import RankingMetric
from ftlit.models.heads import rated
from ftlit.objectives.reward import BradleyTerry, RewardLoss, RewardScores
from ftlit.objectives.scores import TokenScores
from ftlit.stages.base import MicroLoss
from ftlit.stages.scalar import ScalarStage


class RewardModel(ScalarStage):
    """Trains a model that gives an answer one number: the higher, the better.

    Rows come from `PreferenceData`: pairs with or without a margin, and rankings. The prompt of a row runs through the
    model once for all its answers. The number is read at the last token of each answer, its end token as a rule; where
    the model pads with its end token another pad token is chosen, because transformers reads a classifier at the last
    token that is not the pad token. A new head on a decoder starts at zero: before training every answer has the same
    reward and the loss is `ln 2`, and no random direction has to be unlearnt first.

    Logged, in training and as `val/...`: `loss` (nats a pair), `accuracy` (share of pairs ranked right, a tie counts
    one half), `margin`, `rewards/chosen`, `rewards/rejected`; in validation also the 95 % interval of the accuracy and
    `calibration_error`; `calibration.png` in the run folder shows how sure the model is against how often it is right.

    Args:
        args: Arguments of every stage.
        objective: Loss of each pair; `BradleyTerry` when left out.
        kwargs: Arguments of every stage.
    """

    loss_unit: ClassVar[str] = "nats a pair"
    zero_head: ClassVar[bool] = True

    def __init__(self, *args: Any, objective: RewardLoss | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective or BradleyTerry()

    @property
    def outputs(self) -> list[str]:
        """The one output."""
        return ["reward"]

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        for rows in getattr(data, "sets", {}).values():
            for part in rows.parts if isinstance(rows, Joined) else []:
                if not isinstance(part, Comparisons):
                    raise ConfigError(
                        "RewardModel learns from answers that are compared: set data to PreferenceData; answers with "
                        "a score each make a reward model by --config classification."
                    )
                if part.has_single:
                    raise ConfigError(
                        "RewardModel compares answers, and some rows have one answer with a label; train a "
                        "Classification on these."
                    )

    # ---- one micro-batch ------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        micro_batches = [rated(micro, answers_of(micro)) for micro in batch.micro_batches]
        return super().training_step(StepBatch(micro_batches, batch.totals, batch.own), batch_idx)

    @override
    def micro_loss(self, batch: PackedBatch, scores: TokenScores | Tensor) -> MicroLoss:
        """Weighted sum of the losses of the pairs."""
        assert isinstance(scores, Tensor)
        compared, weights = comparison(batch, scores[:, 0])
        losses = self.objective(compared)
        better, worse = compared.sides
        means = {
            "loss": losses,
            "accuracy": wins(better - worse),
            "margin": better - worse,
            "rewards/chosen": better,
            "rewards/rejected": worse,
        }
        return MicroLoss(
            loss=(losses * weights).sum(),
            sums={name: (values.detach() * weights).sum() for name, values in means.items()},
        )

    # ---- validation and test --------------------------------------------------------------------------------------

    @property
    @override
    def of_a_step(self) -> list[str]:
        return ["loss", "accuracy", "margin", "rewards/chosen", "rewards/rejected"]

    @property
    @override
    def measured(self) -> list[str]:
        return [*self.of_a_step, "accuracy_low", "accuracy_high", "calibration_error"]

    @override
    def new_metric(self) -> RankingMetric:
        return RankingMetric()

    @override
    def measure(self, metric: Any, batch: PackedBatch, rows: str) -> None:
        assert self.policy is not None
        scores = self.policy(rated(batch, answers_of(batch)))
        compared, weights = comparison(batch, scores[:, 0])
        numbers = [batch.examples[pair.better] for pair in batch.pairs]
        metric.update(*compared.sides, self.objective(compared), weights, torch.tensor(numbers, device=weights.device))

    @override
    def on_fit_end(self) -> None:
        self._draw()

    @override
    def on_validation_end(self) -> None:
        if self.trainer.state.fn == "validate":
            self._draw()

    @override
    def on_test_end(self) -> None:
        self._draw()

    @rank_zero_only
    def _draw(self) -> None:
        """Draws how sure the model is against how often it is right, on the first set where none is `main`."""
        if not self.metrics or self.trainer.fast_dev_run:
            return
        metrics: Any = self.metrics
        metric = metrics[MAIN if MAIN in metrics else next(iter(metrics))]
        if len(metric.all_differences):
            folder = Path(self.trainer.default_root_dir)
            draw_reliability(metric.all_differences, folder / "calibration.png", folder.absolute().name)
            print(f"calibration {folder / 'calibration.png'}", flush=True)


def answers_of(batch: PackedBatch) -> list[int]:
    """The segments of a micro-batch that are compared with others."""
    return sorted({place for pair in batch.pairs for place in pair[:2]})


def comparison(batch: PackedBatch, rewards: Tensor) -> tuple[RewardScores, Tensor]:
    """What a reward loss is given of a micro-batch, and the weights of its pairs, `[P]`.

    Args:
        batch: The micro-batch.
        rewards: Of its answers, in the order of `answers_of`, `[A]`.
    """
    place = {segment: number for number, segment in enumerate(answers_of(batch))}
    numbers = torch.tensor([[place[pair.better], place[pair.worse]] for pair in batch.pairs], device=rewards.device)
    values = torch.tensor([pair[2:] for pair in batch.pairs], dtype=torch.float64, device=rewards.device)
    return RewardScores(rewards.double(), numbers[:, 0], numbers[:, 1], values[:, 1]), values[:, 0]


__all__ = ["RewardModel", "answers_of", "comparison"]
