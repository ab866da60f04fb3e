"""How the shapes of public data sets are read: `shapes.md` holds it.

`FTLIT_WRITE_TABLE=1 pytest tests/test_shapes.py` writes the table anew.
"""

import json
import os
import re
from pathlib import Path

import pytest

from ftlit.data.classification import ClassificationData
from ftlit.data.datamodules import SFTData
from ftlit.data.preferences import PreferenceData
from ftlit.data.prompts import PromptData
from ftlit.errors import DataError
from ftlit.testing import tiny_tokenizer
from ftlit.testing.tiny import TOOLS_TEMPLATE
from tests.shapes import SHAPES

# One process reads all shapes, which writes the table.
pytestmark = pytest.mark.xdist_group("shapes")

TABLE = Path(__file__).with_name("shapes.md")
WRITE = bool(os.environ.get("FTLIT_WRITE_TABLE"))
DATA = {"sft": SFTData, "dpo": PreferenceData, "classification": ClassificationData, "grpo": PromptData}
REFUSED = "refused: "
HEAD = """# How the shapes of public data are read

Made by `FTLIT_WRITE_TABLE=1 pytest tests/test_shapes.py`; every test run compares. A shape is the columns of a data
set, filled with a made-up row, read the whole way from file to tokens under `--config sft`, `dpo`, `classification` or
`grpo`, and shown as the model sees it, with what is trained between ⟦ ⟧ (for classifiers: what they are to say). `↵` is
a line break.
"""


def other_label(row):
    """A second row for a classifier, which needs two labels."""
    label = next(name for name in ("label", "labels", "score", "rating", "helpfulness") if name in row)
    value = row[label]
    return {**row, label: [99] if isinstance(value, list) else value + 1}


def read(shape, folder):
    """How a shape is read: the table's cells."""
    rows = [shape.row, other_label(shape.row)] if shape.stage == "classification" else [shape.row]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DATA[shape.stage](train=str(path), cache=False, **shape.more) if shape.stage != "grpo" else PromptData(
        train=str(path), **shape.more
    )  # fmt: skip
    data.use_tokenizer(tiny_tokenizer(TOOLS_TEMPLATE))
    setting = ", ".join(f"{name}: {column}" for name, column in shape.more.get("columns", {}).items())
    given = f"`data.columns: {{{setting}}}`" if setting else ""
    try:
        data.setup("fit")
    except DataError as error:
        return ["", given, REFUSED + str(error).replace(str(path), "rows.jsonl")]
    source = data.rows["train"][0].source if shape.stage == "grpo" else data._train_sources[0]
    unread = ", ".join(source.unread())
    kind = type(source.row_format).__name__
    notes = [given, *(note.split(": ", 1)[1] for note in source.notes), f"not read: {unread}" if unread else ""]
    return [kind, "; ".join(note for note in notes if note), data.rendered(0)]


def cell(text):
    """A text as a cell of a table."""
    return text.replace("|", "\\|").replace("\n", "↵")


def line(name):
    return re.compile(rf"^\| {re.escape(cell(name))} \| .+ \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def found():
    """What was read of each shape; written as a table at the end, where that is wanted."""
    lines = {}
    yield lines
    if WRITE and len(lines) == len(SHAPES):
        parts = [HEAD]
        for stage in DATA:
            parts.append(
                f"\n## --config {stage}\n\n| data | columns | read as | settings and notes | seen and trained |\n"
            )
            parts.append("| --- | --- | --- | --- | --- |\n")
            parts += [f"{lines[name]}\n" for name, shape in SHAPES.items() if shape.stage == stage]
        TABLE.write_text("".join(parts))


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_read_as_the_table_says(name, found, tmp_path):
    shape = SHAPES[name]
    kind, notes, seen = read(shape, tmp_path)
    cells = [name, ", ".join(shape.row), kind, notes, seen]
    found[name] = f"| {' | '.join(cell(text) for text in cells)} |"
    if not WRITE:
        (known,) = line(name).findall(TABLE.read_text())
        assert known == found[name], "run with FTLIT_WRITE_TABLE=1 and read the difference"


@pytest.mark.skipif(WRITE, reason="it is being written")
def test_the_table_is_whole():
    text = TABLE.read_text()
    assert len(SHAPES) >= 100
    assert all(line(name).search(text) for name in SHAPES)


@pytest.mark.skipif(WRITE, reason="it is being written")
def test_few_are_refused():
    refused = {one.split(" | ")[0].strip("| ") for one in TABLE.read_text().splitlines() if f"| {REFUSED}" in one}
    # A direction, a tree, pictures and a verdict are the user's to choose; MOSS writes its own marks into its texts.
    assert refused == {"WMT, OPUS", "OpenAssistant (oasst1)", "LLaVA", "PKU-SafeRLHF", "MOSS 003"}
