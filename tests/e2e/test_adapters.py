"""Adapter folders, exports and checkpoints hold what they need, and are whole or not there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ftlit.export.opening import open_model
from ftlit.export.writing import settle_generation, write_model
from ftlit.testing import tiny_lm

from .test_dpo import write_pairs

OTHER = (
    "{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


@pytest.fixture
def run(ftlit, fit_args):
    """A run with a template and a system turn of its own."""
    Path("other.jinja").write_text(OTHER)
    extra = ["--data.chat_template", "other.jinja", "--data.system", "You are {{name}}.", "--data.fill", "{name: Nova}"]
    assert ftlit(*fit_args, *extra, "--run", "r", "--trainer.max_steps", "1") == 0
    return ftlit


def test_an_adapter_is_opened_with_its_own_template_and_system_turn(run):
    for which in ("last", "best"):
        opened = open_model(f"r/adapter/{which}")
        assert opened.tokenizer.chat_template == OTHER
        assert opened.system == "You are Nova."
    assert AutoTokenizer.from_pretrained("r/adapter/last").chat_template == OTHER
    assert run("export", "r", "--to", "a", "--adapter") == 0
    assert run("export", "r/adapter/best", "--to", "b", "--adapter") == 0
    assert run("export", "r", "--to", "m") == 0
    assert run("export", "a", "--to", "n") == 0
    for folder in ("a", "b", "m", "n"):
        opened = open_model(folder)
        assert (opened.tokenizer.chat_template, opened.system) == (OTHER, "You are Nova."), folder


def test_a_template_beside_an_adapter_without_a_tokenizer_counts(run):
    for file in Path("r/adapter/last").glob("tokenizer*"):
        file.unlink()
    assert open_model("r/adapter/last").tokenizer.chat_template == OTHER


def test_a_run_goes_on_with_the_template_of_the_adapter(run, fit_args):
    settings = ["--model.peft.from_adapter", "r/adapter/last", "--run", "s", "--trainer.max_steps", "1"]
    assert run(*fit_args, *settings) == 0
    assert "[assistant] " in run.out
    assert open_model("s").tokenizer.chat_template == OTHER
    assert open_model("s/adapter/last").tokenizer.chat_template == OTHER


# ---- the adapter that a run began with ------------------------------------------------------------------------------


@pytest.fixture
def second(ftlit, fit_args, tiny_model_folder):
    """A DPO run that goes on from the adapter of another, and has three steps before it."""
    pairs = write_pairs(Path("pairs.jsonl"))
    assert ftlit(*fit_args, "--run", "first", "--trainer.max_steps", "2", "--model.lr", "0.05") == 0
    args = ["fit", "--config", "dpo", "--config", "trainer/cpu", "--model.policy", tiny_model_folder]
    args += ["--data.train", pairs, "--data.validation", "0.25", "--data.batch_size", "3", "--model.lr", "0.01"]
    args += [
        "--model.peft.rank",
        "4",
        "--model.peft.from_adapter",
        "first/adapter/last",
        "--model.schedule",
        "constant",
    ]
    assert ftlit(*args, "--run", "whole", "--trainer.max_steps", "3") == 0
    assert ftlit(*args, "--run", "r", "--trainer.max_steps", "1") == 0
    return ftlit


def weights(run):
    return torch.load(Path(run) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def spoil(folder):
    """Another adapter in the place of one."""
    path = Path(folder) / "adapter_model.safetensors"
    save_file({name: tensor + 1.0 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def remove(folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize("change", [spoil, remove])
def test_its_start_stays_what_it_was(second, change):
    """The reference of DPO was another one after the folder had been written over, without a word."""
    config = yaml.safe_load(Path("r/config.yaml").read_text())
    assert config["model"]["init_args"]["peft"]["init_args"]["from_adapter"] == str(
        Path("first/adapter/last").resolve()
    )
    change("first/adapter/last")
    assert second("fit", "--config", "r/config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "3") == 0
    for name, tensor in weights("whole").items():
        assert torch.equal(tensor, weights("r")[name])
    assert second("validate", "--config", "r/config.yaml") == 0
    loss = json.loads(Path("r/validate.json").read_text())["metrics"]["val/loss"]
    assert loss == pytest.approx(json.loads(Path("whole/summary.json").read_text())["end"]["val/loss"], abs=1e-6)
    assert second("generate", "r", "--prompt", "Hi", "--max_new_tokens", "2") == 0
    assert second("export", "r", "--to", "a", "--adapter") == 0


def test_another_base_model_is_said(ftlit, fit_args, tiny_model_folder):
    shutil.copytree(tiny_model_folder, "model")
    args = [*fit_args, "--model.policy", "model", "--run", "r"]
    assert ftlit(*args, "--trainer.max_steps", "1") == 0
    on = ["--ckpt_path", "last", "--trainer.max_steps", "2", "--model.schedule", "constant"]
    assert ftlit(*args, *on) == 0
    assert "base model is not the one" not in ftlit.out
    tiny_lm("llama", seed=5).save_pretrained("model")
    assert ftlit(*args, *on, "--trainer.max_steps", "3") == 0
    assert "note       the base model is not the one that the run began with" in ftlit.out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--model.peft.alpha", "40"], "trained with a scale of 4, and this config says 10"),
        (["--model.peft.rslora", "true"], "trained with a scale of 4, and this config says 8"),
        (["--model.peft.alpha_pattern", "{q_proj: 4}"], "trained with a scale of 4, and this config says 4, model.lay"),
    ],
)
def test_another_scale_is_refused(ftlit, fit_args, change, says):
    args = [*fit_args, "--model.peft.alpha", "16", "--run", "r"]
    assert ftlit(*args, "--trainer.max_steps", "1") == 0
    assert ftlit(*args, *change, "--ckpt_path", "last", "--trainer.max_steps", "2") == 1
    assert says in ftlit.err
    assert "Traceback" not in ftlit.err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--trainer.max_steps", "8"], "another schedule (steps 4 -> 8): the rate of the next step is"),
        (["--model.lr", "0.5"], "another schedule (lr 0.0002 -> 0.5)"),
        (["--model.schedule", "constant"], "another schedule (schedule cosine -> constant)"),
        (["--trainer.max_steps", "4"], None),
    ],
)
def test_another_schedule_is_said(ftlit, fit_args, change, says):
    stop = (
        "import lightning as L\n\n\nclass Stop(L.Callback):\n"
        "    def on_train_batch_start(self, trainer, *args):\n"
        "        if trainer.global_step == 2: raise FloatingPointError('stopped')\n"
    )
    Path("stopping.py").write_text(stop)
    args = [*fit_args, "--trainer.max_steps", "4", "--trainer.max_epochs", "-1", "--run", "r"]
    every = ["--trainer.callbacks.every_n_steps", "1", "--trainer.callbacks+=stopping.Stop"]
    assert ftlit(*args, *every) == 1
    assert ftlit(*args, *change, "--ckpt_path", "last") == 0
    assert (says or "note       another schedule") in ftlit.out or says is None
    assert (says is not None) == ("another schedule" in ftlit.out)


# ---- a config from anywhere -----------------------------------------------------------------------------------------

MINE = """
from ftlit import LoRA


class Mine(LoRA):
    pass


def check(prompts, completions, **columns):
    return [1.0 for _ in prompts]
"""


def test_the_config_of_a_run_opens_all_it_names_from_anywhere(ftlit, rows, tiny_model_folder, tmp_path, monkeypatch):
    """Rows of every set, a template, a probe's documents, a verifier and a strategy in a file of one's own."""
    shutil.copytree(tiny_model_folder, "model")
    shutil.copy(rows, "held.jsonl")
    Path("mine_here.py").write_text(MINE)
    Path("other.jinja").write_text(OTHER)
    probe = {"domains": {"kept": "held.jsonl"}}
    asked = {"rows": "held.jsonl", "max_new_tokens": 2, "num_rows": 2, "verifier": "mine_here.check"}
    callbacks = [{"class_path": "ForgettingProbe", "init_args": probe}]
    callbacks += [{"class_path": "GenerationEval", "init_args": asked}]
    Path("more.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": callbacks}}))
    args = ["--config", "sft", "--config", "trainer/cpu", "--config", "more.yaml", "--model.policy", "model"]
    args += ["--data.train", "{rows.jsonl: 2, held.jsonl: 1}", "--data.validation", "{main: held.jsonl}"]
    args += ["--data.test", "held.jsonl", "--data.chat_template", "other.jinja", "--model.peft", "mine_here.Mine"]
    assert ftlit("fit", *args, "--run", "runs/r", "--trainer.max_steps", "1") == 0
    measured = json.loads(Path("runs/r/summary.json").read_text())["end"]
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    import sys

    monkeypatch.setattr(sys, "path", [one for one in sys.path if one != str(tmp_path)])
    sys.modules.pop("mine_here", None)
    assert ftlit("validate", "--config", "../runs/r/config.yaml") == 0
    assert "last.ckpt" in ftlit.out  # the weights of the run, and not those of the start
    now = json.loads((tmp_path / "runs/r/validate.json").read_text())["metrics"]
    assert now["val/loss"] == pytest.approx(measured["val/loss"], abs=1e-6)
    assert ftlit("test", "--config", "../runs/r/config.yaml") == 0
    assert ftlit("data", "--config", "../runs/r/config.yaml") == 0
    assert ftlit("generate", "../runs/r", "--prompt", "Hi", "--max_new_tokens", "1") == 0
    on = ["--ckpt_path", "last", "--trainer.max_steps", "2"]
    assert ftlit("fit", "--config", "../runs/r/config.yaml", *on) == 0
    assert not list(Path().iterdir())
    shutil.copytree("../runs/r", "../copied")
    assert ftlit("validate", "--config", "../copied/config.yaml") == 0
    assert "copied/checkpoints/last.ckpt" in ftlit.out


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("a.jsonl", "HERE/a.jsonl"),
        ("folder:test", "HERE/folder:test"),
        (["a.jsonl", "org/name"], ["HERE/a.jsonl", "org/name"]),
        ({"a.jsonl": 3, "org/name": 1}, {"HERE/a.jsonl": 3, "org/name": 1}),
        ({"main": 0.1, "code": "a.jsonl"}, {"main": 0.1, "code": "HERE/a.jsonl"}),
        ("sample:general", "sample:general"),
        ("org/name:train", "org/name:train"),
        ("0.1", "0.1"),
        ("{{ messages }}", "{{ messages }}"),
    ],
)
def test_relative_paths_become_whole_ones(given, kept, tmp_path, monkeypatch):
    from jsonargparse import Namespace

    from ftlit.run_config import absolute

    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").touch()
    Path("folder").mkdir()
    Path("Messages").mkdir()
    config = Namespace(data=Namespace(init_args=Namespace(train=given, format="Messages", validation=given)))
    found = absolute(config).data.init_args
    expected = json.loads(json.dumps(kept).replace("HERE", str(tmp_path)))
    assert (found.train, found.validation, found.format) == (expected, expected, "Messages")
    assert config.data.init_args.train == given


# ---- exports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": False, "top_k": 20}, {"do_sample": True, "top_k": 20}),
        ({"do_sample": False, "min_p": 0.1}, {"do_sample": True, "min_p": 0.1}),
        ({"num_return_sequences": 3}, {}),
        ({"early_stopping": True, "num_beams": 1, "length_penalty": 2.0}, {}),
    ],
)
def test_a_generation_config_that_contradicts_itself_is_settled(settings, kept, tiny_model_folder, tmp_path, capsys):
    opened = open_model(tiny_model_folder)
    for key, value in settings.items():
        setattr(opened.lm.generation_config, key, value)
    write_model(opened, tmp_path / "m")
    written = json.loads((tmp_path / "m/generation_config.json").read_text())
    assert {key: written[key] for key in kept} == kept
    assert written["eos_token_id"] == [2]
    if kept:
        assert "do_sample: false" in capsys.readouterr().out
    assert open_model(str(tmp_path / "m")).lm.generation_config is not None


def test_a_sound_generation_config_is_left_alone(capsys):
    lm = tiny_lm()
    lm.generation_config.do_sample, lm.generation_config.temperature = True, 0.7
    before = lm.generation_config.to_dict()
    settle_generation(lm)
    assert lm.generation_config.to_dict() == before
    assert not capsys.readouterr().out


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("torn"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("there", [False, True])
def test_an_export_that_fails_leaves_nothing(run, monkeypatch, adapter, error, there):
    def fails(*args, **kwargs):
        raise error

    if there:
        Path("m").mkdir()
    before = set(Path().iterdir())
    monkeypatch.setattr("ftlit.export.writing.write_beside", fails)
    assert run("export", "r", "--to", "m", *(["--adapter"] if adapter else [])) == 1
    assert "Traceback" not in run.err
    assert "othing was written" in run.err
    assert set(Path().iterdir()) == before
    assert not there or not list(Path("m").iterdir())
    monkeypatch.undo()
