"""What is the best: the metric, its direction, and who is refused."""

import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from ftlit.callbacks.monitor import Best, Monitor, chosen, direct, monitor_of
from ftlit.callbacks.refused import check_callbacks
from ftlit.errors import ConfigError
from ftlit.metrics.directions import direction
from ftlit.stages import SFT
from ftlit.stages.ppo import PPO
from ftlit.testing import tiny_lm


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("val/loss", "min"),
        ("val/code/perplexity", "min"),
        ("forgetting/worst/change", "min"),
        ("forgetting/own/nll", "min"),
        ("val/calibration_error", "min"),
        ("val/kl", "min"),
        ("val/reward", "max"),
        ("val/accuracy", "max"),
        ("val/accuracy_low", "max"),
        ("val/rewards/margins", "max"),
        ("val/margin", "max"),
        ("gen/code/f1", "max"),
        ("gen/bleu", "max"),
        ("gen/verifier_high", "max"),
        ("forgetting/general/agreement", "max"),
        ("val/length", None),
        ("val/rewards/chosen", None),
        ("val/logps/rejected", None),
        ("train/lr", None),
        ("val/entropy", None),
    ],
)
def test_metrics_know_their_direction(name, mode):
    assert direction(name) == mode


class Mine(L.Callback):
    """Logs who knows what."""


def trainer_of(stage, *callbacks, names=("main",), limit=1.0):
    """A trainer as `setup` finds it."""
    trainer = SimpleNamespace(
        lightning_module=stage,
        callbacks=list(callbacks),
        limit_val_batches=limit,
        datamodule=SimpleNamespace(validation_names=list(names)),
        callback_metrics={},
        global_step=0,
    )
    stage._trainer = trainer
    return trainer


@pytest.fixture
def sft():
    return SFT(policy=tiny_lm())


def test_the_default_is_what_the_stage_is_judged_by(sft):
    assert monitor_of(trainer_of(sft), "SaveCheckpoint") == Monitor("val/loss", "min")
    assert monitor_of(trainer_of(sft, names=("a", "b")), "SaveCheckpoint") == Monitor("val/a/loss", "min")
    assert PPO.best_by == ("val/reward", "max")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("val/accuracy", Monitor("val/accuracy", "max")),
        ("val/perplexity", Monitor("val/perplexity", "min")),
        ("train/loss", Monitor("train/loss", "min")),
    ],
)
def test_a_metric_of_ftlit_needs_no_mode(sft, name, found):
    assert chosen(trainer_of(sft), "SaveCheckpoint", name, None, True) == found


def test_a_main_name_means_the_set_that_stands_for_the_run(sft):
    trainer = trainer_of(sft, names=("code", "chat"))
    assert monitor_of(trainer, "SaveCheckpoint", "val/accuracy") == Monitor("val/code/accuracy", "max")
    assert monitor_of(trainer, "SaveCheckpoint", "val/chat/accuracy") == Monitor("val/chat/accuracy", "max")


@pytest.mark.parametrize("name", ["val/acuracy", "eval_loss", "val_loss", "accuracy", "val/code/loss", "gen/f1"])
def test_what_nothing_logs_is_refused_at_the_start(sft, name):
    with pytest.raises(ConfigError, match="does not log in this run") as error:
        monitor_of(trainer_of(sft), "SaveCheckpoint", name, "min")
    assert "val/perplexity" in str(error.value)


def test_a_misspelt_name_is_met_by_the_nearest(sft):
    with pytest.raises(ConfigError, match="did you mean 'val/accuracy'"):
        monitor_of(trainer_of(sft), "SaveCheckpoint", "val/acuracy")


def test_a_foreign_metric_needs_a_mode(sft):
    trainer = trainer_of(sft, Mine())
    with pytest.raises(ConfigError, match="If Mine logs it, set the mode too"):
        monitor_of(trainer, "SaveCheckpoint", "mine/quality")
    assert monitor_of(trainer, "SaveCheckpoint", "mine/quality", "max") == Monitor("mine/quality", "max")


def test_a_metric_without_a_better_end_needs_a_mode(sft):
    with pytest.raises(ConfigError, match="no better end of its own"):
        monitor_of(trainer_of(sft), "SaveCheckpoint", "train/lr")
    assert monitor_of(trainer_of(sft), "SaveCheckpoint", "train/lr", "max") == Monitor("train/lr", "max")


@pytest.mark.parametrize(("name", "mode"), [("val/loss", "max"), ("val/accuracy", "min"), ("val/perplexity", "max")])
def test_a_mode_that_keeps_the_worst_is_refused(sft, name, mode):
    with pytest.raises(ConfigError, match="values are better; leave mode out"):
        monitor_of(trainer_of(sft), "SaveCheckpoint", name, mode)


def test_without_validation_there_is_no_best(sft):
    for options in ({"names": ()}, {"limit": 0}):
        assert monitor_of(trainer_of(sft, **options), "SaveCheckpoint") is None
        with pytest.raises(ConfigError, match="this run has none"):
            chosen(trainer_of(sft), "SaveCheckpoint", "val/accuracy", None, validates=False)


def test_the_best_is_the_best_also_where_some_values_are_no_numbers():
    for mode, values, best in (
        ("min", [math.nan, 3.0, 2.0, math.nan, 4.0], 2.0),
        ("max", [math.nan, 3.0, 5.0, math.nan, 4.0], 5.0),
    ):
        one = Best()
        one.begin(Monitor("m", mode))
        kept = []
        for step, value in enumerate(values):
            trainer = SimpleNamespace(callback_metrics={"m": torch.tensor(value)}, global_step=step)
            kept.append(one.update(trainer))
        assert kept == [True, True, True, False, False]
        assert one.summary() == {"monitor": "m", "mode": mode, "value": best, "step": 2}


def test_another_metric_begins_anew():
    one, other = Best(), Best()
    one.begin(Monitor("a", "min"))
    one.update(SimpleNamespace(callback_metrics={"a": torch.tensor(1.0)}, global_step=1))
    other.load_state_dict(one.state_dict())
    other.begin(Monitor("b", "max"))
    assert other.value is None
    other.load_state_dict(one.state_dict())
    other.begin(Monitor("a", "min"))
    assert other.value == 1.0


# ---- Lightning's own ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name", "mode"),
    [
        (EarlyStopping, "val/accuracy", "max"),
        (EarlyStopping, "val/loss", "min"),
        (ModelCheckpoint, "val/accuracy", "max"),
        (ModelCheckpoint, "val/perplexity", "min"),
    ],
)
def test_lightnings_own_take_the_direction_of_the_metric(sft, make, name, mode):
    callback = make(monitor=name)
    direct(trainer_of(sft, callback), callback)
    assert (callback.monitor, callback.mode) == (name, mode)
    assert vars(callback) | {"_fs": None} == vars(make(monitor=name, mode=mode)) | {"_fs": None}


def test_an_early_stop_waits_for_the_better_end(sft):
    callback = EarlyStopping(monitor="val/accuracy", patience=1, min_delta=0.05)
    direct(trainer_of(sft, callback), callback)
    said = [callback._evaluate_stopping_criteria(torch.tensor(value))[0] for value in (0.5, 0.6, 0.7, 0.72)]
    assert said == [False, False, False, True]


def test_lightnings_own_are_refused_what_nothing_logs(sft):
    for callback in (EarlyStopping(monitor="val/los"), ModelCheckpoint(monitor="acc")):
        with pytest.raises(ConfigError, match=type(callback).__name__):
            direct(trainer_of(sft, callback), callback)
    callback = EarlyStopping(monitor="val/loss", mode="max")
    with pytest.raises(ConfigError, match="leave mode out"):
        direct(trainer_of(sft, callback), callback)


MADE = {
    "BackboneFinetuning": {},
    "BaseFinetuning": {},
    "BatchSizeFinder": {},
    "EMAWeightAveraging": {},
    "GradientAccumulationScheduler": {"scheduling": {0: 2}},
    "LearningRateFinder": {},
    "ModelPruning": {"pruning_fn": "l1_unstructured"},
    "SpikeDetection": {},
    "StochasticWeightAveraging": {"swa_lrs": 0.1},
    "WeightAveraging": {},
}
FINE = {
    *("BasePredictionWriter", "Callback", "Checkpoint", "DeviceStatsMonitor", "EarlyStopping", "LambdaCallback"),
    *("LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "OnExceptionCheckpoint", "ProgressBar"),
    *("RichModelSummary", "RichProgressBar", "ThroughputMonitor", "Timer", "TQDMProgressBar", "LitLogger"),
}


def test_every_callback_of_lightning_was_looked_at():
    """A new one has to be put on one of the two lists."""
    assert set(lightning_callbacks.__all__) <= set(MADE) | FINE
    assert not set(MADE) & FINE


@pytest.mark.parametrize("name", sorted(MADE))
def test_what_replaces_batches_or_weights_is_refused(name):
    callback = getattr(lightning_callbacks, name)(**MADE[name])
    with pytest.raises(ConfigError, match=f"{name} does not work with ftlit"):
        check_callbacks([L.Callback(), callback])


def test_also_a_subclass_of_it():
    class Averaged(lightning_callbacks.WeightAveraging):
        pass

    with pytest.raises(ConfigError, match="Averaged does not work"):
        check_callbacks([Averaged()])
