"""Two processes train what one trains."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftlit.testing import FAMILIES

from .ranks_worker import train, train_reward


def run(args, cwd, status=0):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "ftlit", *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stderr[-3000:]
    return done.stdout


def on_two_ranks(jobs, folder):
    """Runs jobs of `ranks_worker.train` on two processes, started as an outside launcher starts them."""
    (folder / "jobs.json").write_text(json.dumps([{"world": 2, **job} for job in jobs]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    env = {**os.environ, **group, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    command = [sys.executable, str(Path(__file__).with_name("ranks_worker.py")), "jobs.json", "results.pt"]
    ranks = [
        subprocess.Popen(command, cwd=folder, env={**env, "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)[-3000:]
    return torch.load(folder / "results.pt", weights_only=True)


def assert_alike(ours, theirs, weights, metrics, steps=10):
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, tensor in theirs["weights"].items():
        torch.testing.assert_close(ours["weights"][name], tensor, rtol=0, atol=weights, msg=name)
    assert len(ours["steps"]) == len(theirs["steps"]) == steps
    for first, second in zip(ours["steps"], theirs["steps"], strict=True):
        assert first == pytest.approx(second, rel=metrics, abs=metrics)


def test_data_parallel_equals_one_rank(tmp_path):
    """Ten steps with clipping, a schedule, uneven ranks and short last steps, also with a token cap: float64."""
    methods = ["LoRA", "Full", "PrefixTuning", "PromptTuning"]
    common = [{"method": method, "float64": True, "sgd": False} for method in methods]
    jobs = [{**job, "strategy": "ddp", "batch_size": 4} for job in common]
    jobs += [{**common[0], "strategy": "ddp", "batch_size": 2, "accumulate": 2, "max_tokens": 11}]
    results = on_two_ranks(jobs, tmp_path)
    assert max(results[-1]["micro"]) > 2
    for result, job in zip(results, [*common, common[0]], strict=True):
        assert_alike(result, train(**job), weights=1e-9, metrics=1e-9)


def test_sharded_equals_one_rank(tmp_path):
    """FSDP2 with every strategy: SGD, so that float32 rounding stays what it is."""
    methods = ["LoRA", "Full", "PrefixTuning", "PromptTuning"]
    common = [{"method": method} for method in methods]
    jobs = [{**job, "strategy": "fsdp", "batch_size": 4} for job in common]
    extra = [
        {"batch_size": 2, "accumulate": 2, "max_tokens": 11},
        {"method": "Full", "batch_size": 4, "gradient_checkpointing": True},
        {"batch_size": 4, "precision": "bf16-true"},
        {"batch_size": 4, "precision": "bf16-mixed"},
        {"method": "Full", "batch_size": 4, "precision": "bf16-mixed"},
    ]
    results = on_two_ranks([*jobs, *({**job, "strategy": "fsdp"} for job in extra)], tmp_path)
    alone = [train(**job) for job in common]
    for result, reference in zip(results[:4], alone, strict=True):
        assert_alike(result, reference, weights=2e-6, metrics=2e-5)
        assert result["answers"] == reference["answers"]
    assert_alike(results[4], alone[0], weights=2e-6, metrics=2e-5)
    assert_alike(results[5], alone[1], weights=2e-6, metrics=2e-5)
    for result, job in zip(results[6:], extra[2:], strict=True):
        reference = train(**{**job, "batch_size": 8})
        for first, second in zip(result["steps"], reference["steps"], strict=True):
            assert first["loss"] == pytest.approx(second["loss"], rel=2e-2)


def test_a_sharded_start_is_the_start(tmp_path):
    """A control that needs it, with strategies that train weights of the model itself; swapped memory is refused."""
    jobs = [{"method": method, "kl": True} for method in ("Norms", "Full", "LoRA")]
    two = {"strategy": "fsdp", "batch_size": 4}
    *results, swapped = on_two_ranks([{**job, **two} for job in (*jobs, {"method": "Swapping", "kl": True})], tmp_path)
    for result, job in zip(results, jobs, strict=True):
        assert_alike(result, train(**job), weights=2e-6, metrics=2e-5)
    assert swapped["error"].startswith("Swapping.start sets parameter.data, which FSDP2 does not follow")
    assert "subclass ftlit.SelectiveStrategy" in swapped["error"]


def test_a_sharded_reward_model_equals_one_rank(tmp_path, monkeypatch):
    """Trunk and new head, with every strategy; rows end to end and held out, uneven over the ranks."""
    jobs = [{"method": method} for method in ("LoRA", "Full", "PrefixTuning", "PromptTuning")]
    two = {"reward": True, "strategy": "fsdp", "batch_size": 4}
    results = on_two_ranks([*({**job, **two} for job in jobs), {**jobs[0], **two, "max_tokens": 11}], tmp_path)
    monkeypatch.chdir(tmp_path)
    for result, job in zip(results, [*jobs, jobs[0]], strict=True):
        reference = train_reward(**job)
        assert "policy.lm.score.weight" in reference["weights"]
        assert reference["val/loss"] < reference["steps"][0]["loss"] - 1e-2
        assert_alike(result, reference, weights=2e-6, metrics=2e-5, steps=6)
        for name in ("val/loss", "val/accuracy", "val/accuracy_low", "val/margin", "val/calibration_error"):
            assert result[name] == pytest.approx(reference[name], abs=2e-5), name
            assert result["quiet"][name] == pytest.approx(result[name], abs=1e-6), name  # the same weights


def test_every_family_on_two_ranks(tmp_path):
    families = list(FAMILIES)
    jobs = [{"method": "Full", "family": family, "strategy": "fsdp", "batch_size": 4} for family in families]
    for family, result in zip(families, on_two_ranks(jobs, tmp_path), strict=True):
        reference = train(method="Full", family=family)
        # Large random weights: float32 rounding grows over ten steps.
        assert_alike(result, reference, weights=1e-4, metrics=1e-3)


def test_two_ranks_equal_one(fit_args, tmp_path):
    # Nine training rows, four a step: the last step of each epoch is short, and uneven over the ranks.
    common = [*fit_args, "--trainer.max_epochs", "2", "--model.lr", "0.01", "--trainer.precision", "64-true"]
    run([*common, "--run", "one", "--data.batch_size", "4"], tmp_path)
    out = run(
        [*common, "--config", "trainer/ddp", "--run", "two", "--data.batch_size", "2", "--trainer.devices", "2"],
        tmp_path,
    )
    assert "optimizer steps of 4 examples" in out
    assert out.count("step 6/6") == 1
    one, two = (
        torch.load(tmp_path / run_ / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run_ in ("one", "two")
    )
    for name, tensor in one.items():
        # Rows that share a beginning are computed together, others on other ranks, and norms round to float32.
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-7)
    rows = [list(csv.DictReader((tmp_path / run_ / "metrics.csv").open())) for run_ in ("one", "two")]
    for first, second in zip(*rows, strict=True):
        for key in ("step", "train/loss", "train/grad_norm", "train/lr", "val/loss"):
            if first[key] or second[key]:
                assert abs(float(first[key]) - float(second[key])) < 1e-5
    assert (tmp_path / "two/adapter/last/adapter_model.safetensors").exists()


def test_a_run_leaves_its_group(ftlit, fit_args, tmp_path):
    """Its threads could abort a rank that ends, and the others would be killed."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "s"), 1), rank=0,
                                         world_size=1)  # fmt: skip
    try:
        assert ftlit(*fit_args, "--run", "r", "--trainer.max_steps", "1") == 0
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_a_sharded_model_answers(fit_args, rows, tmp_path):
    """GenerationEval and predict under FSDP2 give the answers of one rank; three questions for two ranks."""
    more = ["--trainer.callbacks+=GenerationEval", "--trainer.callbacks.max_new_tokens=6"]
    more += ["--trainer.callbacks.rows", rows, "--trainer.callbacks.num_rows=3", "--trainer.max_steps", "2"]
    one = [*fit_args, "--data.batch_size", "4"]
    two = [*fit_args, "--data.batch_size", "2", "--config", "trainer/fsdp", "--trainer.devices", "2"]
    answers = {}
    for name, common in (("one", one), ("two", two)):
        run([*common, *more, "--run", name], tmp_path)
        predict = ["predict", *common[1:], "--data.predict", rows, "--model.max_new_tokens", "5", "--run", name]
        assert run(predict, tmp_path).count("12 answers in") == 1
        samples = [json.loads(line) for line in (tmp_path / name / "samples-rows.jsonl").read_text().splitlines()]
        answers[name] = (
            [(s["step"], s["row"], s["answer"]) for s in samples],
            (tmp_path / name / "predictions.jsonl").read_text(),
        )
    assert len(answers["one"][0]) == 6
    assert answers["one"] == answers["two"]


def test_a_run_goes_on_with_another_number_of_ranks(fit_args, tmp_path):
    """Stopped sharded and gone on alone, and the other way round: weights, optimizer and adapter."""
    options = ["--trainer.max_epochs", "2", "--model.lr", "0.01", "--model.schedule", "constant"]
    one = [*fit_args, *options, "--data.batch_size", "4"]
    two = [*fit_args, *options, "--config", "trainer/fsdp", "--data.batch_size", "2", "--trainer.devices", "2"]
    stop, on = ["--trainer.max_steps", "4"], ["--ckpt_path", "last"]
    run([*one, "--run", "whole"], tmp_path)
    for name, first, then in (("joined", two, one), ("split", one, two)):
        run([*first, *stop, "--run", name], tmp_path)
        out = run([*then, *on, "--run", name], tmp_path)
        assert "step 5/6" in out
        assert "step 4/6" not in out
    checkpoints = {
        name: torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)
        for name in ("whole", "joined", "split")
    }
    whole = checkpoints.pop("whole")
    for name, other in checkpoints.items():
        assert other["state_dict"].keys() == whole["state_dict"].keys()
        for key, tensor in whole["state_dict"].items():
            torch.testing.assert_close(other["state_dict"][key], tensor, rtol=0, atol=1e-4)
        for key, state in whole["optimizer_states"][0]["state"].items():
            for part, tensor in state.items():
                torch.testing.assert_close(
                    other["optimizer_states"][0]["state"][key][part], tensor, rtol=1e-3, atol=1e-5
                )
        adapters = [load_file(tmp_path / run_ / "adapter/last/adapter_model.safetensors") for run_ in ("whole", name)]
        assert adapters[0].keys() == adapters[1].keys()
        for key, tensor in adapters[0].items():
            torch.testing.assert_close(adapters[1][key], tensor, rtol=0, atol=1e-4)
