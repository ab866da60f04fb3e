"""Objectives, extra metrics, schedules and LoRA's settings by the command line; runs that stop early."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml

from ftlit.peft.io import read_config

STOP = """
import lightning as L


class Stop(L.Callback):
    def on_train_epoch_start(self, trainer, stage):
        if trainer.current_epoch == 1:
            raise FloatingPointError("stopped")
"""


def metrics(run):
    with (Path(run) / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def test_objectives_by_short_name(ftlit, fit_args):
    norms = {}
    for name, extra in {
        "CrossEntropy": [],
        "LabelSmoothing": ["--model.objective.epsilon", "0.3"],
        "DFT": [],
    }.items():
        assert ftlit(*fit_args, "--model.objective", name, *extra, "--run", name) == 0
        config = yaml.safe_load(Path(name, "config.yaml").read_text())["model"]["init_args"]["objective"]
        assert config["class_path"].endswith(f".{name}")
        norms[name] = metrics(name)[1]["train/grad_norm"]
        assert metrics(name)[1]["train/loss"] == pytest.approx(metrics("CrossEntropy")[1]["train/loss"])
    assert len(set(norms.values())) == 3
    assert norms["DFT"] < norms["CrossEntropy"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model.objective", "LabelSmooth"], "no TokenObjective class is called 'LabelSmooth': did you mean"),
        (["--model.objective", "LabelSmoothing", "--model.objective.epsilon", "2"], "epsilon must be in [0, 1), got 2"),
        (["--model.extra_metrics", "[entropi]"], "extra_metrics"),
        (["--model.schedule", "wds"], "model.schedule must be one of"),
        (["--model.layer_decay", "2"], "layer_decay must be in (0, 1]"),
        (["--model.peft.modules_to_save", "[lm_haed]"], "modules_to_save 'lm_haed' matches no module"),
        (["--model.peft.rank_pattern", "{q_proj: 0}"], "rank for 'q_proj' in rank_pattern must be at least 1"),
        (["--model.peft.from_adapter", "nowhere"], "nowhere is not an adapter folder"),
    ],
)
def test_mistakes_are_one_sentence(ftlit, fit_args, args, says):
    assert ftlit(*fit_args, *args, "--run", "r") == 1
    lines = [line for line in ftlit.err.splitlines() if line.startswith("ftlit: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in ftlit.err


def test_entropy_is_logged_where_it_is_asked_for(ftlit, fit_args):
    assert ftlit(*fit_args, "--run", "plain") == 0
    assert not any("entropy" in key for row in metrics("plain") for key in row)
    assert ftlit(*fit_args, "--model.extra_metrics", "[entropy]", "--run", "r") == 0
    rows = metrics("r")
    assert all(0 < row["train/entropy"] < 5.71 for row in rows if "train/loss" in row)  # at most log 300
    assert all(0 < row["val/entropy"] < 5.71 for row in rows if "val/loss" in row)
    for ours, other in zip(rows, metrics("plain"), strict=True):
        for key in ("train/loss", "val/loss", "train/grad_norm"):
            assert ours.get(key) == other.get(key)


def test_a_run_stops_early_and_keeps_its_best(ftlit, fit_args):
    Path("stop.yaml").write_text(
        "trainer:\n  callbacks+:\n    - class_path: EarlyStopping\n"
        "      init_args: {monitor: val/loss, patience: 2, check_on_train_epoch_end: false}\n"
    )
    args = ["--config", "stop.yaml", "--trainer.max_epochs", "40", "--model.lr", "0.08", "--model.schedule", "constant"]
    assert ftlit(*fit_args, *args, "--run", "r") == 0
    values = [(int(row["step"]), row["val/loss"]) for row in metrics("r") if "val/loss" in row]
    steps, losses = zip(*values[1:], strict=True)
    best = losses.index(min(losses))
    assert steps[-1] < 40 * 3
    assert len(losses) == best + 1 + 2  # two validations without a better one
    checkpoint = torch.load("r/checkpoints/best.ckpt", weights_only=True)
    assert checkpoint["global_step"] == steps[best]
    assert torch.load("r/checkpoints/last.ckpt", weights_only=True)["global_step"] == steps[-1]
    assert ftlit("validate", "--config", "r/config.yaml", "--ckpt_path", "best") == 0
    shown = json.loads(Path("r/validate.json").read_text())["metrics"]["val/loss"]
    assert shown == pytest.approx(float(min(losses)), abs=1e-5)


def test_groups_survive_a_resume(ftlit, fit_args):
    """Layer-wise rates, the schedule and whole trained modules: stopped and gone on equals in one go."""
    args = [
        *fit_args, "--model.layer_decay", "0.7", "--model.weight_decay", "0.1", "--model.schedule", "wsd",
        "--model.decay", "2", "--model.peft.modules_to_save", "[lm_head, input_layernorm]",
        "--model.peft.lr_ratio_b", "4", "--trainer.max_epochs", "2",
    ]  # fmt: skip
    assert ftlit(*args, "--run", "whole") == 0
    Path("stopping.py").write_text(STOP)
    assert ftlit(*args, "--run", "parts", "--trainer.callbacks+=stopping.Stop") == 1
    assert ftlit("fit", "--config", "whole/config.yaml", "--run", "parts", "--ckpt_path", "last") == 0
    states = [torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("whole", "parts")]
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][name]), name
    names = [[group["name"] for group in state["optimizer_states"][0]["param_groups"]] for state in states]
    assert names[0] == names[1]
    assert "lr x 0.7, no decay" in names[0]


def test_a_run_goes_on_from_an_adapter(ftlit, fit_args):
    args = [
        *fit_args,
        "--model.peft.target_modules",
        "[q_proj, embed_tokens]",
        "--model.peft.modules_to_save",
        "[norm]",
    ]
    assert ftlit(*args, "--run", "a") == 0
    assert ftlit(*args, "--model.peft.from_adapter", "a/adapter/last", "--run", "b") == 0
    before, after = metrics("a")[-1]["val/loss"], metrics("b")[0]["val/loss"]
    assert after == pytest.approx(before, abs=1e-5)
    assert read_config("b/adapter/last")["r"] == 4
    assert ftlit("generate", "b", "--prompt", "What is 3 plus 3?", "--max_new_tokens", "3") == 0
    assert ftlit("export", "b", "--to", "m") == 0
