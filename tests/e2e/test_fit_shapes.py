"""`ftlit fit` by the command line on two rows of every public shape that is read: it trains what the table shows."""

import csv
import json
import math
from pathlib import Path

import pytest
import yaml

from ftlit.testing import tiny_lm, tiny_tokenizer
from ftlit.testing.tiny import TOOLS_TEMPLATE
from tests.shapes import SHAPES
from tests.test_shapes import REFUSED, TABLE, cell, line, other_label

pytestmark = pytest.mark.slow

READ = [name for name in SHAPES if REFUSED not in line(name).search(TABLE.read_text())[0]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose template shows tools."""
    folder = tmp_path_factory.mktemp("shapes") / "model"
    tiny_lm("llama").save_pretrained(folder)
    tiny_tokenizer(TOOLS_TEMPLATE).save_pretrained(folder)
    return str(folder)


def options(settings):
    """Settings of `data` as the command line takes them."""
    return [word for name, value in settings.items() for word in (f"--data.{name}", yaml.safe_dump(value).strip())]


@pytest.mark.parametrize("name", READ)
def test_two_steps(name, ftlit, model, tmp_path):
    shape = SHAPES[name]
    second = other_label(shape.row) if shape.stage == "classification" else shape.row
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (shape.row, second) * 2))
    # Written beside the rows, so that a reward needs nothing but the answers.
    Path("reward.py").write_text(
        "def length(completions, **columns):\n    return [float(len(c)) for c in completions]\n"
    )
    more = ["--model.reward", "reward.length", "--model.max_new_tokens", "4", "--model.num_answers", "2"]
    (known,) = line(name).findall(TABLE.read_text())
    stage = ["--config", shape.stage, *(["--config", "dpo/kto"] if "| Labelled |" in known else [])]
    status = ftlit(
        *("fit", *stage, "--config", "peft/lora", "--config", "trainer/cpu", "--run", "r"),
        *("--model.policy", model, "--data.train", "rows.jsonl", "--data.batch_size", "2", "--trainer.max_steps", "2"),
        *options(shape.more),
        *(more if shape.stage == "grpo" else []),
    )
    assert status == 0, ftlit.err
    with Path("r/metrics.csv").open() as file:
        steps = [row for row in csv.DictReader(file) if row.get("train/loss")]
    assert len(steps) == 2
    assert all(math.isfinite(float(row["train/loss"])) for row in steps)
    shown = ftlit.out.partition("example ")[2]
    trained = shown.partition("⟦")[2].partition("⟧")[0]
    assert not trained or cell(trained).strip("↵ ") in known
