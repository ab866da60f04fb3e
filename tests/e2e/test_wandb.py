"""What W&B is told: an offline run is read back."""

import json
import os
from pathlib import Path

import pytest
import wandb
import yaml

from .test_run import metrics
from .wandb_file import Offline

GEN = [
    "--trainer.callbacks+=GenerationEval",
    "--trainer.callbacks.max_new_tokens=5",
    "--trainer.callbacks.table_rows=2",
]


def offline(run):
    """The offline runs of a run folder, the first first; W&B's own process writes them to their end first."""
    wandb.teardown()
    return [Offline(folder) for folder in sorted(Path(run).glob("wandb/offline-run-*"))]


@pytest.fixture
def args(fit_args):
    return [*fit_args, "--config", "logger/wandb", *GEN]


@pytest.fixture(autouse=True)
def _fresh():
    """wandb reads the environment once a process."""
    yield
    wandb.teardown()


def test_an_offline_run_holds_everything(ftlit, args, monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = [
        "--trainer.logger.tags",
        "[a, b]",
        "--trainer.logger.notes",
        "Why not?",
        "--trainer.logger.group",
        "g",
    ]
    settings += ["--trainer.logger.log_adapter", "best", "--trainer.max_epochs", "2"]
    assert ftlit(*args, *settings, "--run", "r") == 0
    assert "WANDB_MODE" not in os.environ  # a setting of this run, not of the process
    assert "logged offline" in ftlit.out
    assert "Traceback" not in ftlit.err
    (run,) = offline("r")
    assert run.exit == 0
    assert run.run.project == "ftlit"
    assert run.run.display_name == "r"
    assert (list(run.run.tags), run.run.notes, run.run.run_group) == (["a", "b"], "Why not?", "g")
    assert Path("r/wandb/run_id").read_text().strip() == run.run.run_id
    config = yaml.safe_load(Path("r/config.yaml").read_text())
    assert {key: value for key, value in run.config.items() if key != "_wandb"} == config
    # One history row a step, the same numbers under the same steps as metrics.csv.
    ours = {int(row.pop("step")): row for row in metrics("r")}
    assert [row["_step"] for row in run.history] == sorted(ours)
    assert all(row["trainer/global_step"] == row["_step"] for row in run.history)
    for step, row in run.metrics().items():
        measured = {key: value for key, value in row.items() if not key.startswith("gen/samples")}
        assert measured == pytest.approx(ours[step])
    summary = json.loads(Path("r/summary.json").read_text())
    for key, value in ours[6].items():
        assert run.summary[key] == pytest.approx(value)
    assert run.summary["start/val/loss"] == pytest.approx(summary["start"]["val/loss"])
    assert run.summary["optimizer_steps"] == 6
    assert run.summary["tokens"] == summary["tokens"]
    # The answers as a table, the adapter as an artifact.
    tables = [row["gen/samples.path"] for row in run.history if "gen/samples.path" in row]
    (folder,) = Path("r/wandb").glob("offline-run-*")
    written = [json.loads((folder / "files" / table).read_text()) for table in tables]
    kept = [json.loads(line) for line in Path("r/samples.jsonl").read_text().splitlines()]
    assert written[0]["columns"] == ["step", "row", "prompt", "answer", "reference", "exact_match", "f1", "rouge_l"]
    expected = [
        [k["step"], k["row"], k["prompt"][0]["content"], k["answer"], k["reference"]] for k in kept if k["row"] < 3
    ]
    assert [row[:5] for table in written for row in table["data"]] == expected
    (adapter,) = [artifact for artifact in run.artifacts if artifact.type == "model"]
    kept = {entry.path for entry in adapter.manifest.contents}
    assert kept == {path.name for path in Path("r/adapter/best").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= kept
    assert "best" in adapter.aliases


def test_a_resumed_run_goes_on_under_its_id_without_a_step_twice(ftlit, args):
    args += ["--trainer.max_epochs", "3"]
    assert ftlit(*args, "--run", "whole") == 0
    Path("stop_at_five.py").write_text(
        "import lightning as L\n"
        "class StopAt(L.Callback):\n"
        "    def on_train_batch_start(self, trainer, *args):\n"
        "        if trainer.global_step == 5: raise KeyboardInterrupt\n"
    )
    assert ftlit(*args, "--trainer.callbacks+=stop_at_five.StopAt", "--run", "cut") in (1, 130)
    (first,) = offline("cut")
    assert max(first.metrics()) == 5  # two steps after the checkpoint
    assert first.exit == 1
    assert ftlit("fit", "--config", "whole/config.yaml", "--run", "cut", "--ckpt_path", "last") == 0
    first, second = offline("cut")
    (whole,) = offline("whole")
    assert first.run.run_id == second.run.run_id != whole.run.run_id
    assert not set(first.metrics()) & set(second.metrics())
    timed = ("seconds", "_per_s", "samples")
    joined = {**first.metrics(), **second.metrics()}
    assert sorted(joined) == sorted(whole.metrics()) == list(range(10))
    for step, row in whole.metrics().items():
        assert {k: v for k, v in joined[step].items() if not any(part in k for part in timed)} == {
            k: v for k, v in row.items() if not any(part in k for part in timed)
        }
    assert second.summary["optimizer_steps"] == 9


def test_a_run_that_goes_back_to_its_best_is_a_new_one_with_its_history(ftlit, args):
    """W&B takes nothing of steps that it has passed: the second part had no history at all."""
    kept = {"class_path": "SaveCheckpoint", "init_args": {"save_top_k": -1}}
    Path("keep.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [kept]}}))
    args += ["--config", "keep.yaml", "--trainer.max_epochs", "3"]
    assert ftlit(*args, "--run", "r") == 0
    (whole,) = offline("r")
    best = 3
    Path("r/checkpoints/step-000003.ckpt").replace("r/checkpoints/best.ckpt")
    assert ftlit(*args, "--ckpt_path", "best", "--model.lr", "0.1", "--run", "r") == 0
    assert f"W&B: run {whole.run.run_id} is at step 9" in ftlit.out
    assert "after step 3 is a new run" in ftlit.out
    second = next(run for run in offline("r") if run.run.run_id != whole.run.run_id)
    assert second.config["forked_from"] == {"run": whole.run.run_id, "step": best}
    assert sorted(second.metrics()) == list(range(10))
    for step, row in second.metrics().items():
        ours = next(one for one in metrics("r") if int(one["step"]) == step)
        measured = {key: value for key, value in row.items() if not key.startswith("gen/samples")}
        assert measured == pytest.approx({key: value for key, value in ours.items() if key != "step"})


def test_another_run_has_another_id(ftlit, args):
    for run in ("a", "b"):
        assert ftlit(*args, "--run", run, "--trainer.max_steps", "1") == 0
    assert offline("a")[0].run.run_id != offline("b")[0].run.run_id
    more = ["--ckpt_path", "a/checkpoints/last.ckpt", "--run", "c", "--trainer.max_steps", "2"]
    assert ftlit(*args, *more) == 0
    assert offline("c")[0].run.run_id not in {offline(run)[0].run.run_id for run in ("a", "b")}
    assert ftlit(*args, "--trainer.logger.id", "mine", "--run", "d", "--trainer.max_steps", "1") == 0
    assert offline("d")[0].run.run_id == "mine"


def test_lightnings_own_logger_still_works(ftlit, fit_args):
    Path("own.yaml").write_text("trainer:\n  logger:\n    class_path: WandbLogger\n    init_args: {project: p}\n")
    assert ftlit(*fit_args, "--config", "own.yaml", "--run", "r", "--trainer.max_steps", "1") == 0
    wandb.finish()
    (run,) = offline("r")
    assert run.run.project == "p"


def test_log_model_without_a_key_is_one_sentence(ftlit, fit_args, monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("own.yaml").write_text("trainer:\n  logger:\n    class_path: WandbLogger\n    init_args: {log_model: true}\n")
    assert ftlit(*fit_args, "--config", "own.yaml", "--run", "r") == 1
    assert "log_model needs a key" in ftlit.err
