"""Every control holds what the suite asks, with every strategy; and the suite rejects controls that are wrong."""

import pytest
import torch

from ftlit.forgetting import (
    EWC,
    ForgettingControl,
    Interpolate,
    L2ToInit,
    Penalty,
    Replay,
    SampleWeighting,
    TargetKL,
    TokenSelection,
)
from ftlit.peft import LoRA
from ftlit.testing import ForgettingControlSuite

NO_WEIGHTS = frozenset({"PrefixTuning", "PromptTuning"})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))


class TestReplay(ForgettingControlSuite):
    logged = ("loss", "tokens")

    def make(self, weight=1.0):
        return Replay("general", ratio=0.6, weight=weight)


class TestTargetKL(ForgettingControlSuite):
    def make(self, weight=1.0):
        return TargetKL(weight=weight)


class TestEWC(ForgettingControlSuite):
    refused = NO_WEIGHTS

    def make(self, weight=1.0):
        return EWC("general", weight=weight)


class TestL2ToInit(ForgettingControlSuite):
    refused, logged = NO_WEIGHTS, ("distance",)

    def make(self, weight=1.0):
        return L2ToInit(half_life=10, weight=weight)


class TestCoupledL2ToInit(ForgettingControlSuite):
    refused, logged = NO_WEIGHTS, ("distance", "loss")

    def make(self, weight=1.0):
        return L2ToInit("coupled", strength=0.1, rows="general", weight=weight)


class TestInterpolate(ForgettingControlSuite):
    refused, logged, large = NO_WEIGHTS, (), 1.5

    def make(self, weight=1.0):
        return Interpolate(alpha=0.5, weight=weight)


@pytest.mark.slow  # much like the one before
class TestInterpolateEveryTwoSteps(TestInterpolate):
    def make(self, weight=1.0):
        return Interpolate(alpha=0.5, last_alpha=0.8, every_n_steps=2, weight=weight)


class TestTokenSelection(ForgettingControlSuite):
    weighted, silent_at_start, holds, logged = False, False, False, ()

    def make(self, weight=1.0):
        return TokenSelection(share=0.3)


@pytest.mark.slow  # much like the one before
class TestSampleWeighting(ForgettingControlSuite):
    weighted, silent_at_start, holds, logged = False, False, False, ()

    def make(self, weight=1.0):
        return SampleWeighting(temperature=0.2)


# ---- controls that are wrong ----------------------------------------------------------------------------------------


class Good(L2ToInit):
    """A control to be broken: L2 to the start through the gradient."""

    def __init__(self, weight=1.0):
        super().__init__("coupled", strength=0.1, weight=weight)


class PushesAway(Good):
    def factor(self, stage):
        return -0.02


class PullsTowardZero(Good):
    def on_before_optimizer_step(self, trainer, stage, optimizer):
        self.step_values = {"loss": 0.0}
        for parameter in stage.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach(), alpha=0.1 * self.weight)


class ForgetsItsWeight(Good):
    def on_before_optimizer_step(self, trainer, stage, optimizer):
        was, self.weight = self.weight, 1.0
        super().on_before_optimizer_step(trainer, stage, optimizer)
        self.weight = was


class CountsOnceAMicroBatch(Good):
    def on_before_optimizer_step(self, trainer, stage, optimizer):
        self.step_values = {"loss": 0.0}

    def penalty(self, stage, batch, scores):
        terms = [self.term(change) for change in stage.strategy.changes(stage.policy.lm)]
        total = 0.1 * torch.stack(terms).sum()
        return Penalty(total, {"loss": total.detach()})


class MeanOfMeans(TargetKL):
    def penalty(self, stage, batch, scores):
        mean = (scores.kl * batch.target_weights).sum() / batch.target_weights.sum()
        return Penalty(mean, {"loss": mean.detach()})


class CountsEveryRank(Good):
    def factor(self, stage):
        return 0.1 * stage.trainer.world_size


class AnchorsWhereTheFitBegins(Good):
    def on_train_start(self, trainer, stage):
        trained = stage.strategy.trained(stage.policy.lm)
        self.anchor = {name: parameter.detach().clone() for name, parameter in trained.items()}

    def on_before_optimizer_step(self, trainer, stage, optimizer):
        self.step_values = {"loss": 0.0}
        for name, parameter in stage.strategy.trained(stage.policy.lm).items():
            if self.weight:
                parameter.grad.add_(parameter.detach() - self.anchor[name], alpha=0.1 * self.weight)


class LosesItsCount(ForgettingControl):
    """Takes back a tenth after every second step that it has seen."""

    in_loss = False
    seen = 0

    def prepare(self, stage):
        stage.strategy.remember_start(stage.policy.lm)

    def after_step(self, stage):
        self.seen += 1
        self.step_values = {"loss": 0.0}
        if self.seen % 2 == 0 and self.weight:
            stage.strategy.interpolate(stage.policy.lm, 0.9)


class LogsNothing(Good):
    def after_step(self, stage):
        self.step_values = {}


class LogsElsewhere(TargetKL):
    def penalty(self, stage, batch, scores):
        found = super().penalty(stage, batch, scores)
        return Penalty(found.loss, {"value": found.metrics["loss"]})


class DoesNothing(ForgettingControl):
    def after_step(self, stage):
        self.step_values = {"loss": 0.0}


class KeepsAFunction(Good):
    def state_dict(self):
        return {**super().state_dict(), "term": self.term}


class SaysTooMuch(Good):
    def refuse(self, stage):
        return "no.\nReally, not with this strategy"


BROKEN = {
    PushesAway: "test_it_keeps_the_model_closer_to_its_start",
    PullsTowardZero: "test_at_the_start_it_pulls_nowhere",
    ForgetsItsWeight: "test_with_weight_zero_training_is_bitwise_what_it_is_without",
    CountsOnceAMicroBatch: "test_how_a_step_is_cut_does_not_matter",
    MeanOfMeans: "test_how_a_step_is_cut_does_not_matter",
    CountsEveryRank: "test_ranks_do_not_matter",
    AnchorsWhereTheFitBegins: "test_a_run_that_goes_on_keeps_it",
    LosesItsCount: "test_a_run_that_goes_on_keeps_it",
    LogsNothing: "test_it_is_logged_under_its_name",
    LogsElsewhere: "test_it_is_logged_under_its_name",
    DoesNothing: "test_it_does_something",
    KeepsAFunction: "test_its_state_is_made_of_plain_things",
    SaysTooMuch: "test_it_works_with_a_strategy_or_says_why_not",
}


def suite_of(control):
    class Suite(ForgettingControlSuite):
        strategies = {"LoRA": lambda: LoRA(rank=3)}  # noqa: RUF012
        refused = frozenset({"LoRA"}) if control is SaysTooMuch else frozenset()
        large = 300.0

        def make(self, weight=1.0):
            return control(weight=weight)

    return Suite()


@pytest.mark.parametrize("control", list(BROKEN), ids=lambda control: control.__name__)
def test_a_broken_control_is_rejected_where_it_is_broken(control, tmp_path):
    name = BROKEN[control]
    needs_a_folder = name in ("test_ranks_do_not_matter", "test_a_run_that_goes_on_keeps_it")
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        getattr(suite_of(control), name)(*([tmp_path / "broken"] if needs_a_folder else []))
    if control is not SaysTooMuch:
        getattr(suite_of(Good), name)(*([tmp_path / "sound"] if needs_a_folder else []))
