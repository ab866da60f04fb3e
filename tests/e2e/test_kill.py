"""A run that is killed, asked to stop, or out of space goes on as if nothing had happened."""

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from .conftest import fit_options, write_rows

pytestmark = pytest.mark.xdist_group("kill")

SAVES = 2  # a checkpoint every so many steps; a validation after steps 3, 6, 9

# A class for --trainer.callbacks that kills its own process at an exact place.
KILLER = '''
import os, signal, time
import lightning as L
import torch

class Kill(L.Callback):
    """Ends the process `at` a place, in or after optimizer step `step`; `rank` -1: whichever comes there."""

    def __init__(self, at: str, step: int = 1, rank: int = -1, by: str = "SIGKILL") -> None:
        self.at, self.step, self.rank, self.by = at, step, rank, getattr(signal, by)

    def now(self, at, trainer):
        here = trainer.global_step + (at in ("batch", "micro", "optimizer"))
        if at == self.at and here >= self.step and self.rank in (-1, trainer.global_rank):
            self.at = ""
            os.kill(os.getpid(), self.by)
            if self.by == signal.SIGKILL:
                time.sleep(60)

    def setup(self, trainer, stage_, stage):
        if self.at == "setup":
            self.step = 0
            self.now("setup", trainer)
        backward, replace, save = trainer.strategy.backward, os.replace, torch.save
        self.backwards = 0
        def counting(*args, **kwargs):
            self.backwards += 1
            backward(*args, **kwargs)
            if self.backwards % 2:
                self.now("micro", trainer)
        trainer.strategy.backward = counting
        def half(checkpoint, file, *args, **kwargs):
            if self.at == "writing" and trainer.global_step >= self.step:
                save({"torn": torch.zeros(1000)}, file)
                file.flush()
                self.now("writing", trainer)
            save(checkpoint, file, *args, **kwargs)
        torch.save = half
        def renaming(source, target):
            mine = str(target).endswith((".ckpt", "metrics.csv"))
            if mine:
                self.now("before_rename", trainer)
            replace(source, target)
            if mine:
                self.now("after_rename", trainer)
        os.replace = renaming

    def on_train_batch_start(self, trainer, *args): self.now("batch", trainer)
    def on_before_optimizer_step(self, trainer, *args): self.now("optimizer", trainer)
    def on_train_batch_end(self, trainer, *args): self.now("batch_end", trainer)
    def on_validation_batch_end(self, trainer, *args): self.now("validation", trainer)
    def on_validation_end(self, trainer, *args): self.now("validation_end", trainer)
    def on_train_epoch_end(self, trainer, *args): self.now("epoch_end", trainer)
    def on_train_end(self, trainer, *args): self.now("train_end", trainer)
'''


@pytest.fixture(scope="module")
def options(tmp_path_factory, tiny_model_folder):
    """The settings of all runs of this file."""
    return fit_options(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl"), tiny_model_folder)


@pytest.fixture
def command(options, tmp_path):
    (tmp_path / "killer.py").write_text(KILLER)
    return [
        sys.executable, "-m", "ftlit", *options, "--trainer.max_epochs", "3", "--model.peft.dropout", "0.1",
        "--data.max_tokens", "120", "--trainer.callbacks.every_n_steps", str(SAVES), "--model.lr", "0.01",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """What a command leaves behind when nothing happens to it; each is run once."""
    known = {}

    def result(command):
        key = tuple(command)
        if key not in known:
            folder = tmp_path_factory.mktemp("whole")
            run([*command, "--run", "whole"], folder)
            known[key] = what(folder / "whole")
        return known[key]

    return result


def start(command, folder, **more):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process, timeout=240):
    """Waits for a run; whatever ranks it leaves behind are ended, as the machine it died on would."""
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        pytest.fail(f"the run hangs:\n{out[-2000:]}")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out


def run(command, folder):
    status, out = end(start(command, folder))
    assert status == 0, out[-3000:]
    return out


def what(run):
    """Everything of a run that must not depend on where it was stopped."""
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    with (run / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if v and not k.endswith("tokens_per_s")} for row in csv.DictReader(file)]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "step": last["global_step"], "weights": last["state_dict"], "optimizer": last["optimizer_states"],
        "schedule": last["lr_schedulers"], "best": (best["global_step"], best["state_dict"]), "rows": rows,
        "summary": {key: summary[key] for key in ("tokens", "trained_tokens", "start", "end", "optimizer_steps")},
        "adapter": (run / "adapter/last/adapter_model.safetensors").read_bytes(),
        "best_adapter": (run / "adapter/best/adapter_model.safetensors").read_bytes(),
    }  # fmt: skip


def assert_equal(ours, theirs, place=""):
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), place
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), place
        for key in theirs:
            assert_equal(ours[key], theirs[key], f"{place}.{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), place
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{place}[{number}]")
    else:
        assert ours == theirs, place


def kill(at, step=1, rank=-1, by="SIGKILL"):
    return ["--trainer.callbacks+=killer.Kill", f"--trainer.callbacks.at={at}", f"--trainer.callbacks.step={step}",
            f"--trainer.callbacks.rank={rank}", f"--trainer.callbacks.by={by}"]  # fmt: skip


def go_on(command, folder):
    """Starts a run again until it ends; returns the step it went on from."""
    path = folder / "run/checkpoints/last.ckpt"
    step = torch.load(path, weights_only=True)["global_step"] if path.exists() else 0
    run([*command, "--run", "run", "--ckpt_path", "auto"], folder)
    return step


# Where, in or after which step, and whether by itself: enough for every day.
FEW = [("writing", 4), ("validation", 3), ("train_end", 9)]
ALL = [
    ("setup", 0), ("micro", 1), ("batch_end", 1), ("writing", 2), ("before_rename", 2), ("after_rename", 2),
    ("micro", 4),    ("optimizer", 5), ("validation", 3), ("validation_end", 6), ("epoch_end", 6), ("train_end", 9),
]  # fmt: skip


@pytest.mark.parametrize(("at", "step"), FEW)
def test_killed_and_gone_on_bitwise(command, never_stopped, tmp_path, at, step):
    status, out = end(start([*command, *kill(at, step), "--run", "run"], tmp_path))
    assert status == -signal.SIGKILL, out
    assert go_on(command, tmp_path) > 0
    assert_equal(what(tmp_path / "run"), never_stopped(command))


def test_killed_in_the_validation_after_the_last_step(command, never_stopped, tmp_path):
    """All steps are taken and saved: what goes on validates, keeps the best and writes the report."""
    command = [option if option != str(SAVES) else "3" for option in command]
    status, out = end(start([*command, *kill("validation", 9), "--run", "run"], tmp_path))
    assert status == -signal.SIGKILL, out
    assert go_on(command, tmp_path) == 9
    assert_equal(what(tmp_path / "run"), never_stopped(command))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_anywhere(command, never_stopped, tmp_path, ranks):
    """Twelve exact places on one rank, eight on two, one rank or both; and killed twice in one run."""
    if ranks == 2:
        command = [*command, "--config", "trainer/ddp", "--trainer.devices", "2", "--data.batch_size", "2"]
    expected = never_stopped(command)
    cases = ALL if ranks == 1 else [ALL[i] for i in (0, 1, 3, 5, 6, 8, 9, 10)]
    went_on = []
    for number, (at, step) in enumerate(cases):
        folder = tmp_path / f"case{number}"
        folder.mkdir()
        (folder / "killer.py").write_text(KILLER)
        rank = -1 if ranks == 1 else 0 if at in ("writing", "after_rename") else number % 2  # the first rank writes
        status, out = end(start([*command, *kill(at, step, rank), "--run", "run"], folder), timeout=120)
        assert status != 0, (at, step, out)
        went_on.append(go_on(command, folder))
        assert_equal(what(folder / "run"), expected, f"{at} at step {step}")
    assert sum(step > 0 for step in went_on) > len(went_on) / 2, went_on
    print(list(zip(cases, went_on, strict=True)))


@pytest.mark.slow
def test_killed_at_random_moments_again_and_again(command, never_stopped, tmp_path):
    """Six kills from outside, at whatever the run is doing; each time it is simply started again."""
    chance = random.Random(0)
    for _ in range(6):
        process = start([*command, "--run", "run", "--ckpt_path", "auto"], tmp_path)
        time.sleep(chance.uniform(4, 9))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    go_on(command, tmp_path)
    assert_equal(what(tmp_path / "run"), never_stopped(command))


@pytest.mark.parametrize(
    ("by", "at", "step", "status"),
    [("SIGTERM", "micro", 4, 143), ("SIGINT", "validation", 3, 130)],
    ids=["sigterm in a step", "ctrl-c in a validation"],
)
def test_asked_to_stop(command, never_stopped, tmp_path, by, at, step, status):
    """The step is ended and saved, whatever `every_n_steps` says; the exit status says what happened."""
    got, out = end(start([*command, *kill(at, step, by=by), "--run", "run"], tmp_path))
    assert got == status, out
    assert f"stopped after step {step}" in out
    assert "Traceback" not in out
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == step
    assert go_on(command, tmp_path) == step
    assert_equal(what(tmp_path / "run"), never_stopped(command))


def test_a_time_limit_of_slurm(command, never_stopped, tmp_path):
    """Its signal comes inside a step: the step is ended and saved, the job is queued again, and goes on by itself."""
    queue = tmp_path / "bin"
    queue.mkdir()
    (queue / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    (queue / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
           "SLURM_JOB_NAME": "train", "PATH": f"{queue}:{os.environ['PATH']}"}  # fmt: skip
    status, out = end(start([*command, *kill("micro", 4, by="SIGUSR1"), "--run", "run"], tmp_path, **job))
    assert status == 128 + signal.SIGUSR1, out
    assert "SLURM's SIGUSR1: stopping after this step." in out
    assert "SLURM job 7 is back in the queue" in out
    assert "Traceback" not in out
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert not list((tmp_path / "run").glob("hpc*"))  # where Lightning would have saved
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    status, out = end(start([*command, "--run", "run"], tmp_path, **job, SLURM_RESTART_COUNT="1"))
    assert status == 0, out
    assert_equal(what(tmp_path / "run"), never_stopped(command))


def test_two_ranks_are_asked_to_stop(command, never_stopped, tmp_path):
    """One rank gets the signal, both stop after the same step."""
    command = [*command, "--config", "trainer/ddp", "--trainer.devices", "2", "--data.batch_size", "2"]
    got, out = end(start([*command, *kill("batch", 5, rank=0, by="SIGTERM"), "--run", "run"], tmp_path))
    assert got == 143, out
    assert go_on(command, tmp_path) == 5
    assert_equal(what(tmp_path / "run"), never_stopped(command))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(command, never_stopped, tmp_path):
    end(start([*command, *kill("micro", 6), "--run", "run"], tmp_path))
    kept = tmp_path / "run/checkpoints"
    torn = (kept / "last.ckpt").read_bytes()
    (kept / "last.ckpt").write_bytes(torn[: len(torn) // 2])
    out = run([*command, "--run", "run", "--ckpt_path", "last"], tmp_path)
    assert "last.ckpt is torn" in out
    assert "Going on from the one before it" in out
    assert "previous.ckpt" in out
    assert_equal(what(tmp_path / "run"), never_stopped(command))


def test_a_run_that_was_moved_goes_on(command, never_stopped, tmp_path):
    """On another machine the run folder has another path; the best checkpoint is still the best."""
    end(start([*command, *kill("micro", 5), "--run", "run"], tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").rename(tmp_path / "elsewhere/moved")
    on = [*command[:3], "fit", "--config", "elsewhere/moved/config.yaml", "--ckpt_path", "last"]
    run([*on, "--trainer.callbacks", "SaveCheckpoint", f"--trainer.callbacks.every_n_steps={SAVES}"], tmp_path)
    assert_equal(what(tmp_path / "elsewhere/moved"), never_stopped(command))


FULL = '''
import resource, signal
import lightning as L

class Full(L.Callback):
    """From a step on, no file may grow beyond a few kilobytes: what a full disk looks like."""
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 5:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
'''


def test_a_full_disk(command, never_stopped, tmp_path):
    """One sentence, no traceback, the last good checkpoint as it was, no scratch left; then the run goes on."""
    (tmp_path / "full.py").write_text(FULL)
    status, out = end(start([*command, "--trainer.callbacks+=full.Full", "--run", "run"], tmp_path))
    assert status == 1, out
    assert "there is no space left to write" in out
    assert "Traceback" not in out
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert go_on(command, tmp_path) == 4
    assert_equal(what(tmp_path / "run"), never_stopped(command))
