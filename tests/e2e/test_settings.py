"""Lightning's settings mean what a user expects of them, and mistakes are one sentence."""

import itertools
import os
import stat
from pathlib import Path

import pytest
import torch
import yaml

from ftlit.cli import _precision_of

from .test_run import metrics


def test_max_steps_may_go_beyond_an_epoch(ftlit, fit_args):
    assert ftlit(*fit_args, "--run", "r", "--trainer.max_steps", "7") == 0  # three steps an epoch
    assert metrics("r")[-1]["step"] == 7


def test_one_epoch_without_a_word(ftlit, fit_args):
    assert ftlit(*fit_args, "--run", "r") == 0
    assert metrics("r")[-1]["step"] == 3


@pytest.mark.parametrize(("interval", "at"), [("2", [0, 2, 5, 8, 9]), ("4", [0, 4, 8, 9]), ("0.34", [0, 1, 2, 3])])
def test_val_check_interval(ftlit, fit_args, interval, at):
    epochs = "1" if "." in interval else "3"
    args = ["--trainer.val_check_interval", interval, "--trainer.max_epochs", epochs]
    assert ftlit(*fit_args, *args, "--run", "r") == 0
    assert [int(row["step"]) for row in metrics("r") if "val/loss" in row] == at


def test_overfit_batches_sees_the_same_rows_again(ftlit, fit_args):
    args = ["--trainer.overfit_batches", "1", "--trainer.max_epochs", "6", "--model.lr", "0.05"]
    assert ftlit(*fit_args, *args, "--run", "r") == 0
    losses = [row["train/loss"] for row in metrics("r") if "train/loss" in row]
    assert len(losses) == 6
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def test_limit_train_batches(ftlit, fit_args):
    args = ["--trainer.limit_train_batches", "2", "--trainer.max_epochs", "2"]
    assert ftlit(*fit_args, *args, "--run", "r") == 0
    assert "4 optimizer steps" in ftlit.out
    assert metrics("r")[-1]["step"] == 4


def test_fast_dev_run_leaves_nothing_behind(ftlit, fit_args):
    assert ftlit(*fit_args, "--trainer.fast_dev_run", "true", "--run", "r") == 0
    assert not Path("r").exists() or not any(Path("r").iterdir())


def test_callbacks_may_be_replaced(ftlit, fit_args):
    Path("own.yaml").write_text("trainer:\n  callbacks:\n    - class_path: LearningRateMonitor\n")
    assert ftlit(*fit_args, "--config", "own.yaml", "--run", "r") == 0
    assert Path("r/checkpoints/last.ckpt").exists()  # a run can still be gone on from


def test_checkpoints_may_be_switched_off(ftlit, fit_args):
    assert ftlit(*fit_args, "--trainer.enable_checkpointing", "false", "--run", "r") == 0
    assert not Path("r/checkpoints").exists()
    assert Path("r/adapter/last/adapter_model.safetensors").exists()


def test_validation_sets_by_name_only(ftlit, fit_args, rows):
    assert ftlit(*fit_args, "--data.validation", f"{{other: {rows}}}", "--run", "r", "--trainer.max_epochs", "2") == 0
    assert Path("r/checkpoints/best.ckpt").exists()
    assert Path("r/adapter/best").exists()
    assert "val/other/loss" in metrics("r")[-1]


def test_validate_without_rows_says_so(ftlit, rows, tiny_model_folder):
    args = ["--config", "sft", "--model.policy", tiny_model_folder, "--data.train", rows]
    assert ftlit("validate", *args) == 1
    assert "data.validation is missing" in ftlit.err


def test_a_fit_that_failed_does_not_block_its_folder(ftlit, fit_args):
    assert ftlit(*fit_args, "--model.peft.target_modules", "[q_projj]", "--run", "r") == 1
    assert ftlit(*fit_args, "--model.peft.target_modules", "[q_proj]", "--run", "r") == 0


def test_limit_predict_batches(ftlit, fit_args, rows):
    assert ftlit(*fit_args, "--run", "r") == 0
    args = ["--data.predict", rows, "--model.max_new_tokens", "2", "--trainer.limit_predict_batches", "1"]
    assert ftlit("predict", "--config", "r/config.yaml", *args) == 0
    assert len(Path("r/predictions.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precisions_learn(ftlit, fit_args, precision):
    args = ["--trainer.precision", precision, "--trainer.max_epochs", "4", "--model.lr", "0.02"]
    assert ftlit(*fit_args, *args, "--run", "r") == 0
    losses = [row["val/loss"] for row in metrics("r") if "val/loss" in row]
    assert losses[-1] < losses[0] - 0.1


def test_the_precision_is_decided_said_and_kept(ftlit, fit_args):
    """A run that was begun on a GPU goes on as it was on a machine without one, where nothing is given."""
    assert ftlit(*fit_args, "--run", "r") == 0
    assert "precision  32-true (chosen for cpu)" in ftlit.out
    assert yaml.safe_load(Path("r/config.yaml").read_text())["trainer"]["precision"] == "32-true"
    assert ftlit(*fit_args, "--trainer.precision", "bf16-mixed", "--run", "half") == 0
    assert "precision " not in ftlit.out
    more = ("--trainer.max_epochs", "3", "--run", "half", "--ckpt_path", "last")
    assert ftlit(*fit_args, *more) == 0
    assert "precision  bf16-mixed (as the checkpoint)" in ftlit.out
    assert yaml.safe_load(Path("half/config.yaml").read_text())["trainer"]["precision"] == "bf16-mixed"
    assert "another precision" not in ftlit.out
    more = ("--trainer.max_epochs", "4", "--run", "half", "--ckpt_path", "last", "--trainer.precision", "32-true")
    assert ftlit(*fit_args, *more) == 0
    assert "note       another precision: bf16-mixed -> 32-true" in ftlit.out


@pytest.mark.parametrize(
    ("written", "kept"),
    [("null", "32-true"), ("bf16-mixed", "bf16-mixed"), ("32", "32-true"), ("bf16-true", "bf16-mixed")],
)
def test_a_checkpoint_that_does_not_say_its_precision(tmp_path, written, kept):
    """It is older than that: its run's config does, and none given was float32 on a GPU too."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text(f"trainer:\n  precision: {written}\n")
    torch.save({"state_dict": {}, "ftlit": {}}, tmp_path / "checkpoints/last.ckpt")
    assert _precision_of(str(tmp_path / "checkpoints/last.ckpt")) == kept
    torch.save({"state_dict": {}, "ftlit": {"precision": "64-true"}}, tmp_path / "checkpoints/last.ckpt")
    assert _precision_of(str(tmp_path / "checkpoints/last.ckpt")) == "64-true"


def test_a_strategy_that_shards_otherwise_is_refused(ftlit, fit_args):
    for name in ("deepspeed_stage_3", "lightning.pytorch.strategies.FSDPStrategy"):
        assert ftlit(*fit_args, "--trainer.strategy", name) == 1
        assert "is not supported: --config trainer/fsdp" in ftlit.err


MISTAKES = {
    "no data file": (["--data.train", "nope.jsonl"], "nope.jsonl does not exist"),
    "nearest file": (["--data.train", "row.jsonl"], "did you mean 'rows.jsonl'?"),
    "validation file": (["--data.validation", "nope.jsonl"], "nope.jsonl does not exist"),
    "share of one": (["--data.validation", "1.0"], "must be between 0 and 1"),
    "share of all": (["--data.validation", "0.99"], "leaves none to train on"),
    "model folder": (["--model.policy", "./nope"], "model ./nope does not exist"),
    "hub id offline": (["--model.policy", "nobody/nothing"], "cannot be loaded"),
    "tiny max_length": (["--data.max_length", "4"], "raise it"),
    "max_length 1": (["--data.max_length", "1"], "at least 2 tokens, got 1"),
    "rank 0": (["--model.peft.rank", "0"], "rank must be at least 1, got 0"),
    "rank too large": (["--model.peft.rank", "64"], "exceeds the smaller side"),
    "target": (["--model.peft.target_modules", "q_projj"], "matches no linear layer"),
    "rate": (["--model.lr", "-1"], "lr must be positive"),
    "checkpoint": (["--ckpt_path", "nope.ckpt"], "checkpoint nope.ckpt does not exist"),
    "checkpoint of no run": (["--ckpt_path", "last"], "there is no r/checkpoints/last.ckpt"),
    "torn checkpoint": (["--ckpt_path", "rows.jsonl"], "is torn, or not a checkpoint"),
    "strategy": (["--trainer.strategy", "dpp"], "trainer: "),
    "accelerator": (["--trainer.accelerator", "gpuu"], "trainer: "),
    "path as stage": (["--model", "./some/model"], "--model.policy ./some/model"),
    "of TRL": (["--learning_rate", "1"], "ftlit calls it model.lr"),
    "packing": (["--packing", "true"], "ftlit always packs"),
    "placeholder": (["--data.train", "sample:identity"], "set data.fill"),
    "scheduler": (
        ["--trainer.callbacks+=GradientAccumulationScheduler", "--trainer.callbacks.scheduling={0: 2}"],
        "set trainer.accumulate_grad_batches",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(ftlit, fit_args, name):
    args, says = MISTAKES[name]
    assert ftlit(*fit_args, "--run", "r", *args) == 1
    lines = [line for line in ftlit.err.splitlines() if line.startswith("ftlit: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in ftlit.err


def test_a_broken_row_is_named(ftlit, fit_args):
    text = Path("rows.jsonl").read_text().splitlines()
    text[6] = '{"messages": [{"role": "user", "content": null}]}'
    Path("rows.jsonl").write_text("\n".join(text))
    assert ftlit(*fit_args, "--run", "r") == 1
    assert "rows.jsonl, row 7: column 'messages[0].content' must hold non-empty text, got null" in ftlit.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_folder_is_one_sentence(ftlit, fit_args, tmp_path):
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(stat.S_IRUSR)
    assert ftlit(*fit_args, "--run", "locked/r") == 1
    assert "Permission denied" in ftlit.err
