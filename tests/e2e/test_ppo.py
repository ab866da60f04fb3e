"""PPO, GRPO and RLOO through the real command: shipped configs, going on, several ranks."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ftlit.data.prompts import PromptOrder
from ftlit.export.scorer import RewardScorer
from ftlit.testing import tiny_tokenizer
from ftlit.testing.tiny import CHAT_TEMPLATE, tiny_classifier

STOP = """
import lightning as L


class Stop(L.Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer, stage, batch, batch_idx):
        if trainer.global_step == self.step:
            raise FloatingPointError("stopped")
"""

REWARDS = """
def odd(prompts, completions, messages, **columns):
    assert len(prompts) == len(completions) == len(messages)
    return [sum(ord(character) % 2 for character in text) / 8 for text in completions]


def short(prompts, completions, **columns):
    return [-len(text) / 8 for text in completions]
"""


def metrics(run):
    with (Path(run) / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def saved(run, name="last"):
    return torch.load(Path(run) / f"checkpoints/{name}.ckpt", weights_only=True)


@pytest.fixture
def arguments(tmp_path, rows, tiny_model_folder):
    """A small run of one of the shipped configs: nine prompts to train on, three to validate, four a rollout."""
    (tmp_path / "rewards.py").write_text(REWARDS)

    def made(config, *more):
        return [
            *("fit", "--config", config, "--config", "peft/lora", "--config", "trainer/cpu"),
            *("--model.policy", tiny_model_folder, "--model.peft.rank", "4", "--model.lr", "0.02"),
            *("--model.reward", "rewards.odd", "--model.max_new_tokens", "6", "--data.train", rows),
            *("--data.validation", "0.25", "--data.batch_size", "4", "--trainer.max_steps", "8"),
            *("--trainer.val_check_interval", "3", "--trainer.check_val_every_n_epoch", "null"),
            *more,
        ]

    made.rows = rows
    return made


def same(first, second):
    """Two runs that left the same, bit for bit."""
    ours, theirs = saved(first), saved(second)
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, tensor in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], tensor), name
    for one, other in zip(ours["optimizer_states"], theirs["optimizer_states"], strict=True):
        for key, state in other["state"].items():
            for part, tensor in state.items():
                assert torch.equal(torch.as_tensor(one["state"][key][part]), torch.as_tensor(tensor))
    for key in ("kl_coef", "running"):
        assert ours["ppo"][key] == theirs["ppo"][key]
    clock = ("time/", "train/tokens", "train/trained")
    for one, other in zip(metrics(first), metrics(second), strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(clock)} == {
            k: v for k, v in other.items() if not k.startswith(clock)
        }
    assert Path(first, "rollouts.jsonl").read_text() == Path(second, "rollouts.jsonl").read_text()


@pytest.mark.parametrize("config", ["ppo", "grpo", "rloo"])
def test_a_shipped_config_trains_and_says_what_it_does(ftlit, arguments, config):
    assert ftlit(*arguments(config), "--run", "r") == 0, ftlit.err
    rows = metrics("r")
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert [int(row["step"]) for row in rows if "val/reward" in row] == [0, 3, 6, 8]
    named = {key for row in rows for key in row}
    assert {"objective/kl", "objective/scores", "objective/rlhf_reward", "policy/approxkl", "policy/clipfrac"} <= named
    assert {"policy/entropy", "loss/policy", "val/ratio", "answers/length", "answers/ended", "time/rollout"} <= named
    assert ("loss/value" in named) == ("val/explained_variance" in named) == (config == "ppo")
    assert rows[1]["val/ratio"] == 1.0
    assert rows[1]["objective/kl"] == 0.0
    assert "train: 9 prompts" in ftlit.out
    assert "for each rollout of 4 prompts x" in ftlit.out
    assert re.search(r"step 8/8  reward \d\.\d{4}  kl -?\d+\.\d{4}  lr ", ftlit.out)
    samples = [json.loads(line) for line in Path("r/rollouts.jsonl").read_text().split("\n") if line]
    assert {one["set"] for one in samples} == {"train", "main"}
    assert Path("r/adapter/last/adapter_model.safetensors").exists()
    assert Path("r/checkpoints/best.ckpt").exists()
    best = max((row["val/reward"], -row["step"]) for row in rows if "val/reward" in row and row["step"])
    assert saved("r", "best")["global_step"] == -best[1]
    assert ftlit("export", "r", "--to", "adapter", "--adapter") == 0, ftlit.err
    exported, kept = (load_file(f"{place}/adapter_model.safetensors") for place in ("adapter", "r/adapter/last"))
    assert exported.keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in exported.items())
    assert ftlit("validate", "--config", "r/config.yaml", "--run", "r") == 0, ftlit.err
    kept = [json.loads(line) for line in Path("r/validate-answers.jsonl").read_text().split("\n") if line]
    assert len(kept) == 3
    shown = json.loads(Path("r/validate.json").read_text())["metrics"]["val/reward"]
    assert shown == pytest.approx(sum(one["reward"] for one in kept) / 3, abs=1e-6)
    assert ftlit("test", "--config", "r/config.yaml", "--run", "r", "--data.test", arguments.rows) == 0, ftlit.err
    tested = [json.loads(line) for line in Path("r/test-answers.jsonl").read_text().split("\n") if line]
    assert len(tested) == 12
    assert {one["set"] for one in tested} == {"test"}
    assert ftlit("predict", "--config", "r/config.yaml", "--run", "r") == 1
    assert "has no rows for `ftlit predict`" in ftlit.err
    assert shown == pytest.approx(rows[-1]["val/reward"], abs=1e-6)


@pytest.mark.parametrize("config", ["ppo", "grpo", "value_model"])
def test_stopped_anywhere_and_gone_on_is_as_if_never_stopped(ftlit, arguments, tmp_path, tiny_model_folder, config):
    """Between rollouts, inside one, after its first step; with running statistics and a steered penalty."""
    shaping = ["--model.shaping.whiten", "true", "--model.shaping.clip", "2", "--model.kl.target", "0.01"]
    shaping += ["--model.kl.coef", "0.1", "--model.target_kl", "0.02", "--trainer.callbacks.every_n_steps", "1"]
    own = ["--model.value_model", tiny_model_folder, "--model.temperature", "0.7"] if config == "value_model" else []
    args = arguments("grpo" if config == "grpo" else "ppo", *shaping, *own)
    assert ftlit(*args, "--run", "whole") == 0, ftlit.err
    assert saved("whole")["ppo"]["running"]["count"] > 8
    (tmp_path / "stopping.py").write_text(STOP)
    for step in (1, 3, 4, 5):
        run = f"parts-{step}"
        stop = ["--trainer.callbacks+=stopping.Stop", f"--trainer.callbacks.step={step}"]
        assert ftlit(*args, "--run", run, *stop) == 1
        assert saved(run)["global_step"] == step
        assert ftlit("fit", "--config", "whole/config.yaml", "--run", run, "--ckpt_path", "last") == 0, ftlit.err
        same(run, "whole")


def test_null_reaches_arguments_of_arguments(ftlit, arguments):
    given = ["--model.kl.target", "null", "--model.loss.clip_high=null", "--model.value_clip", "None"]
    given += ["--model.shaping.clip=1.5", "--model.shaping.clip=None", "--trainer.max_steps", "1"]
    assert ftlit(*arguments("ppo", *given), "--run", "r") == 0, ftlit.err
    own = yaml.safe_load(Path("r/config.yaml").read_text())["model"]["init_args"]
    assert own["kl"]["target"] is own["loss"]["init_args"]["clip_high"] is own["value_clip"] is None
    assert own["shaping"]["clip"] is None
    assert own["kl"]["coef"] == 0.05


def test_another_batch_size_takes_the_prompts_that_come_next(ftlit, arguments, tmp_path):
    """And the general rows that come next beside them."""
    general = [{"messages": [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "on " * (n + 1)}]}
               for n in range(5)]  # fmt: skip
    (tmp_path / "general.jsonl").write_text("\n".join(map(json.dumps, general)))
    replay = ["--trainer.callbacks+=Replay", "--trainer.callbacks.rows=general.jsonl", "--trainer.callbacks.ratio=1.0"]
    assert ftlit(*arguments("ppo", *replay, "--trainer.max_steps", "4"), "--run", "r") == 0, ftlit.err
    first = saved("r")["ppo"]
    assert first["taken"] == 4
    trained = 2 * sum(map(len, first["rollouts"][0]["answers"]))  # two epochs
    assert first["trained"] == trained
    more = ["--ckpt_path", "last", "--trainer.max_steps", "8", "--data.batch_size", "2"]
    assert ftlit("fit", "--config", "r/config.yaml", "--run", "r", *more) == 0, ftlit.err
    second = saved("r")["ppo"]
    (present,) = second["rollouts"]
    assert second["taken"] == 6
    assert sorted(present["rows"]) == sorted(row for _, row in PromptOrder(9, 2, seed=0).rollout(4))
    assert present["trained"] == trained


def test_a_reward_model_with_a_tokenizer_of_its_own(ftlit, arguments, tmp_path):
    """Beside a function, by its class; what it says of the kept answers is what it says alone, told which were cut."""
    tiny_classifier("llama", labels=1).save_pretrained(tmp_path / "rm")
    tiny_tokenizer(CHAT_TEMPLATE.replace("assistant", "bot")).save_pretrained(tmp_path / "rm")
    both = "[{class_path: RewardScorer, init_args: {model: rm}}, rewards.short]"
    options = ["--model.reward", both, "--model.reward_weights", "[2, 0.5]", "--trainer.max_steps", "2"]
    assert ftlit(*arguments("ppo", *options), "--run", "r") == 0, ftlit.err
    kept = [json.loads(line) for line in Path("r/rollouts.jsonl").read_text().split("\n") if line]
    scorer = RewardScorer(str(tmp_path / "rm"))
    cut = [not one["ended"] for one in kept]
    assert any(cut)
    expected = scorer([one["prompt"] for one in kept], [one["answer"] for one in kept], truncated=cut)
    assert len(set(expected)) > 3
    for one, score in zip(kept, expected, strict=True):
        assert one["reward/RewardScorer"] == pytest.approx(score, abs=1e-4)
        assert one["reward"] == pytest.approx(2 * score - 0.5 * len(one["answer"]) / 8, abs=1e-3)


def start(args, folder, **env):
    return subprocess.run(
        [sys.executable, "-m", "ftlit", *args], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


def test_two_ranks_equal_one(arguments, tmp_path, tiny_model_folder):
    """Three prompts a rank and rollout less the one that is missing, answers of every length, fillers: float64."""
    common = ["--trainer.precision", "64-true", "--model.num_minibatches", "3", "--data.max_tokens", "60"]
    runs = {}
    turns = [[{"role": "user", "content": "Go"}, {"role": "assistant", "content": "on " * n}] for n in (3, 5)]
    general = [{"messages": some} for some in turns]
    (tmp_path / "general.jsonl").write_text("\n".join(map(json.dumps, general)))
    replay = ["--trainer.callbacks+=Replay", "--trainer.callbacks.rows=general.jsonl", "--trainer.callbacks.ratio=1.0"]
    for name, config, own in (
        ("ppo", "ppo", ["--model.value_model", tiny_model_folder]),
        ("grpo", "grpo", []),
        ("replay", "ppo", replay),  # in micro-batches of their own, which the values have no part in
    ):
        args = arguments(config, *common, *own)
        one = start([*args, "--run", f"{name}-one"], tmp_path)
        assert one.returncode == 0, one.stderr[-2000:]
        two = ["--config", "trainer/ddp", "--trainer.devices", "2", "--data.batch_size", "2", "--run", f"{name}-two"]
        done = start([*args, *two], tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        runs[name] = [tmp_path / f"{name}-{ranks}" for ranks in ("one", "two")]
    assert "forgetting/replay/loss" in metrics(runs["replay"][0])[-1]
    for first, second in runs.values():
        ours, theirs = saved(first), saved(second)
        assert len(theirs["ppo"]["rollouts"]) == 2
        for name, tensor in ours["state_dict"].items():
            torch.testing.assert_close(theirs["state_dict"][name], tensor, rtol=0, atol=1e-5)
        for one, other in zip(metrics(first), metrics(second), strict=True):
            for key, value in one.items():
                if not key.startswith(("time/", "train/tokens", "train/trained")):
                    assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-4), key


def test_two_ranks_go_on_in_their_own_rollout(ftlit, arguments, tmp_path):
    """Stopped inside a rollout, every rank has its own answers again; one rank alone begins the next rollout."""
    (tmp_path / "stopping.py").write_text(STOP)
    shaping = ["--model.shaping.whiten", "true", "--model.kl.target", "0.01", "--trainer.callbacks.every_n_steps", "1"]
    ranks = ["--config", "trainer/ddp", "--trainer.devices", "2", "--data.batch_size", "2"]
    args = arguments("ppo", *shaping, *ranks)
    stop = ["--trainer.callbacks+=stopping.Stop", "--trainer.callbacks.step=6"]
    for more in (["--run", "whole"], ["--run", "parts", *stop]):
        done = start([*args, *more], tmp_path)
        assert (done.returncode == 0) == (more[-1] == "whole"), done.stderr[-2000:]
    assert saved("parts")["global_step"] == 6
    both = saved("parts")["ppo"]["rollouts"]
    assert len(both) == 2
    assert both[0] != both[1]
    shutil.copytree("parts", "alone")
    again = start(["fit", "--config", "whole/config.yaml", "--run", "parts", "--ckpt_path", "last"], tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    same("parts", "whole")
    alone = ["--trainer.devices", "1", "--trainer.strategy", "auto", "--run", "alone", "--ckpt_path", "last"]
    assert ftlit("fit", "--config", "whole/config.yaml", *alone) == 0, ftlit.err
    assert "another number of ranks: the run goes on with a new rollout" in ftlit.out
    assert saved("alone")["global_step"] == 8
    (third,) = saved("alone")["ppo"]["rollouts"]
    assert third["number"] == both[0]["number"] + 1
    order = PromptOrder(9, 2, seed=0)
    assert saved("parts")["ppo"]["taken"] == saved("whole")["ppo"]["taken"] == 8
    assert saved("alone")["ppo"]["taken"] == 10
    assert sorted(third["rows"]) == sorted(row for _, row in order.rollout(8))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model.reward", "rewards.odds"], "rewards has no 'odds': did you mean 'odd'?"),
        (["--model.kl.coef", "-1"], "model.kl needs coef >= 0"),
        (["--model.advantage", "GEA"], "no Advantage class is called 'GEA': did you mean"),
        (["--model.num_generations", "9"], "PPO has no argument 'num_generations': ftlit calls it num_answers."),
        (["--model.epsilon", "0.1"], "PPO has no argument 'epsilon': ftlit calls it model.loss.clip."),
        (["--model.num_minibatches", "9"], "a rollout has 4 prompts"),
        (["--data.max_length", "3"], "none of 3 rows is a prompt within data.max_length=3 tokens"),
    ],
)
def test_mistakes_are_one_sentence(ftlit, arguments, args, says):
    assert ftlit(*arguments("ppo"), *args, "--run", "r") == 1
    lines = [line for line in ftlit.err.splitlines() if line.startswith("ftlit: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in ftlit.err
