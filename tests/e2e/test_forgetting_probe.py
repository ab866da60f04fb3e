"""ForgettingProbe through the real command, with a tiny model."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROBE = ["--config", "forgetting/probe", "--trainer.callbacks.max_tokens", "1500"]
PROBE += ["--trainer.callbacks.own_rows=32", "--trainer.callbacks.own_new_tokens=4"]
KEYS = ("nll", "change", "change_low", "change_high", "ppl_ratio", "kl", "agreement")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))


def option(**settings):
    return [f"--trainer.callbacks.{key}={value}" for key, value in settings.items()]


def metrics(run):
    with (Path(run) / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def probed(run):
    """What was measured, by step."""
    rows = {int(row["step"]): {k: v for k, v in row.items() if k.startswith("forgetting/")} for row in metrics(run)}
    return {step: row for step, row in rows.items() if row}


def state(run):
    return torch.load(Path(run) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_what_is_measured_when_and_what_is_left(ftlit, fit_args, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": "Rain falls. " * n}) + "\n" for n in range(1, 13)))
    domains = option(domains="{general: sample:general, text: text.jsonl, own: self}", own_rows=40, own_new_tokens=6)
    args = [*fit_args, *PROBE, *domains, "--trainer.max_epochs", "4", "--model.lr", "0.02", "--run", "r"]
    assert ftlit(*args) == 0, ftlit.err
    found = probed("r")
    assert list(found) == [0, 2, 3, 5, 6, 9, 10, 12]  # the start, asked steps, validations
    for step, row in found.items():
        for name in ("general", "text", "own", "target"):
            one = {key: row[f"forgetting/{name}/{key}"] for key in KEYS}
            assert one["change_low"] <= one["change"] <= one["change_high"]
            assert one["ppl_ratio"] == pytest.approx(math.exp(one["change"]), rel=1e-6)
            assert one["change"] == pytest.approx(one["nll"] - found[0][f"forgetting/{name}/nll"], abs=1e-5)
            assert one["kl"] >= -1e-6
            assert 0 <= one["agreement"] <= 1
            if step:
                assert one["change"] != 0
                assert one["kl"] > 0
        names = ("general", "text", "own")
        assert row["forgetting/worst/change"] == max(row[f"forgetting/{name}/change"] for name in names)
    # The target rows are the run's own validation rows: two ways to one number.
    for row in metrics("r"):
        if "val/loss" in row:
            assert row["forgetting/target/nll"] == pytest.approx(row["val/loss"], rel=1e-5)
    summary = json.loads(Path("r/summary.json").read_text())
    assert summary["start"]["forgetting/own/nll"] == found[0]["forgetting/own/nll"]
    assert summary["end"]["forgetting/own/change"] == pytest.approx(found[12]["forgetting/own/change"], rel=1e-6)
    assert 0 < summary["forgetting_seconds"] < summary["seconds"]
    assert set(summary["weights_moved"]) == {"outside", "0", "1"}
    out = ftlit.out
    assert "control    forgetting_probe: general (sample:general): " in out
    assert "own (self): 40 of its own texts" in out or " of its own texts, " in out
    assert "step 5: forgotten, nats a token: general " in out
    lines = out.splitlines()
    (place,) = (i for i, line in enumerate(lines) if line.startswith("what was learnt and what was lost"))
    assert lines[place + 2].startswith("the target ")
    assert lines[place + 2].endswith("learnt")
    assert [line.split()[0] for line in lines[place + 3 : place + 6]] == ["general", "text", "own"]
    rest = [line for line in lines[place + 6 :] if not line.startswith("note ")]
    assert rest[0].startswith("weights    moved by ")
    assert rest[1].startswith("probe      measured 7 times in ")
    assert rest[1].endswith("% of the run")
    assert "forgetting.png, learn_forget.png" in lines[-1]
    for name in ("forgetting", "learn_forget"):
        assert Path(f"r/{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("peft", ["lora", "full", "prefix_tuning", "prompt_tuning"])
def test_training_is_bitwise_the_same_with_and_without(ftlit, rows, tiny_model_folder, peft):
    common = [
        *("fit", "--config", "sft", "--config", "trainer/cpu", "--config", f"peft/{peft}"),
        *("--model.policy", tiny_model_folder, "--model.lr", "0.01"),
        *("--data.train", rows, "--data.validation", "0.25", "--data.batch_size", "3", "--trainer.max_steps", "4"),
        *(["--model.peft.dropout", "0.3"] if peft == "lora" else []),
    ]
    assert ftlit(*common, "--run", "without") == 0
    assert (
        ftlit(
            *common,
            *PROBE,
            *option(domains="{a: sample:general, own: self}", own_new_tokens=4, own_rows=32, every_n_steps=1),
            "--run",
            "with",
        )
        == 0
    )
    assert state("without").keys() == state("with").keys()
    for name, tensor in state("without").items():
        assert torch.equal(tensor, state("with")[name]), name
    for one, other in zip(metrics("without"), metrics("with"), strict=True):
        for key in ("step", "train/loss", "train/grad_norm", "val/loss"):
            assert one.get(key) == other.get(key)
    assert list(probed("with")) == [0, 1, 2, 3, 4]
    assert ("forgetting/weights/change" in probed("with")[4]) == (peft in ("lora", "full"))


@pytest.mark.parametrize("peft", ["lora", "full"])
def test_a_resumed_run_measures_what_an_uninterrupted_one_does(ftlit, rows, tiny_model_folder, peft):
    args = [
        *("fit", "--config", "sft", "--config", "trainer/cpu", "--config", f"peft/{peft}", *PROBE),
        *("--model.policy", tiny_model_folder, "--model.lr", "0.01"),
        *("--data.train", rows, "--data.validation", "0.25", "--data.batch_size", "3", "--trainer.max_epochs", "4"),
    ]
    assert ftlit(*args, "--run", "whole") == 0
    Path("stop_at_eight.py").write_text(
        "import lightning as L\n"
        "class StopAt(L.Callback):\n"
        "    def on_train_batch_end(self, trainer, *args):\n"
        "        if trainer.global_step == 8: raise KeyboardInterrupt\n"
    )
    assert ftlit(*args, "--trainer.callbacks+=stop_at_eight.StopAt", "--run", "cut") in (1, 130)
    assert ftlit("fit", "--config", "whole/config.yaml", "--run", "cut", "--ckpt_path", "last") == 0
    assert "scored" in ftlit.out
    assert probed("cut") == probed("whole")
    assert list(probed("cut")) == [0, 2, 3, 5, 6, 9, 10, 12]
    summaries = [json.loads(Path(run, "summary.json").read_text()) for run in ("cut", "whole")]
    for part in ("start", "end"):
        assert summaries[0][part] == summaries[1][part]
    assert "probe      measured 7 times" in ftlit.out


def alone(args, folder, run):
    """A run as a process of its own, with a cache of its own; returns what it printed."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "FTLIT_CACHE": str(folder / f"cache-{run}")}
    command = [sys.executable, "-m", "ftlit", *args, "--run", run]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_alike(one, other, tolerance):
    assert list(one) == list(other)
    for step, row in one.items():
        assert row.keys() == other[step].keys()
        for key, value in row.items():
            assert other[step][key] == pytest.approx(value, abs=tolerance), key


def test_two_ranks_measure_what_one_measures(fit_args, tmp_path):
    common = [*fit_args, *PROBE, "--trainer.precision", "64-true", "--data.validation", "0.42", "--model.lr", "0.01"]
    common += option(domains="{a: sample:general, own: self}", own_new_tokens=4, own_rows=40)
    for run, size, more in (("one", "4", []), ("two", "2", ["--trainer.devices", "2", "--trainer.strategy", "ddp"])):
        out = alone([*common, "--data.batch_size", size, *more], tmp_path, run)
        assert out.count("step 2: forgotten") == 1
        assert out.count("own text   64 texts are written") == 1
    assert list(probed(tmp_path / "one")) == [0, 2]
    assert_alike(probed(tmp_path / "one"), probed(tmp_path / "two"), 1e-5)


def test_sharded_ranks_measure_what_one_measures(fit_args, tmp_path):
    common = [*fit_args, *PROBE, *option(domains="{a: sample:general}"), "--trainer.max_steps", "3"]
    common += ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.01"]
    fsdp = ["--config", "trainer/fsdp", "--trainer.devices", "2", "--trainer.accelerator", "cpu"]
    alone([*common, "--data.batch_size", "4"], tmp_path, "one")
    alone([*common, "--data.batch_size", "2", *fsdp], tmp_path, "two")
    assert list(probed(tmp_path / "one")) == [0, 2, 3]
    assert_alike(probed(tmp_path / "one"), probed(tmp_path / "two"), 1e-3)


def test_early_stopping_can_watch_it_also_where_a_step_was_measured_already(ftlit, fit_args):
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=forgetting/worst/change"]
    args = [*fit_args, *PROBE, *option(every_n_steps=3), *stop, "--trainer.max_epochs", "2", "--run", "r"]
    assert ftlit(*args) == 0, ftlit.err
    assert list(probed("r")) == [0, 2, 3, 5, 6]  # 3 is asked for twice
    assert sum("forgetting/worst/change" in row for row in metrics("r")) == 5


def test_an_asked_step_where_validation_does_not_measure(ftlit, fit_args):
    args = [*fit_args, *PROBE, *option(at_steps="[2,3]", at_validations="false"), "--trainer.max_epochs", "3"]
    assert ftlit(*args, "--trainer.val_check_interval", "1", "--run", "r") == 0, ftlit.err
    assert list(probed("r")) == [0, 2, 3, 9]


def test_without_validation_rows_it_measures_at_the_end(ftlit, rows, tiny_model_folder):
    args = ["fit", "--config", "sft", "--model.policy", tiny_model_folder, "--data.train", rows, "--run", "r"]
    assert ftlit(*args, *PROBE, *option(kl="false"), "--trainer.max_steps", "3") == 0
    assert list(probed("r")) == [0, 2, 3]
    assert not any("kl" in key or "target" in key for key in probed("r")[3])
    assert Path("r/forgetting.png").exists()
    assert not Path("r/learn_forget.png").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_tokens": 1}, "ForgettingProbe.max_tokens must be at least 2, got 1"),
        ({"at_steps": "[0]"}, "ForgettingProbe.at_steps must be at least 1, got 0"),
        ({"domains": "{target: sample:general}"}, "cannot call a domain 'target'"),
        ({"domains": "{a/b: sample:general}"}, "cannot call a domain 'a/b'"),
        ({"domains": "{}"}, "ForgettingProbe.domains is empty"),
        ({"domains": "{a: nope.jsonl}"}, "nope.jsonl does not exist"),
        ({"domains": "{a: sample:generl}"}, "did you mean 'general'"),
    ],
)
def test_mistakes_are_one_sentence(ftlit, fit_args, settings, says):
    assert ftlit(*fit_args, *PROBE, *option(**settings), "--run", "r", "--trainer.max_steps", "1") == 1
    assert says in ftlit.err
    assert "Traceback" not in ftlit.err
