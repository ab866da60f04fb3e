"""A budget of forgetting through the command line."""

import csv
import json
from pathlib import Path

import pytest
import torch

from ftlit.peft.io import read_config

from .test_dpo import write_pairs

BUDGET = [
    "--config", "forgetting/budget", "--trainer.callbacks.max_increase=0.001", "--trainer.callbacks.documents=12",
    "--trainer.callbacks.new_tokens=6", "--trainer.callbacks.steering_documents=6", "--trainer.callbacks.probes=6",
    "--trainer.callbacks+=Replay", "--trainer.callbacks.num_rows=12", "--trainer.callbacks.max_new_tokens=6",
    "--trainer.callbacks.ratio=0.5", "--model.lr", "0.05", "--trainer.max_epochs", "4",
]  # fmt: skip
STOP = """
import lightning as L


class Stop(L.Callback):
    def on_train_batch_end(self, trainer, stage, outputs, batch, index):
        if trainer.global_step == 7:
            raise FloatingPointError("stopped")
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))


def rows(run):
    with Path(run, "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def plain(rows):
    return [{key: value for key, value in row.items() if "_per_s" not in key} for row in rows]


def test_one_line_says_how_it_ended_and_a_run_that_goes_on_ends_the_same(ftlit, fit_args):
    args = [*fit_args, *BUDGET]
    assert ftlit(*args, "--run", "whole") == 0
    said = [line for line in ftlit.out.splitlines() if line.startswith("budget ")]
    assert len([line for line in said if "of what was learnt" in line]) == 1
    assert "0.1% " in said[-1]
    assert "12 texts that steered nothing" in said[-1]
    last = rows("whole")[-1]
    steered = [row for row in rows("whole") if "forgetting/budget/weight" in row]
    assert len(steered) >= 5
    assert 0 <= float(last["forgetting/budget/alpha"]) < 1
    met = float(last["forgetting/budget/verdict"]) <= float(steered[0]["forgetting/budget/limit"])
    assert float(last["forgetting/budget/met"]) == met
    assert ("NOT met" in said[-1]) == (not met)
    Path("stopping.py").write_text(STOP)
    assert ftlit(*args, "--run", "parts", "--trainer.callbacks+=stopping.Stop") == 1
    assert ftlit("fit", "--config", "whole/config.yaml", "--run", "parts", "--ckpt_path", "last") == 0
    states = [torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("whole", "parts")]
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][name]), name
    assert plain(rows("whole")) == plain(rows("parts"))
    assert json.loads(Path("whole/summary.json").read_text())


def test_the_saved_adapter_is_the_one_that_was_judged(ftlit, fit_args):
    """Validated, saved and exported are the weights after they were taken back."""
    assert ftlit(*fit_args, *BUDGET, "--run", "r") == 0
    checkpoint = torch.load("r/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    from safetensors.torch import load_file

    adapter = load_file("r/adapter/last/adapter_model.safetensors")
    assert read_config(Path("r/adapter/last"))["peft_type"] == "LORA"
    for name, tensor in checkpoint.items():
        key = "base_model.model." + name.removeprefix("policy.lm.")
        key = key if key in adapter else key + ".weight"
        assert torch.equal(tensor, adapter[key]), name
    shown = float(next(row["val/loss"] for row in reversed(rows("r")) if "val/loss" in row))
    assert ftlit("validate", "--config", "r/config.yaml", "--ckpt_path", "last") == 0
    measured = json.loads(Path("r/validate.json").read_text())["metrics"]["val/loss"]
    assert measured == pytest.approx(shown, abs=1e-5)


@pytest.mark.parametrize(("stage", "budget"), [("dpo", "0.001"), ("ppo", "0.001"), ("dpo", "9")])
def test_a_budget_holds_in_other_stages(ftlit, tiny_model_folder, tmp_path, stage, budget):
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    args = ["fit", "--config", stage, "--config", "trainer/cpu", "--model.policy", tiny_model_folder]
    args += ["--data.train", pairs, "--data.validation", "0.34", "--data.batch_size", "3", *BUDGET[:-4]]
    place = args.index("--trainer.callbacks.max_increase=0.001")
    args[place] = f"--trainer.callbacks.max_increase={budget}"
    args += ["--trainer.max_steps", "4"]
    if stage == "ppo":
        Path("mine.py").write_text(
            "def short(prompts, completions, **columns): return [-len(c) for c in completions]\n"
        )
        Path("prompts.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi there"}]}\n' * 6)
        args += ["--model.reward", "mine.short", "--model.max_new_tokens", "5", "--data.train", "prompts.jsonl"]
    assert ftlit(*args, "--run", "r", "--model.lr", "0.01") == 0, ftlit.err
    assert "texts that steered nothing" in ftlit.out
    summary = json.loads(Path("r/summary.json").read_text())
    start, end = summary["start"], summary["end"]
    assert "forgetting/budget/verdict" in end
    # Neither learns the likelihood of rows: what was kept is of the stage's own validation, of which the end is one.
    assert (0 < end["forgetting/budget/alpha"] < 1) == (budget != "9")
    key, sign = ("val/reward", 1) if stage == "ppo" else ("val/loss", -1)
    kept = sign * (end[key] - start[key])
    gain = end["forgetting/budget/gain"]
    assert f"by {key}" in ftlit.out
    assert (gain > 0) == (stage == "dpo")
    if gain > 0:
        assert kept == pytest.approx(gain * end["forgetting/budget/kept"], abs=1e-6)
        assert f"kept {end['forgetting/budget/kept']:.0%} of what was learnt" in ftlit.out
    if stage == "ppo":
        answers = [json.loads(line) for line in Path("r/rollouts.jsonl").read_text().splitlines()]
        last = [answer for answer in answers if answer["step"] == 4 and answer["set"] != "train"]
        assert len(last) == 2  # of 6 prompts
    said = [line for line in ftlit.out.splitlines() if f"{key} " in line and "step 4" in line]
    # Said once, beside the line of the end that names the best validation.
    assert len([line for line in said if not line.startswith("best ")]) == 1
