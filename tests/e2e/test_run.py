"""The real command on a tiny model: what a run leaves behind, and what the other verbs make of it."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ftlit.export.opening import open_model
from ftlit.peft.io import read_config
from ftlit.rollout.generate import end_tokens
from ftlit.testing import tiny_tokenizer


def metrics(run):
    with (Path(run) / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def state(run, which="last"):
    return torch.load(Path(run) / "checkpoints" / f"{which}.ckpt", weights_only=True)["state_dict"]


def test_a_run_and_what_it_leaves_behind(ftlit, fit_args):
    assert ftlit(*fit_args, "--run", "r", "--trainer.max_epochs", "2") == 0
    for piece in (
        "9 rows",
        "3 rows",
        "trained tokens between",
        "⟦",
        "6 optimizer steps of 3 examples",
        "LoRA",
        "step 6/6",
    ):
        assert piece in ftlit.out
    rows = metrics("r")
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert [int(row["step"]) for row in rows if "val/loss" in row] == [0, 3, 6]
    for key in ("loss", "perplexity", "accuracy", "lr", "grad_norm", "tokens_per_s", "trained_tokens_per_s"):
        assert all(f"train/{key}" in row for row in rows[1:])
    assert rows[1]["train/perplexity"] == pytest.approx(2.718281828 ** rows[1]["train/loss"], rel=1e-4)
    summary = json.loads(Path("r/summary.json").read_text())
    assert summary["optimizer_steps"] == 6
    assert summary["end"]["val/loss"] == pytest.approx(rows[-1]["val/loss"], abs=1e-5)
    assert summary["start"]["val/loss"] == pytest.approx(rows[0]["val/loss"], abs=1e-5)
    assert summary["trained_parameters"] == sum(tensor.numel() for tensor in state("r").values())
    assert summary["changed_parameters"] == 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)
    assert Path("r/loss.png").read_bytes()[:4] == b"\x89PNG"
    for which in ("last", "best"):
        assert read_config(f"r/adapter/{which}")["r"] == 4
        assert Path(f"r/checkpoints/{which}.ckpt").exists()
    assert set(Path("r").iterdir()) == {
        Path("r") / name
        for name in ("config.yaml", "checkpoints", "adapter", "metrics.csv", "loss.png", "summary.json")
    }
    assert all("lora_" in name for name in state("r"))


def test_the_saved_config_runs_again_to_the_same_numbers(ftlit, fit_args):
    assert ftlit(*fit_args, "--run", "a") == 0
    assert ftlit("fit", "--config", "a/config.yaml") == 1
    assert "already holds a run" in ftlit.err
    assert ftlit("fit", "--config", "a/config.yaml", "--run", "b") == 0
    for name, tensor in state("a").items():
        assert torch.equal(tensor, state("b")[name])


def test_print_config_is_a_config_to_start_from(ftlit, fit_args):
    assert ftlit(*fit_args, "--print_config") == 0
    config = yaml.safe_load(ftlit.out)
    assert config["model"]["class_path"] == "ftlit.SFT"
    assert config["model"]["init_args"]["peft"]["init_args"]["rank"] == 4
    assert config["trainer"]["gradient_clip_val"] == 1.0
    Path("mine.yaml").write_text(ftlit.out)
    assert ftlit("fit", "--config", "mine.yaml", "--run", "r") == 0


@pytest.mark.parametrize("peft", ["lora", "full", "prefix_tuning", "prompt_tuning"])
@pytest.mark.parametrize(
    "extra", [[], ["--config", "trainer/gpu", "--trainer.accelerator", "cpu"]], ids=["cpu", "mixed"]
)
def test_every_shipped_strategy_runs_and_is_used(ftlit, rows, tiny_model_folder, peft, extra):
    args = ["--config", "sft", "--config", f"peft/{peft}", *extra]
    assert ftlit(
        "fit", *args, "--model.policy", tiny_model_folder, "--data.train", rows, "--data.batch_size", "4",
        "--data.validation", rows, "--trainer.max_steps", "3", "--run", "r",
    ) == 0  # fmt: skip
    losses = [row["val/loss"] for row in metrics("r") if "val/loss" in row]
    assert losses[-1] < losses[0]
    assert ftlit("generate", "r", "--prompt", "What is 3 plus 3?", "--max_new_tokens", "4") == 0
    adapter = peft != "full"
    assert ftlit("export", "r", "--to", "a", "--adapter") == (0 if adapter else 1)
    assert Path("a/adapter_config.json").exists() == adapter
    merges = peft in ("lora", "full")
    assert ftlit("export", "r", "--to", "m") == (0 if merges else 1)
    assert Path("m/model.safetensors").exists() == merges
    if not merges:
        assert "cannot be merged" in ftlit.err
        assert not Path("m").exists() or not any(Path("m").iterdir())


def test_overlays_stack(ftlit, fit_args):
    Path("more.yaml").write_text(
        "trainer:\n  callbacks+:\n    - class_path: EarlyStopping\n      init_args: {monitor: val/loss}\n"
    )
    Path("most.yaml").write_text("trainer:\n  callbacks+:\n    - class_path: LearningRateMonitor\n")
    args = [*fit_args, "--config", "logger/wandb", "--config", "more.yaml", "--config", "most.yaml"]
    assert ftlit(*args, "--run", "r", "--trainer.max_steps", "2") == 0
    config = yaml.safe_load(Path("r/config.yaml").read_text())
    kinds = [callback["class_path"].rsplit(".", 1)[-1] for callback in config["trainer"]["callbacks"]]
    assert kinds == ["SaveCheckpoint", "EarlyStopping", "LearningRateMonitor"]
    assert Path("r/checkpoints/last.ckpt").exists()
    assert list(Path("r/wandb").glob("offline-run-*/run-*.wandb"))
    assert metrics("r")


def test_the_quickstart_config(ftlit, tiny_model_folder):
    args = ["--config", "quickstart", "--model.policy", tiny_model_folder, "--trainer.max_epochs", "1"]
    assert ftlit("fit", *args, "--trainer.max_steps", "2", "--data.batch_size", "4", "--run", "r") == 0
    last = metrics("r")[-1]
    assert {"val/loss", "forgetting/own/change"} <= set(last)
    assert "You are a helpful assistant." in ftlit.out
    assert ftlit("fit", *args, "--config", "quickstart_budget", "--trainer.max_steps", "2", "--run", "budget") == 0
    assert "forgetting/budget/verdict" in metrics("budget")[-1]
    assert "{{" not in ftlit.out


@pytest.mark.parametrize("stopped", [2, 4, 6])  # inside an epoch, just after one, at the end of one; three steps each
def test_resume_is_as_if_never_stopped(ftlit, fit_args, stopped):
    options = ["--trainer.max_epochs", "3", "--model.peft.dropout", "0.1"]
    checkpoint = ["--trainer.callbacks.every_n_steps", "1"]
    assert ftlit(*fit_args, *options, *checkpoint, "--run", "whole") == 0
    Path("stop_at.py").write_text(
        "import os, lightning as L\n"
        "class StopAt(L.Callback):\n"
        "    def __init__(self, step: int = 0):\n        self.step = step\n"
        "    def on_train_batch_end(self, trainer, *args):\n"
        "        if trainer.global_step == self.step: raise KeyboardInterrupt\n"
    )
    stop = ["--trainer.callbacks+=stop_at.StopAt", f"--trainer.callbacks.step={stopped}"]
    assert ftlit(*fit_args, *options, *checkpoint, *stop, "--run", "cut") in (1, 130)
    assert torch.load("cut/checkpoints/last.ckpt", weights_only=True)["global_step"] in (stopped - 1, stopped)
    assert ftlit("fit", "--config", "whole/config.yaml", "--run", "cut", "--ckpt_path", "last") == 0
    for name, tensor in state("whole").items():
        assert torch.equal(tensor, state("cut")[name]), name
    for ours, theirs in zip(metrics("cut"), metrics("whole"), strict=True):
        for key in ("step", "train/loss", "train/grad_norm", "val/loss"):
            assert ours.get(key) == theirs.get(key)


def test_a_checkpoint_of_another_strategy_is_refused(ftlit, fit_args):
    assert ftlit(*fit_args, "--run", "a", "--trainer.max_steps", "1") == 0
    args = [*fit_args, "--model.peft.rank", "2", "--ckpt_path", "a/checkpoints/last.ckpt", "--run", "b"]
    assert ftlit(*args) == 1
    assert "does not fit this model and strategy" in ftlit.err


def test_lightnings_other_verbs(ftlit, fit_args, rows):
    assert ftlit(*fit_args, "--run", "r", "--trainer.max_epochs", "2") == 0
    before = Path("r/metrics.csv").read_bytes()
    end = metrics("r")[-1]["val/loss"]
    assert ftlit("validate", "--config", "r/config.yaml") == 0
    assert "r/checkpoints/last.ckpt" in ftlit.out
    assert f"{end:.4f}"[:5] in ftlit.out
    assert ftlit("test", "--config", "r/config.yaml", "--data.test", rows) == 0
    assert "test/loss" in ftlit.out
    args = ["--config", "r/config.yaml", "--data.predict", rows, "--model.max_new_tokens", "4"]
    assert ftlit("predict", *args) == 0
    answers = [json.loads(line) for line in Path("r/predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 12
    assert [turn["role"] for turn in answers[5]["messages"]] == ["user", "assistant"]
    assert answers[5]["messages"][0]["content"] == "What is 5 plus 5?"
    assert Path("r/metrics.csv").read_bytes() == before


def test_data_shows_what_would_be_trained_on(ftlit, rows, tiny_model_folder):
    args = ["data", "--config", "sft", "--model.policy", tiny_model_folder, "--data.train", rows, "--rows", "2"]
    assert ftlit(*args) == 0
    # Behind the line of the precision, the name of the set and the header.
    assert ftlit.out.splitlines()[3].split()[:3] == ["rows.jsonl", "12", "12"]
    assert ftlit.out.count("⟦") - ftlit.out.count("between ⟦") == 2
    assert not Path("runs").exists()


def test_models_are_used_alike_as_run_adapter_and_export(ftlit, fit_args, tiny_model_folder):
    assert ftlit(*fit_args, "--run", "r", "--trainer.max_epochs", "3", "--model.lr", "0.02") == 0
    assert ftlit("export", "r", "--to", "merged") == 0
    assert ftlit("export", "r", "--to", "merged") == 1
    assert "already holds something" in ftlit.err
    answers = []
    for args in (["r"], ["merged"], ["r/adapter/last"], ["r/adapter/last", "--base", tiny_model_folder]):
        assert ftlit("generate", *args, "--prompt", "What is 2 plus 2?", "--max_new_tokens", "6", "--json") == 0
        answers.append(ftlit.out)
    assert len(set(answers)) == 1
    assert ftlit("generate", tiny_model_folder, "--prompt", "What is 2 plus 2?", "--max_new_tokens", "6", "--json") == 0
    assert ftlit.out != answers[0]


def test_chat(ftlit, tiny_model_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/new\nAnd you?\n/quit\n"))
    assert ftlit("chat", tiny_model_folder, "--max_new_tokens", "3") == 0


def test_classes_of_files_in_the_working_directory(ftlit, fit_args, rows):
    Path("mine.py").write_text(
        "from ftlit import LoRA, RowFormat\n"
        "from ftlit.data.formats import Conversation, Message\n"
        "class MyLoRA(LoRA):\n    '''Mine.'''\n"
        "class QA(RowFormat):\n"
        "    '''Mine.'''\n"
        "    def __call__(self, row):\n"
        "        return Conversation((Message('user', row['q']), Message('assistant', row['a'])))\n"
    )
    Path("qa.jsonl").write_text('{"q": "Hi?", "a": "Yes."}\n' * 4)
    args = [
        "--model.peft",
        "mine.MyLoRA",
        "--data.train",
        "qa.jsonl",
        "--data.format",
        "mine.QA",
        "--data.validation",
        "0.25",
    ]
    assert ftlit(*fit_args, *args, "--run", "r", "--trainer.max_steps", "1") == 0
    assert "MyLoRA" in ftlit.out
    assert ftlit("generate", "r", "--prompt", "Hi?", "--max_new_tokens", "2") == 0


def test_a_class_of_ones_own_in_a_new_process(ftlit, fit_args, tmp_path):
    Path("mine.py").write_text("from ftlit import LoRA\nclass MyLoRA(LoRA):\n    '''Mine.'''\n")
    assert ftlit(*fit_args, "--model.peft", "mine.MyLoRA", "--run", "r", "--trainer.max_steps", "1") == 0
    command = [
        sys.executable,
        "-m",
        "ftlit",
        "generate",
        str(tmp_path / "r"),
        "--prompt",
        "Hi?",
        "--max_new_tokens",
        "2",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    away = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert away.returncode == 0, away.stderr  # it is looked for where the run was begun
    assert away.stdout == done.stdout
    Path("mine.py").unlink()
    away = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert away.returncode == 1
    assert "is its file in the working directory?" in away.stderr.replace("\n", " ")


def test_what_a_run_is_used_with(ftlit, fit_args, monkeypatch):
    """The last checkpoint unless the best is asked for, and the system turn it was trained with, filled in."""
    args = ["--data.system", "You are {{name}}.", "--data.fill", "{name: Nova}", "--model.lr", "0.5"]
    assert ftlit(*fit_args, *args, "--run", "r", "--trainer.max_epochs", "4") == 0
    best = torch.load("r/checkpoints/best.ckpt", weights_only=True)
    best["state_dict"] = {name: tensor + 1 for name, tensor in best["state_dict"].items()}
    torch.save(best, "r/checkpoints/best.ckpt")
    for which in ("last", "best"):
        opened = open_model("r", which=which)
        trained = opened.strategy.trained(opened.lm)
        assert all(torch.equal(trained[k.removeprefix("policy.lm.")], v) for k, v in state("r", which).items())
    assert not all(torch.equal(v, state("r", "best")[k]) for k, v in state("r").items())
    assert opened.system == "You are Nova."
    seen = []
    monkeypatch.setattr(
        "ftlit.data.templating.ChatTemplate.prompt_ids", lambda self, turns, *more: seen.append(tuple(turns)) or [5, 6]
    )
    for extra in ([], ["--system", "Else."], ["--system", ""]):
        assert ftlit("generate", "r", "--prompt", "Hi", "--max_new_tokens", "1", *extra) == 0
    first = [(turns[0].role, turns[0].content) for turns in seen]
    assert first == [("system", "You are Nova."), ("system", "Else."), ("user", "Hi")]


def test_a_run_can_be_used_from_any_folder(ftlit, fit_args, tiny_model_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_model_folder, "model")
    assert ftlit(*fit_args, "--model.policy", "model", "--run", "r", "--trainer.max_steps", "1") == 0
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    assert ftlit("generate", tmp_path / "r", "--prompt", "Hi", "--max_new_tokens", "1") == 0


def test_the_config_of_a_run_serves_every_verb(ftlit, fit_args):
    assert ftlit(*fit_args, "--run", "r") == 0
    assert ftlit("data", "--config", "r/config.yaml") == 0
    assert ["rows.jsonl", "9", "9"] in [line.split()[:3] for line in ftlit.out.splitlines()]


def test_a_resumed_run_counts_what_came_before(ftlit, fit_args):
    assert ftlit(*fit_args, "--run", "whole", "--trainer.max_epochs", "2") == 0
    assert ftlit(*fit_args, "--run", "r") == 0
    again = ["fit", "--config", "r/config.yaml", "--ckpt_path", "last"]
    best = torch.load("r/checkpoints/last.ckpt", weights_only=True)["callbacks"]["SaveAdapter"]["best"]
    assert best == pytest.approx(metrics("r")[-1]["val/loss"], abs=1e-4)
    assert ftlit(*again, "--trainer.max_epochs", "2") == 0
    whole, parts = (json.loads(Path(run, "summary.json").read_text()) for run in ("whole", "r"))
    for key in ("optimizer_steps", "tokens", "trained_tokens", "start"):
        assert parts[key] == whole[key]
    assert yaml.safe_load(Path("r/config.yaml").read_text())["ckpt_path"] is None
    before = Path("r/summary.json").read_bytes()
    assert ftlit(*again, "--trainer.max_epochs", "2") == 0
    assert "nothing was left to train" in ftlit.out
    assert Path("r/summary.json").read_bytes() == before


def test_a_worse_validation_after_a_resume_does_not_become_the_best(ftlit, fit_args):
    assert ftlit(*fit_args, "--run", "r") == 0
    best = Path("r/adapter/best/adapter_model.safetensors").read_bytes()
    args = ["--ckpt_path", "last", "--trainer.max_epochs", "2"]
    checkpoint = torch.load("r/checkpoints/last.ckpt", weights_only=True)
    checkpoint["callbacks"]["SaveAdapter"]["best"] = 0.0  # nothing that follows can be better
    torch.save(checkpoint, "r/checkpoints/last.ckpt")
    assert ftlit("fit", "--config", "r/config.yaml", *args) == 0
    assert Path("r/adapter/best/adapter_model.safetensors").read_bytes() == best


def test_broken_runs_say_what_is_broken(ftlit, fit_args):
    assert ftlit(*fit_args, "--run", "r") == 0
    whole = Path("r/checkpoints/last.ckpt").read_bytes()
    for spoilt in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        Path("r/checkpoints/last.ckpt").write_bytes(spoilt)
        for args in (["generate", "r", "--prompt", "Hi"], ["fit", "--config", "r/config.yaml", "--ckpt_path", "last"]):
            assert ftlit(*args) == 1
            assert "is torn, or not a checkpoint" in ftlit.err
            assert "Traceback" not in ftlit.err
    for text in ("model: [", "a: 1", "3", ""):
        Path("r/config.yaml").write_text(text)
        assert ftlit("generate", "r", "--prompt", "Hi") == 1
        assert "torn, or not the config of an ftlit run" in ftlit.err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["generate"], "the following arguments are required: model"),
        (["generate", "MODEL"], "give --prompt TEXT or --prompts FILE"),
        (["generate", "MODEL", "--prompt", "Hi", "--max_new_tokens", "0"], "must be at least 1, got 0"),
        (["generate", "MODEL", "--prompt", "Hi", "--temperature", "-1"], "must not be negative"),
        (["generate", "MODEL", "--prompt", "Hi", "--top_p", "2"], "must be in (0, 1]"),
        (["generate", "MODEL", "--prompts", "nope.txt"], "nope.txt does not exist"),
        (["generate", "MODEL", "--prompts", "latin.txt"], "is not valid UTF-8"),
        (["generate", "./nope", "--prompt", "Hi"], "model ./nope does not exist"),
        (["generate", "MODEL", "--base", "x", "--prompt", "Hi"], "--base goes with a run or an adapter folder"),
        (["export", "MODEL", "--to", "out", "--adapter"], "a base model has no adapter"),
    ],
)
def test_mistakes_with_models_are_one_sentence(ftlit, tiny_model_folder, args, says):
    Path("latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    assert ftlit(*[tiny_model_folder if a == "MODEL" else a for a in args]) == 1
    assert says in ftlit.err
    assert "Traceback" not in ftlit.err
    assert len([line for line in ftlit.err.splitlines() if line.startswith("ftlit: ")]) == 1


def test_answers_end_where_the_template_ends_them(ftlit, rows, tiny_model_folder, tmp_path):
    """A base model whose tokenizer ends with another token than the chat template it is trained with."""
    tokenizer = tiny_tokenizer()
    template, tokenizer.eos_token, tokenizer.chat_template = tokenizer.chat_template, "<|endoftext|>", None
    shutil.copytree(tiny_model_folder, "base")
    tokenizer.save_pretrained("base")
    Path("base/chat_template.jinja").unlink(missing_ok=True)
    Path("base/generation_config.json").unlink(missing_ok=True)
    Path("chatml.jinja").write_text(template)
    args = ["--config", "sft", "--config", "peft/full", "--model.policy", "base", "--data.train", rows]
    assert ftlit("fit", *args, "--run", "a", "--trainer.max_steps", "1") == 0
    assert "has no chat template, so the plain one is used" in ftlit.out
    plain = open_model("a")
    assert "### Assistant:" in plain.tokenizer.chat_template
    assert plain.tokenizer.convert_tokens_to_ids("<|endoftext|>") in end_tokens(plain.lm, plain.tokenizer)
    extra = ["--data.chat_template", "chatml.jinja", "--run", "r", "--trainer.max_steps", "1"]
    assert ftlit("fit", *args, *extra) == 0
    opened = open_model("r")
    end = opened.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in end_tokens(opened.lm, opened.tokenizer)
    assert ftlit("export", "r", "--to", "m") == 0
    assert end in json.loads(Path("m/generation_config.json").read_text())["eos_token_id"]


def test_seeds(ftlit, fit_args):
    for run, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        args = ["--seed_everything", seed, "--run", run, "--trainer.max_steps", "2"]
        assert ftlit(*fit_args, *args) == 0
    name = next(name for name in state("a") if "lora_A" in name)
    assert torch.equal(state("a")[name], state("b")[name])
    assert not torch.equal(state("a")[name], state("c")[name])
