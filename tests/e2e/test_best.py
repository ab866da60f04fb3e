"""What is best, kept, uploaded and reported, through the real command."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from .test_dpo import write_pairs
from .test_ppo import REWARDS

# What a run says it will log, and what it did log.
NAMES = """
import json
import lightning as L
from ftlit.callbacks.monitor import logged_at_validations


class Names(L.Callback):
    def on_train_end(self, trainer, stage):
        found = {
            "validations": logged_at_validations(trainer),
            "steps": stage.step_names,
            "logged": sorted(set(trainer.callback_metrics) - {"step", "epoch"}),
        }
        open("names.json", "w").write(json.dumps(found))
"""

# The first answers are the best: from then on the reward falls.
FALLING = """
calls = []

def falls(prompts, completions, **columns):
    calls.append(len(prompts))
    return [-float(len(calls)) for _ in prompts]
"""


def metrics(run):
    with (Path(run) / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def measured(run, key):
    """Values of a metric at the validations while training, by step."""
    return {int(row["step"]): row[key] for row in metrics(run) if key in row and row["step"]}


def checkpoint(run, name="best"):
    return torch.load(Path(run) / f"checkpoints/{name}.ckpt", weights_only=True)


def adapter_is(run, name="best"):
    """Whether `adapter/best` holds the weights of a checkpoint."""
    ours = load_file(Path(run) / "adapter/best/adapter_model.safetensors")
    theirs = {k: v for k, v in checkpoint(run, name)["state_dict"].items() if k.startswith("policy.lm.")}
    return sorted(float(one.double().sum()) for one in ours.values()) == pytest.approx(
        sorted(float(one.double().sum()) for one in theirs.values())
    )


@pytest.fixture
def ppo(tmp_path, rows, tiny_model_folder):
    (tmp_path / "rewards.py").write_text(REWARDS + FALLING)
    return [
        *("fit", "--config", "ppo", "--config", "trainer/cpu", "--model.policy", tiny_model_folder),
        *("--model.peft", "LoRA", "--model.reward", "rewards.falls", "--data.train", rows, "--data.validation", "0.25"),
        *("--data.batch_size", "4", "--model.max_new_tokens", "4", "--trainer.max_steps", "8"),
        *("--trainer.val_check_interval", "4", "--run", "r"),
    ]


def test_ppo_keeps_the_largest_reward_everywhere(ftlit, ppo):
    """`adapter/best` was the worst: the largest reward is the first, and the adapter kept the last."""
    assert ftlit(*ppo) == 0
    rewards = measured("r", "val/reward")
    best = max(rewards, key=rewards.get)
    assert best == min(rewards)
    assert checkpoint("r")["global_step"] == best
    assert adapter_is("r")
    summary = json.loads(Path("r/summary.json").read_text())["best"]
    assert summary == {"monitor": "val/reward", "mode": "max", "value": pytest.approx(rewards[best]), "step": best}
    assert f"after step {best} (larger is better)" in ftlit.out


def keep(**settings):
    """A config whose only callback is `SaveCheckpoint`, so settings."""
    callbacks = [{"class_path": "SaveCheckpoint", "init_args": settings}]
    Path("keep.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    return ["--config", "keep.yaml"]


SHAKEN = ["--model.lr", "0.5", "--trainer.max_epochs", "3", "--trainer.val_check_interval", "1", "--run", "r"]
GEN = ["--trainer.callbacks+=GenerationEval", "--trainer.callbacks.max_new_tokens=4"]


@pytest.mark.parametrize(
    ("key", "mode", "best"),
    [
        ("val/accuracy", None, max),
        ("val/perplexity", None, min),
        ("gen/length", "min", min),
        ("gen/rouge_1", None, max),
    ],
)
def test_the_best_by_any_metric(ftlit, fit_args, key, mode, best):
    """Nine validations at a rate that shakes; the three best are kept, the best under its name too."""
    extra = keep(monitor=key, save_top_k=3, **({"mode": mode} if mode else {}))
    assert ftlit(*fit_args, *SHAKEN, *extra, *(GEN if key.startswith("gen") else [])) == 0
    values = {step: value for step, value in measured("r", key).items() if step}
    top = best(values.values())
    first = min(step for step, value in values.items() if value == top)
    assert checkpoint("r")["global_step"] == first
    assert adapter_is("r")
    kept = sorted(path.stem for path in Path("r/checkpoints").glob("step-*.ckpt"))
    assert len(kept) == 3
    assert f"step-{first:06d}" in kept
    assert f"best       {key}" in ftlit.out


def test_a_misspelt_monitor_costs_nothing(ftlit, fit_args):
    for name, near in (
        ("val/acuracy", "val/accuracy"),
        ("val_loss", "val/loss"),
        ("eval/perplexity", "val/perplexity"),
    ):
        assert ftlit(*fit_args, *keep(monitor=name), "--run", "r") == 1
        assert f"did you mean '{near}'" in ftlit.err
        assert "Traceback" not in ftlit.err
        assert "step 1" not in ftlit.out
        assert not Path("r/metrics.csv").exists()


def test_an_early_stop_on_a_metric_that_should_grow(ftlit, ppo):
    """The reward falls from the second validation on; patience 1 ends the run there."""
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/reward"]
    assert ftlit(*ppo, *stop, "--trainer.callbacks.patience=1", "--trainer.max_steps", "40") == 0
    assert "EarlyStopping watches val/reward: larger is better" in ftlit.out
    assert max(measured("r", "val/reward")) == 8


def test_lightnings_own_checkpoint_decides_where_there_is_no_other(ftlit, fit_args):
    own = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/accuracy", "filename": "mine"}}
    Path("own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [own]}}))
    assert ftlit(*fit_args, *SHAKEN, "--config", "own.yaml", "--trainer.val_check_interval", "1.0") == 0
    values = {step: value for step, value in measured("r", "val/accuracy").items() if step}
    first = min(step for step, value in values.items() if value == max(values.values()))
    assert checkpoint("r", "mine")["global_step"] == first
    assert adapter_is("r", "mine")


def test_a_run_without_validation_says_that_it_kept_an_adapter(ftlit, rows, tiny_model_folder):
    args = ["--config", "sft", "--config", "trainer/cpu", "--config", "peft/lora", "--model.policy", tiny_model_folder]
    assert ftlit("fit", *args, "--data.train", rows, "--trainer.max_steps", "1", "--run", "r") == 0
    assert "adapter/" in next(line for line in ftlit.out.splitlines() if line.startswith("kept in"))
    assert not list(Path("r/adapter").glob("best"))
    assert json.loads(Path("r/summary.json").read_text())["best"] is None
    assert ftlit("fit", *args, "--data.train", rows, *keep(monitor="val/accuracy"), "--run", "q") == 1
    assert "this run has none" in ftlit.err


def test_the_last_checkpoint_is_that_of_every_validation(ftlit, fit_args):
    """Not only of those that were one of the best."""
    watch = (
        "import lightning as L\nimport torch\n\n\nclass Watch(L.Callback):\n"
        "    def on_train_batch_start(self, trainer, *args):\n"
        "        if trainer.global_step:\n"
        "            last = torch.load('r/checkpoints/last.ckpt', weights_only=True)\n"
        "            print('last is of step', last['global_step'], 'at', trainer.global_step)\n"
    )
    Path("watch.py").write_text(watch)
    assert ftlit(*fit_args, *SHAKEN, "--trainer.callbacks+=watch.Watch") == 0
    said = [line.split() for line in ftlit.out.splitlines() if line.startswith("last is of step")]
    assert len(said) == 8
    assert all(line[4] == line[6] for line in said)


STAGES = {
    "sft": ["--config", "sft", "--config", "peft/lora", "--data.train", "ROWS"],
    "dpo": ["--config", "dpo", "--data.train", "PAIRS"],
    "reward": ["--config", "reward", "--data.train", "PAIRS"],
    "classification": ["--config", "classification", "--data.train", "LABELS"],
    "ppo": [
        "--config",
        "ppo",
        "--model.reward",
        "rewards.falls",
        "--model.max_new_tokens",
        "4",
        "--data.train",
        "ROWS",
    ],
    "grpo": [
        *("--config", "grpo", "--model.reward", "[rewards.odd, rewards.short]", "--model.max_new_tokens", "4"),
        *("--data.train", "ROWS"),
    ],
}


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_what_will_be_logged_is_what_is_logged(ftlit, rows, tiny_model_folder, stage):
    """Names that are known at the start are all there are, so a misspelt one can be told then."""
    Path("names.py").write_text(NAMES)
    Path("rewards.py").write_text(REWARDS + FALLING)
    labels = "".join(f"text {number},{'ab'[number % 2]}\n" for number in range(12))
    Path("labels.csv").write_text(f"text,label\n{labels}")
    files = {"ROWS": rows, "PAIRS": write_pairs(Path("pairs.jsonl")), "LABELS": "labels.csv"}
    args = [files.get(arg, arg) for arg in STAGES[stage]]
    more = ["--trainer.callbacks+=names.Names"]
    if stage in ("sft", "dpo"):
        more += ["--config", "forgetting/probe", "--config", "forgetting/replay", "--config", "forgetting/l2_to_init"]
        probe = {"domains": {"own": "self"}, "own_rows": 2, "own_new_tokens": 4}
        replay = {"num_rows": 4, "max_new_tokens": 4, "ratio": 1.0}
        callbacks = [
            {"class_path": "ForgettingProbe", "init_args": probe},
            {"class_path": "Replay", "init_args": replay},
        ]
        callbacks += [{"class_path": "L2ToInit", "init_args": {"mode": "coupled"}}, {"class_path": "names.Names"}]
        callbacks += [{"class_path": "GenerationEval", "init_args": {"max_new_tokens": 4}}] if stage == "sft" else []
        Path("more.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": callbacks}}))
        more = ["--config", "more.yaml"]
    assert ftlit(
        "fit", "--config", "trainer/cpu", *args, *more, "--model.policy", tiny_model_folder, "--data.validation",
        "0.25", "--data.batch_size", "4", "--trainer.max_steps", "2", "--run", "r",
    ) == 0  # fmt: skip
    names = json.loads(Path("names.json").read_text())
    assert sorted({*names["validations"], *names["steps"]}) == names["logged"]
    assert not set(names["validations"]) & set(names["steps"])
