"""The budget: turned while training, held at the end, judged by documents that nothing else saw."""

import copy
import math
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import yaml

from ftlit.data.added import AddedRows
from ftlit.errors import ConfigError
from ftlit.forgetting import EarlyStopOnForgetting, ForgettingBudget, ForgettingProbe, Replay
from ftlit.forgetting.budget import FIRST_VERDICT
from ftlit.forgetting.documents import Documents
from ftlit.forgetting.measuring import Measured
from ftlit.metrics.forgetting import PairedChange
from ftlit.peft import Full, LoRA, PrefixTuning
from ftlit.shipped import config_dir
from ftlit.testing import tiny_examples
from tests.forgetting.test_early_stop import Probe, nll
from tests.stages.test_step import fit

LENGTHS = (9, 8, 7, 10, 12, 6, 11, 9, 8, 10, 7, 12)


class Given(Replay):
    """Replays rows made in code."""

    def __init__(self, **arguments):
        super().__init__(**{"name": "replay", "ratio": 1.0, **arguments})

    def added_rows(self, stage):
        self._added = AddedRows(self.name, tiny_examples(LENGTHS * 2, seed=5), self.ratio, self.seed)
        return self._added


class Blind(ForgettingProbe):
    """In the place of the probe that a run with a budget gets, which needs a tokenizer."""

    def refuse(self, stage):
        return None

    def prepare(self, stage):
        pass

    def held_out(self):
        return {}

    def describe(self):
        return "blind"

    def on_train_start(self, trainer, stage):
        pass

    def on_train_end(self, trainer, stage):
        pass


class Budget(ForgettingBudget):
    """Documents and target made in code; keeps what it saw."""

    def __init__(self, **options):
        super().__init__(**{"documents": 24, "steering_documents": 12, "probes": 12, **options})
        self.weights = []

    def _documents(self, stage, rows):
        return Documents(tiny_examples(LENGTHS * 2, seed=11)), Documents(tiny_examples(LENGTHS * 2, seed=12))

    def _target_documents(self, stage):
        return Documents(tiny_examples(LENGTHS, seed=0))

    def _turn(self, stage):
        super()._turn(stage)
        self.weights.append(self.controller.weight)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))


def run(budget, strategy=None, lr=3e-3, epochs=20, **replay):
    callbacks = [budget, Given(**replay), Blind()]
    trainer = {"callbacks": callbacks, "max_epochs": epochs, "gradient_clip_val": None}
    return fit(strategy or LoRA(rank=3), lengths=LENGTHS, trainer=trainer, stage={"lr": lr, "warmup": 2}, batch_size=6)


@pytest.mark.parametrize("make", [LoRA, Full], ids=lambda m: m.__name__)
def test_the_end_meets_the_budget_and_not_more_is_given_up_than_needed(make):
    budget = Budget(max_increase=0.01)
    stage, _, runner = run(budget, make(), lr=3e-2)
    got = budget.outcome
    assert 0 < got["alpha"] < 1
    first = budget._meters["first"]

    def bound():
        """Documents of the second probe, as many, have an error of their own: twice the variance."""
        one = first.measure(runner, stage)["own"]
        return one.change + math.sqrt(2) * (one.upper() - one.change)

    assert bound() <= budget.limit
    # A little further it would not have been.
    lm, strategy = stage.policy.lm, stage.strategy
    further = (1.1 * got["alpha"] + 2.0**-6) / got["alpha"]
    beyond = copy.deepcopy(dict(strategy.trained(lm)))
    with strategy.at(lm, further):
        assert bound() > budget.limit
    for name, value in strategy.trained(lm).items():
        assert torch.equal(value, beyond[name])
    verdict = budget._meters["second"].measure(runner, stage)["own"]
    assert got["verdict"] == pytest.approx(verdict.change, abs=1e-12)
    assert got["met"] == (verdict.change <= budget.limit)
    assert 0 < got["kept"] < 1


def test_the_second_probe_is_below_the_bound_of_the_first_in_95_of_100_runs():
    """Documents of unlike lengths, their changes skewed; below the upper bound of the first alone it is in 88."""
    generator = np.random.default_rng(0)
    budget, within, below = Budget(), 0, 0
    documents = {"own": Documents(tiny_examples([3] * 60))}
    budget._meters = {key: SimpleNamespace(sets=documents) for key in ("first", "second")}
    for _ in range(1500):
        one, other = (
            PairedChange(counts * (generator.lognormal(sigma=0.5, size=60) - 0.5), counts, resamples=400)
            for counts in generator.integers(5, 60, (2, 60))
        )
        within += other.change <= budget._bound("own", Measured(one, 0.0, 0.0, 0.0, 0.0, 1.0))
        below += other.change <= one.upper()
    assert 0.93 < within / 1500 < 0.97
    assert 0.86 < below / 1500 < 0.90


def test_slack_lets_go():
    budget = Budget(max_increase=2.0)
    run(budget, lr=1e-3)
    assert budget.weights[0] == 1.0
    assert budget.weights[-1] == 0.0
    assert budget.outcome["alpha"] == 1.0
    assert budget.outcome["met"] == 1.0
    assert budget.outcome["kept"] == 1.0


def test_the_weight_rises_while_too_much_is_forgotten(capsys):
    budget = Budget(max_increase=0.0005, max_weight=3.0, integral=3.0)
    run(budget, lr=1e-1, epochs=30, ratio=0.2)
    assert max(budget.weights) == 3.0
    out = capsys.readouterr().out
    assert budget.infeasible_at is not None
    assert out.count("cannot be met as things are") == 1
    assert "kept" in out


def test_less_is_forgotten_before_the_projection_than_without():
    """The controller alone, both runs without projection."""
    turned, fixed = Budget(max_increase=0.01, project=False), Budget(max_increase=0.01, project=False, max_weight=1e-9)
    run(turned, lr=1e-2)
    run(fixed, lr=1e-2)
    assert turned.outcome["verdict"] < 0.5 * fixed.outcome["verdict"]
    assert turned.outcome["alpha"] == fixed.outcome["alpha"] == 1.0


def test_the_loss_keeps_its_size():
    """(target + w replay) / (1 + w): with a replay of the target rows themselves the gradient does not depend on w."""

    class Same(Given):
        def added_rows(self, stage):
            self._added = AddedRows(self.name, tiny_examples(LENGTHS), self.ratio, self.seed)
            return self._added

    gradients = []
    for weight in (0.5, 8.0):
        control = Same(objective="ce", weight=weight)
        control.normalised = True
        options = {"callbacks": [control], "max_epochs": -1, "max_steps": 1, "gradient_clip_val": None}
        _, record, _ = fit(LoRA(rank=3), lengths=LENGTHS, trainer=options, batch_size=12)
        gradients.append(record.grads[0])
    for name, one in gradients[0].items():
        torch.testing.assert_close(one, gradients[1][name], rtol=1e-5, atol=1e-7)  # RMSNorm rounds


class Stops(L.Callback):
    def on_train_batch_end(self, trainer, stage, *args):
        trainer.should_stop = trainer.global_step >= 4


@pytest.mark.parametrize("more", [[], [Stops]], ids=["planned", "stopped"])
@pytest.mark.parametrize("probe_first", [True, False])
def test_the_table_is_of_the_weights_that_were_judged(more, probe_first):
    """Wherever the probe stands among the callbacks, and though it had measured the last step already."""
    budget, probe = Budget(max_increase=0.005), Probe(every_n_steps=1)
    callbacks = [*([probe, budget] if probe_first else [budget, probe]), Given(ratio=0.1), *(one() for one in more)]
    options = {"callbacks": callbacks, "max_epochs": 6, "gradient_clip_val": None}
    stage, _, runner = fit(
        LoRA(rank=3), lengths=LENGTHS, trainer=options, stage={"lr": 5e-2, "warmup": 2}, batch_size=6
    )
    assert runner.global_step == (4 if more else 12)
    assert 0 < budget.outcome["alpha"] < 1
    assert probe.last_values["forgetting/general/nll"] == pytest.approx(nll(stage), abs=1e-9)
    verdict = budget._meters["second"].measure(runner, stage)["own"]
    assert budget.outcome["verdict"] == pytest.approx(verdict.change, abs=1e-9)


def test_nothing_learnt_is_not_all_kept(capsys):
    class Worse(Budget):
        def _gain(self, trainer, stage):
            return -0.25

    budget = Worse(max_increase=2.0)
    run(budget, epochs=2)
    assert "kept" not in budget.outcome
    out = capsys.readouterr().out
    assert "nothing was learnt (worse than before by 0.250, nats a token on the target rows)" in out
    assert "of what was learnt" not in out


def test_the_time_before_a_stop_counts():
    budget = Budget()
    run(budget, epochs=2)
    state = budget.state_dict()
    then = Budget()
    then.load_state_dict(state)
    assert then._spent() == state["spent"] > budget.seconds > 0


def test_prefixes_cannot_go_back_but_are_steered_and_judged():
    budget = Budget(max_increase=0.01)
    run(budget, PrefixTuning(), lr=1e-2)
    assert budget.outcome["alpha"] == 1.0
    assert math.isfinite(budget.outcome["verdict"])


def test_defaults_and_refusals():
    added = ForgettingBudget.default_controls([ForgettingBudget()])
    assert [type(one).__name__ for one in added] == ["Replay", "ForgettingProbe"]
    (_, probe) = ForgettingBudget.default_controls([ForgettingBudget(documents=20, new_tokens=7, seed=3)])
    # The texts by which it judges: none but those are written, and none that steers is shown.
    assert (probe.own_first, probe.own_rows, probe.own_new_tokens, probe.seed) == (FIRST_VERDICT, 20, 7, 3)
    assert ForgettingBudget.default_controls([Replay()]) == []
    assert ForgettingBudget.default_controls([ForgettingBudget(), Replay(), ForgettingProbe()]) == []
    for options in ({"max_increase": 0.0}, {"documents": 1}, {"domains": {}}, {"probes": 0}):
        with pytest.raises(ConfigError, match="ForgettingBudget"):
            ForgettingBudget(**options)
    with pytest.raises(ConfigError, match="no control of this run is called 'ewc'; there are replay"):
        run(Budget(controls=["ewc"]))
    with pytest.raises(ConfigError, match="blind has no weight that could be turned"):
        run(Budget(controls=["blind"]))
    with pytest.raises(ConfigError, match="use one of them"):
        fit(LoRA(rank=3), trainer={"callbacks": [Budget(), Given(), Blind(), EarlyStopOnForgetting()]})


def test_the_quickstart_shows_the_texts_that_judge():
    """Those of both runs are written once, and none of them steers."""
    files = [config_dir() / f"{name}.yaml" for name in ("quickstart", "quickstart_budget")]
    callbacks = [one for file in files for one in yaml.safe_load(file.read_text())["trainer"]["callbacks+"]]
    settings = {one["class_path"]: one["init_args"] for one in callbacks}
    probe, budget = settings["ForgettingProbe"], settings["ForgettingBudget"]
    assert probe["own_first"] == FIRST_VERDICT
    assert (probe["own_rows"], probe["own_new_tokens"]) == (budget["documents"], budget["new_tokens"])
