"""Preference tuning through the real command line."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ftlit.objectives.preference_sums import NAMES


def write_pairs(path, number=12):
    """Short ShareGPT rows with a better and a worse answer."""
    with path.open("w") as file:
        for i in range(number):
            row = {
                "conversations": [{"from": "human", "value": f"What is {i} plus {i}?"}],
                "chosen": {"from": "gpt", "value": f"{2 * i}, of course" + "!" * (i % 4)},
                "rejected": {"from": "gpt", "value": f"I do not know {i}" + "." * (i % 3)},
            }
            file.write(json.dumps(row) + "\n")
    return str(path)


@pytest.fixture
def pairs(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl")


@pytest.fixture
def args(pairs, tiny_model_folder):
    """Nine rows to train on, three to validate, three rows a step."""
    return [
        *("fit", "--config", "dpo", "--config", "trainer/cpu", "--model.policy", tiny_model_folder),
        *("--model.peft.rank", "4", "--model.lr", "0.01", "--data.train", pairs, "--data.validation", "0.25"),
        *("--data.batch_size", "3"),
    ]


def metrics(run):
    with Path(run, "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def weights(run):
    return torch.load(Path(run, "checkpoints/last.ckpt"), weights_only=True)["state_dict"]


def test_a_run(ftlit, args):
    """The first loss is ln 2, the margin grows, and what is left behind is what other programs read."""
    assert ftlit(*args, "--run", "r", "--trainer.max_epochs", "4") == 0
    rows = metrics("r")
    assert rows[0]["val/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert rows[1]["train/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert rows[1]["rewards/margins"] == 0
    last = rows[-1]
    assert last["val/loss"] < 0.5
    assert last["val/rewards/accuracies"] == 1
    assert last["val/rewards/margins"] == pytest.approx(last["val/rewards/chosen"] - last["val/rewards/rejected"])
    assert {"val/logps/chosen", "val/logps/rejected", "val/lengths/chosen", "val/lengths/rejected"} <= set(last)
    assert Path("r/adapter/last/adapter_model.safetensors").exists()
    assert "rows       train: 9 rows;" in ftlit.out
    assert "--- chosen" in ftlit.out
    assert ftlit("validate", "--config", "r/config.yaml") == 0
    assert f"{last['val/loss']:.4f}" in ftlit.out
    assert ftlit("predict", "--config", "r/config.yaml", "--data.predict", "pairs.jsonl") == 0
    lines = Path("r/predictions.jsonl").read_text().splitlines()
    assert len(lines) == 12


QUICK = ("sigmoid", "aot", "apo_zero", "cpo", "slic")  # tests/stages trains all of them in any case
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in sorted(NAMES)]


@pytest.mark.parametrize("name", EVERY)
def test_every_loss_by_its_name(ftlit, args, name):
    options = ["--data.validation", "null", "--trainer.max_steps", "2", "--run", "r"]
    assert ftlit(*args, *options, "--model.loss", name, "--model.lr", "0.001", "--data.batch_size", "12") == 0
    rows = metrics("r")
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


@pytest.mark.parametrize("name", ["simpo", "orpo", "ipo", "kto", "rpo"])
def test_every_overlay(ftlit, args, name):
    options = ["--trainer.max_steps", "2", "--run", "r"]
    assert ftlit(args[0], "--config", "dpo", "--config", f"dpo/{name}", *args[3:], *options) == 0
    rows = metrics("r")
    assert rows[2]["train/loss"] < rows[1]["train/loss"]


def test_settings_of_a_loss(ftlit, args):
    assert ftlit(*args, "--model.loss.beta", "0.5", "--model.loss.label_smoothing", "0.1", "--run", "r") == 0
    assert "label_smoothing: 0.1" in Path("r/config.yaml").read_text()
    assert ftlit(*args, "--model.loss", "sigmod", "--run", "s") == 1
    assert "did you mean 'sigmoid'?" in ftlit.err


STOP_AT = (
    "import lightning as L\n"
    "class StopAt(L.Callback):\n"
    "    def __init__(self, step: int = 0):\n        self.step = step\n"
    "    def on_train_batch_end(self, trainer, *args):\n"
    "        if trainer.global_step == self.step: raise KeyboardInterrupt\n"
)


@pytest.mark.parametrize(
    "more",
    [
        ["--model.peft.dropout", "0.1"],
        ["--config", "peft/full", "--model.lr", "0.01"],
        ["--model.cache_reference", "true"],
        ["--model.loss", "kto"],
    ],
    ids=["dropout", "full", "cached", "kto"],
)
def test_resume_is_as_if_never_stopped(ftlit, args, more, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch; the reference is still the model at the start of the run."""
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))
    if "peft/full" in more:
        place = args.index("--model.peft.rank")
        args = [*args[:place], *args[place + 2 :]]
    common = [*args, *more, "--trainer.max_epochs", "2", "--trainer.callbacks.every_n_steps", "1"]
    assert ftlit(*common, "--run", "whole") == 0
    Path("stop_at.py").write_text(STOP_AT)
    stop = ["--trainer.callbacks+=stop_at.StopAt", "--trainer.callbacks.step=4"]
    assert ftlit(*common, *stop, "--run", "cut") in (1, 130)
    assert ftlit("fit", "--config", "whole/config.yaml", "--run", "cut", "--ckpt_path", "last") == 0
    for name, tensor in weights("whole").items():
        assert torch.equal(tensor, weights("cut")[name]), name
    for ours, theirs in zip(metrics("cut"), metrics("whole"), strict=True):
        kept = [key for key in theirs if not key.endswith("per_s")]
        assert {key: ours.get(key) for key in kept} == {key: theirs[key] for key in kept}


@pytest.mark.parametrize(
    "more",
    [
        ["--config", "trainer/ddp", "--model.cache_reference", "true"],
        ["--config", "trainer/ddp"],
        ["--config", "trainer/ddp", "--config", "peft/full"],
        ["--config", "trainer/fsdp"],
        ["--config", "trainer/fsdp", "--config", "peft/full"],
    ],
    ids=["ddp-cached", "ddp", "ddp-full", "fsdp", "fsdp-full"],
)
def test_two_ranks_equal_one(args, tmp_path, more):
    """Nine rows, four a step: the last step of each epoch is short, and uneven over the ranks."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "FTLIT_CACHE": str(tmp_path / "cache")}
    if "peft/full" in more:
        place = args.index("--model.peft.rank")
        args = [*args[:place], *args[place + 2 :], "--config", "peft/full", "--model.lr", "0.01"]
        more = more[:2]
    common = [*args, "--trainer.max_epochs", "2"]
    common += [] if "trainer/fsdp" in more else ["--trainer.precision", "64-true"]
    for run, options in (
        ("one", ["--data.batch_size", "4"]),
        ("two", [*more, "--data.batch_size", "2", "--trainer.devices", "2"]),
    ):
        command = [sys.executable, "-m", "ftlit", *common, "--run", run, *options]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=0, atol=1e-4)
    rows = [metrics(tmp_path / run) for run in ("one", "two")]
    for first, second in zip(*rows, strict=True):
        kept = [key for key in first if not key.endswith("per_s")]
        assert {k: second[k] for k in kept} == pytest.approx({k: first[k] for k in kept}, abs=1e-4, rel=1e-4)


def test_the_counts_of_the_rows(ftlit, args, tmp_path):
    """Whatever is lost is said, and an example is shown."""
    turns, yes = [{"from": "human", "value": "Hi?"}], {"from": "gpt", "value": "Yes."}
    rows = [
        {"conversations": turns, "chosen": yes, "rejected": {"from": "gpt", "value": "No."}},
        {"conversations": turns, "chosen": yes, "rejected": yes},
        {"conversations": turns, "chosen": yes, "rejected": {"from": "gpt", "value": ""}},
        {"conversations": [{"from": "human", "value": "Why? " * 30}], "chosen": {"from": "gpt", "value": "A"},
         "rejected": {"from": "gpt", "value": "B"}, "note": 1},
    ]  # fmt: skip
    (tmp_path / "odd.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    odd = ["--data.train", "odd.jsonl", "--data.validation", "null", "--data.max_length", "64"]
    assert ftlit("data", *args[1:], *odd) == 0
    for said in (
        "1 dropped (an empty answer)",
        "1 dropped (answers equal, or equally good)",
        "1 prompts cut to max_length",
        "columns not read: note",
        "--- chosen",
        "⟦Yes.<|im_end|>⟧",
    ):
        assert said in ftlit.out, said
    (tmp_path / "none.jsonl").write_text(json.dumps(rows[1]))
    assert ftlit(*args, "--data.train", "none.jsonl", "--data.validation", "null", "--run", "n") == 1
    assert "none of 1 rows can be compared: 1 dropped (answers equal, or equally good)." in ftlit.err


def test_rows_for_another_stage(ftlit, args, pairs, tiny_model_folder, tmp_path):
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]})
    )
    assert ftlit(*args, "--data.train", "chat.jsonl", "--run", "r") == 1
    assert "fit no preference format" in ftlit.err
    sft = ["fit", "--config", "sft", "--config", "trainer/cpu", "--model.policy", tiny_model_folder, "--run", "r"]
    assert ftlit(*sft, "--data.train", pairs, "--data.format", "Pairs") == 1
    assert "holds answers to be compared: train on them with --config dpo" in ftlit.err
    other = ["--data", "SFTData", "--data.train", "chat.jsonl", "--data.validation", "null"]
    assert ftlit(*args[:-8], *other, "--run", "r") == 1
    assert "set data to PreferenceData" in ftlit.err
