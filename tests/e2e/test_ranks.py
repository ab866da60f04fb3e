"""Two processes train what one trains."""

import csv
import os
import subprocess
import sys

import torch


def run(args, cwd):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "ftlit", *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_ranks_equal_one(fit_args, tmp_path):
    # Nine training rows, four a step: the last step of each epoch is short, and uneven over the ranks.
    common = [*fit_args, "--trainer.max_epochs", "2", "--model.lr", "0.01", "--trainer.precision", "64-true"]
    run([*common, "--run", "one", "--data.batch_size", "4"], tmp_path)
    out = run(
        [*common, "--run", "two", "--data.batch_size", "2", "--trainer.devices", "2", "--trainer.strategy", "ddp"],
        tmp_path,
    )
    assert "optimizer steps of 4 examples" in out
    assert out.count("step 6/6") == 1
    one, two = (
        torch.load(tmp_path / run_ / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run_ in ("one", "two")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-9)
    rows = [list(csv.DictReader((tmp_path / run_ / "metrics.csv").open())) for run_ in ("one", "two")]
    for first, second in zip(*rows, strict=True):
        for key in ("step", "train/loss", "train/grad_norm", "train/lr", "val/loss"):
            if first[key] or second[key]:
                assert abs(float(first[key]) - float(second[key])) < 1e-5
    assert (tmp_path / "two/adapter/last/adapter_model.safetensors").exists()
