"""A run folder belongs to one run: nothing overwrites its config, nothing else trains in it, a branch has its own."""

import json
import os
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from ftlit.errors import ConfigError
from ftlit.run_folder import RunLock, origin


def config(run):
    return yaml.safe_load((Path(run) / "config.yaml").read_text())


@pytest.fixture
def begun(ftlit, fit_args):
    """A run `a` of three steps of which two are planned more."""
    assert ftlit(*fit_args, "--run", "a", "--trainer.max_steps", "3", "--trainer.max_epochs", "-1") == 0
    return [*fit_args, "--trainer.max_epochs", "-1"]


def test_a_config_that_cannot_go_on_leaves_the_run_as_it_was(ftlit, begun):
    before = Path("a/config.yaml").read_bytes()
    go_on = ("fit", "--config", "a/config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "5")
    for wrong in (
        ("--model.peft.rank", "7"),
        ("--data.train", "missing.jsonl"),
        ("--model.policy", "missing/model"),
        ("--trainer.callbacks+", "ForgettingProbe", "--trainer.callbacks.rows", "missing.jsonl"),
    ):
        assert ftlit(*go_on, *wrong) == 1
        assert Path("a/config.yaml").read_bytes() == before, wrong
    assert {path.name for path in Path("a").iterdir()} & {".lock", ".owner"} == set()
    assert ftlit(*go_on) == 0


def test_earlier_configs_are_kept_with_their_step(ftlit, begun):
    before = Path("a/config.yaml").read_bytes()
    common = ("fit", "--config", "a/config.yaml", "--ckpt_path", "last")
    assert ftlit(*common) == 0  # nothing is left to do, and nothing has changed
    assert not list(Path("a").glob("config-*"))
    assert ftlit(*common, "--trainer.max_steps", "5", "--model.lr", "0.01") == 0
    assert Path("a/config-until-step-3.yaml").read_bytes() == before
    assert config("a")["model"]["init_args"]["lr"] == 0.01
    assert len(list(Path("a").glob("config*"))) == 2


def test_another_run_folder_is_a_branch(ftlit, begun):
    kept = {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file()}
    status = ftlit(
        *("fit", "--config", "a/config.yaml", "--run", "b", "--ckpt_path", "last", "--trainer.max_steps", "5")
    )
    assert status == 0, ftlit.err
    assert "b branches from a at step 3" in ftlit.out
    assert {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file()} == kept
    assert config("b")["run"] == "b"
    assert origin(Path("b")) == {"run": str(Path("a").resolve()), "step": 3}
    summary = json.loads(Path("b/summary.json").read_text())
    assert summary["branched_from"]["step"] == 3
    assert summary["optimizer_steps"] == 5
    steps = [line.split(",")[0] for line in Path("b/metrics.csv").read_text().splitlines()[1:]]
    assert steps == ["3", "4", "5"]
    assert Path("b/adapter/last").is_dir()
    # It goes on by itself from then on.
    assert ftlit("fit", "--config", "b/config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "6") == 0
    assert "branches" not in ftlit.out
    assert json.loads(Path("b/summary.json").read_text())["optimizer_steps"] == 6
    assert json.loads(Path("a/summary.json").read_text())["optimizer_steps"] == 3


def test_a_run_in_use_is_refused(ftlit, begun):
    with FileLock("a/.lock"):
        Path("a/.owner").write_text("process 12 on node7\n")
        before = Path("a/config.yaml").read_bytes()
        assert ftlit("fit", "--config", "a/config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "5") == 1
        assert "a is in use: process 12 on node7 trains in it" in ftlit.err
        assert Path("a/config.yaml").read_bytes() == before


def test_what_a_killed_process_left_is_taken_over(tmp_path, capsys):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".owner").write_text("process 12 on node7\n")
    lock = RunLock(tmp_path / "r", "sft")
    assert "taken over: process 12 on node7, which trained in it, is gone" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
        RunLock(tmp_path / "r", "sft")
    (tmp_path / "r" / "kept").touch()
    lock.release()
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["kept"]


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20260101-120000")
    locks = [RunLock(None, "sft") for _ in range(3)]
    assert [lock.folder.name for lock in locks] == [f"sft-20260101-120000{end}" for end in ("", "-2", "-3")]
    for lock in reversed(locks):
        lock.release()
    assert not Path("runs").exists()


def test_a_command_that_fails_leaves_no_folder(ftlit, fit_args):
    assert ftlit(*fit_args, "--data.train", "missing.jsonl") == 1
    assert not Path("runs").exists()
    assert ftlit(*fit_args, "--run", "deep/er", "--data.train", "missing.jsonl") == 1
    assert not Path("deep").exists()
