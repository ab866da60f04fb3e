"""GenerationEval through the real command, with a tiny model."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ftlit.metrics import text
from ftlit.metrics.intervals import wilson

GEN = ["--trainer.callbacks+=GenerationEval", "--trainer.callbacks.max_new_tokens=6"]


def option(**settings):
    return [f"--trainer.callbacks.{key}={value}" for key, value in settings.items()]


def metrics(run):
    with (Path(run) / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def samples(run, name="samples"):
    return [json.loads(line) for line in (Path(run) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def state(run):
    return torch.load(Path(run) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture
def check(tmp_path):
    """A verifier in the working directory; it draws from every global generator, which must not show in training."""
    (tmp_path / "checks.py").write_text(
        "import random, numpy, torch\n"
        "def even(prompts, completions, messages, **columns):\n"
        "    random.random(), numpy.random.rand(), torch.rand(3)\n"
        "    assert [m[:-1] for m in messages] == [list(p) for p in prompts]\n"
        "    assert columns['reference'] == [m[-1]['content'] for m in messages]\n"
        "    return [float(len(text) % 2 == 0) for text in completions]\n"
    )
    return option(verifier="checks.even")


def test_what_is_measured_and_kept(ftlit, fit_args, check):
    args = [*GEN, *check, "--trainer.max_epochs", "2", "--model.lr", "0.02"]
    assert ftlit(*fit_args, *args, "--run", "r") == 0
    rows = metrics("r")
    assert [int(row["step"]) for row in rows if "gen/f1" in row] == [0, 3, 6]
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3, 4, 5, 6]  # joined to the rows of training and validation
    kept = samples("r")
    assert [(record["step"], record["row"]) for record in kept] == [
        (step, row) for step in (0, 3, 6) for row in (1, 2, 3)
    ]
    for row in rows:
        if "gen/f1" not in row:
            continue
        these = [record for record in kept if record["step"] == row["step"]]
        answers, references = ([record[key] for record in these] for key in ("answer", "reference"))
        pairs = list(zip(answers, references, strict=True))
        expected = {
            "exact_match": sum(text.exact_match(*pair) for pair in pairs) / 3,
            "f1": sum(text.token_f1(*pair) for pair in pairs) / 3,
            "rouge_1": sum(text.rouge_n(*pair, 1) for pair in pairs) / 3,
            "rouge_2": sum(text.rouge_n(*pair, 2) for pair in pairs) / 3,
            "rouge_l": sum(text.rouge_l(*pair) for pair in pairs) / 3,
            "bleu": text.bleu(answers, references),
            "distinct_1": text.distinct_n(answers, 1),
            "distinct_2": text.distinct_n(answers, 2),
            "length": sum(record["tokens"] for record in these) / 3,
            "end_rate": sum(record["ended"] for record in these) / 3,
            "verifier": sum(len(answer) % 2 == 0 for answer in answers) / 3,
        }
        expected["verifier_low"], expected["verifier_high"] = wilson(round(3 * expected["verifier"]), 3)
        for key, value in expected.items():
            assert row[f"gen/{key}"] == pytest.approx(value, rel=1e-6, abs=1e-9), key
        assert row["gen/tokens_per_s"] > 0
        assert row["gen/seconds_per_answer"] > 0
    assert "all 3 rows (main), at most 6 tokens each, verified by even" in ftlit.out
    assert "step 6: gen/exact_match" in ftlit.out
    # The held-out questions are those of the validation loss, and the last answers those that the run now gives.
    for record in kept[-3:]:
        question = record["prompt"][-1]["content"]
        assert ftlit("generate", "r", "--prompt", question, "--max_new_tokens", "6", "--json") == 0
        assert json.loads(ftlit.out)["answer"] == record["answer"]


@pytest.mark.parametrize("peft", ["lora", "full", "prefix_tuning", "prompt_tuning"])
@pytest.mark.parametrize("temperature", [0, 1])
def test_training_is_bitwise_the_same_with_and_without(ftlit, rows, tiny_model_folder, check, peft, temperature):
    common = [
        *("fit", "--config", "sft", "--config", f"peft/{peft}", "--model.policy", tiny_model_folder),
        *("--data.train", rows, "--data.validation", "0.25", "--data.batch_size", "3", "--trainer.max_steps", "4"),
        *(["--model.peft.dropout", "0.3"] if peft == "lora" else []),
    ]
    assert ftlit(*common, "--run", "without") == 0
    more = [*GEN, *check, *option(every_n_steps=1, temperature=temperature)]
    assert ftlit(*common, *more, "--run", "with") == 0
    for name, tensor in state("without").items():
        assert torch.equal(tensor, state("with")[name]), name
    for one, other in zip(metrics("without"), metrics("with"), strict=True):
        for key in ("step", "train/loss", "train/grad_norm", "val/loss"):
            assert one.get(key) == other.get(key)
    assert [int(row["step"]) for row in metrics("with") if "gen/f1" in row] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_two_ranks_measure_what_one_measures(fit_args, tmp_path, temperature, check, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = [
        *fit_args,
        "--trainer.precision",
        "64-true",
        "--data.validation",
        "0.42",
        "--model.lr",
        "0.01",
        *GEN,
        *check,
    ]
    common += option(temperature=temperature, batch_size=2)
    for run, more in (("one", ["--data.batch_size", "4"]), ("two", ["--data.batch_size", "2"])):
        if run == "two":
            more += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "ftlit", *common, *more, "--run", run]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("before training: gen/exact_match") == 1
    assert samples("one") == samples("two")
    assert len(samples("one")) == 10
    for one, two in zip(metrics("one"), metrics("two"), strict=True):
        for key, value in one.items():
            if key.startswith("gen/") and key not in ("gen/seconds_per_answer", "gen/tokens_per_s"):
                assert two[key] == pytest.approx(value, abs=1e-6), key


def test_a_resumed_run_measures_what_an_uninterrupted_one_does(ftlit, fit_args, check):
    args = [*GEN, *check, *option(every_n_validations=2, temperature=0.7), "--trainer.max_epochs", "4"]
    assert ftlit(*fit_args, *args, "--run", "whole") == 0
    Path("stop_at_eight.py").write_text(
        "import lightning as L\n"
        "class StopAt(L.Callback):\n"
        "    def on_train_batch_end(self, trainer, *args):\n"
        "        if trainer.global_step == 8: raise KeyboardInterrupt\n"
    )
    assert ftlit(*fit_args, *args, "--trainer.callbacks+=stop_at_eight.StopAt", "--run", "cut") in (1, 130)
    with Path("cut/samples.jsonl").open("a") as file:
        file.write('{"step": 7, "row": 1}\n{"torn')
    assert ftlit("fit", "--config", "whole/config.yaml", "--run", "cut", "--ckpt_path", "last") == 0
    assert [int(row["step"]) for row in metrics("cut") if "gen/f1" in row] == [0, 6, 12]
    assert samples("cut") == samples("whole")
    timed = {"gen/seconds_per_answer", "gen/tokens_per_s"}
    for ours, theirs in zip(metrics("cut"), metrics("whole"), strict=True):
        assert {k: v for k, v in ours.items() if k.startswith("gen/") and k not in timed} == {
            k: v for k, v in theirs.items() if k.startswith("gen/") and k not in timed
        }
    summaries = [json.loads(Path(run, "summary.json").read_text()) for run in ("cut", "whole")]
    assert summaries[0]["start"]["gen/f1"] == summaries[1]["start"]["gen/f1"]


def test_ftlit_test_reports_both(ftlit, fit_args, rows, check):
    assert ftlit(*fit_args, *GEN, *check, *option(num_rows=2), "--run", "r") == 0
    assert "answers to 2 of 3 rows (main)" in ftlit.out
    before = Path("r/metrics.csv").read_bytes()
    assert ftlit("test", "--config", "r/config.yaml", "--data.test", rows, *option(num_rows="null")) == 0
    result = json.loads(Path("r/test.json").read_text())
    assert result["checkpoint"] == "r/checkpoints/last.ckpt"
    assert {"test/loss", "test/perplexity", "gen/exact_match", "gen/f1", "gen/verifier"} <= set(result["metrics"])
    assert len(samples("r", "test_samples")) == 12
    table = [line for line in ftlit.out.splitlines() if line.startswith(("test/", "gen/"))]
    assert table[0].startswith("test/loss")
    assert f"{result['metrics']['test/loss']:.4f}" in table[0]
    ends = {line.find(".") for line in table if "/tokens_per_s" not in line}
    assert len(ends) == 1, "the decimal points are in one column"
    assert any("gen/verifier" in line and "95 % interval" in line for line in table)
    assert ftlit("validate", "--config", "r/config.yaml") == 0
    assert "gen/f1" in json.loads(Path("r/validate.json").read_text())["metrics"]
    assert Path("r/metrics.csv").read_bytes() == before


def test_without_validation_rows_it_measures_at_the_start_and_at_the_end(ftlit, rows, tiny_model_folder):
    Path("questions.jsonl").write_text('{"messages": [{"role": "user", "content": "Wie heißt du? 你好"}]}\n' * 2)
    args = ["fit", "--config", "sft", "--model.policy", tiny_model_folder, "--data.train", rows, "--run", "r"]
    assert ftlit(*args, *GEN, *option(rows="questions.jsonl"), "--trainer.max_steps", "2") == 0
    assert "2 rows have no answer of their own to compare with" in ftlit.out
    measured = [row for row in metrics("r") if "gen/questions/length" in row]
    assert [int(row["step"]) for row in measured] == [0, 2]
    assert not any("exact_match" in key for row in measured for key in row)
    assert samples("r", "samples-questions")[0]["prompt"][0]["content"] == "Wie heißt du? 你好"


def test_several_sets_have_names_of_their_own(ftlit, fit_args, rows):
    Path("two.yaml").write_text(
        "trainer:\n  callbacks+:\n"
        "    - {class_path: GenerationEval, init_args: {max_new_tokens: 3, num_rows: 1}}\n"
        "    - {class_path: GenerationEval, init_args: {max_new_tokens: 3, rows: other}}\n"
        "    - {class_path: GenerationEval, init_args: {max_new_tokens: 3, rows: 'sample:general', num_rows: 2}}\n"
    )
    args = [*fit_args, "--config", "two.yaml", "--trainer.max_steps", "1"]
    assert ftlit(*args, "--data.validation", f"{{main: 0.25, other: {rows}}}", "--run", "r") == 0, ftlit.err
    assert {"gen/length", "gen/other/length", "gen/general/length"} <= set(metrics("r")[-1])
    assert len(samples("r", "samples-other")) == 24
    text = Path("two.yaml").read_text()
    Path("two.yaml").write_text(text.replace("rows: other", "name: main"))
    assert ftlit(*args, "--data.validation", "0.25", "--run", "s") == 1
    assert "two GenerationEval callbacks both measure 'main'" in ftlit.err


def test_checkpoints_and_early_stopping_can_watch_it(ftlit, fit_args):
    stop = [
        "--trainer.callbacks+=EarlyStopping",
        "--trainer.callbacks.monitor=gen/length",
        "--trainer.callbacks.patience=1",
    ]
    assert ftlit(*fit_args, *GEN, *stop, "--trainer.max_epochs", "4", "--run", "r") == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"batch_size": 0}, "GenerationEval.batch_size must be at least 1, got 0"),
        ({"top_p": 0}, "top_p in (0, 1]"),
        ({"verifier": "checks.evn"}, "did you mean 'even'"),
        ({"verifier": "FinalNumbr"}, "did you mean 'FinalNumber'"),
        ({"verifier": "nope.check"}, "there is no module 'nope'"),
        ({"rows": "nope.jsonl"}, "nope.jsonl does not exist"),
        ({"verifier": "FinalNumber", "verifier.column": "answr"}, "the rows have no column 'answr'"),
    ],
)
def test_mistakes_are_one_sentence(ftlit, fit_args, check, settings, says):
    assert ftlit(*fit_args, *GEN, *option(**settings), "--run", "r", "--trainer.max_steps", "1") == 1
    assert says in ftlit.err
    assert "Traceback" not in ftlit.err


def test_fast_dev_run_leaves_nothing_behind(ftlit, fit_args):
    assert ftlit(*fit_args, *GEN, "--trainer.fast_dev_run", "true", "--run", "r") == 0
    assert not Path("r").exists() or not any(Path("r").iterdir())


def test_no_rows_at_all(ftlit, rows, tiny_model_folder):
    args = ["fit", "--config", "sft", "--model.policy", tiny_model_folder, "--data.train", rows, "--run", "r"]
    assert ftlit(*args, *GEN) == 1
    assert "GenerationEval has no rows" in ftlit.err


def test_what_a_run_says_at_its_end(ftlit, fit_args):
    args = [*fit_args, "--trainer.max_steps", "1"]
    assert (
        ftlit(*args, "--run", "r", "--trainer.callbacks+=GenerationEval", "--trainer.callbacks.max_new_tokens=3") == 0
    )
    lines = ftlit.out.splitlines()
    place = lines.index(next(line for line in lines if line.startswith("trained    1 steps")))
    assert lines[place + 1].startswith("generation ")
    assert "% of the run" in lines[place + 1]
    assert lines[place + 2].split() == ["before", "after"]
    summary = json.loads(Path("r/summary.json").read_text())
    assert summary["peak_memory_bytes_of_ranks"] == [summary["peak_memory_bytes"]]
    assert 0 < summary["generation_seconds"] < summary["seconds"]
    assert {"val/loss", "gen/f1"} <= set(summary["start"])
    assert {"val/loss", "gen/f1"} <= set(summary["end"])
    assert "samples.jsonl" in lines[-1]
