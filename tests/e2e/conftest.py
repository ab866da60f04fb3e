import json

import pytest


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
