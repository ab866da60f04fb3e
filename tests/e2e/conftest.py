import json
import sys

import pytest

from ftlit.__main__ import main
from ftlit.cli import RUN_VARIABLE


@pytest.fixture
def ftlit(tmp_path, monkeypatch, capfd):
    """Runs the command in a folder of its own; returns its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(RUN_VARIABLE, raising=False)

    def command(*args):
        monkeypatch.setattr(sys, "argv", ["ftlit"])
        capfd.readouterr()
        try:
            status = main([str(a) for a in args])
        except SystemExit as end:
            status = end.code or 0
        out, err = capfd.readouterr()
        command.out, command.err = out, err
        return status

    path = list(sys.path)
    yield command
    sys.path[:] = path


def write_rows(path):
    """Twelve short conversations in a file."""
    with path.open("w") as file:
        for number in range(12):
            turns = [
                {"role": "user", "content": f"What is {number} plus {number}?"},
                {"role": "assistant", "content": f"{2 * number}, of course" + "!" * (number % 4)},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return str(path)


def fit_options(rows, model):
    """A small LoRA run: nine rows to train on, three to validate, three examples a step."""
    return [
        *("fit", "--config", "sft", "--config", "trainer/cpu", "--config", "peft/lora"),
        *("--model.policy", model, "--model.peft.rank", "4"),
        *("--data.train", rows, "--data.validation", "0.25", "--data.batch_size", "3"),
    ]


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture
def fit_args(rows, tiny_model_folder):
    return fit_options(rows, tiny_model_folder)
