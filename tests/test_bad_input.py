"""Every mistake of `bad_input.py` gets one sentence, the one in `bad_input.md`.

`FTLIT_WRITE_TABLE=1 pytest tests/test_bad_input.py` writes the table anew.
"""

import json
import os
import re
from pathlib import Path

import pytest

from tests.bad_input import CASES, World

pytestmark = pytest.mark.xdist_group("bad_input")

TABLE = Path(__file__).with_name("bad_input.md")
HEAD = (
    "# What ftlit says of mistakes\n\nMade by `FTLIT_WRITE_TABLE=1 pytest tests/test_bad_input.py`; every test run "
    "compares.\nEach ends with exit status 1 and without a traceback.\n"
)
KINDS = ("command", "number", "model", "adapter", "checkpoint", "file", "row")
WRITE = bool(os.environ.get("FTLIT_WRITE_TABLE"))


def read_table():
    if not TABLE.exists():
        return {}
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", TABLE.read_text(), re.MULTILINE)
    return {name: text.replace("\\|", "|") for name, text in rows if name not in ("mistake", "---")}


@pytest.fixture(scope="module")
def found():
    """What was said of each mistake; written as a table at the end, where that is wanted."""
    said = {}
    yield said
    if WRITE:
        known = {**read_table(), **said}
        parts = [HEAD]
        for kind in KINDS:
            names = sorted(name for name, (own, _) in CASES.items() if own == kind)
            lines = [f"| {name} | {known[name].replace('|', chr(92) + '|')} |" for name in names if name in known]
            parts.append("\n".join([f"\n## {kind}\n", "| mistake | ftlit says |", "| --- | --- |", *lines]) + "\n")
        TABLE.write_text("".join(parts))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_folder):
    """A run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    (folder / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    from ftlit.__main__ import main
    from ftlit.cli import RUN_VARIABLE

    before = os.getcwd()
    os.chdir(folder)
    os.environ.pop(RUN_VARIABLE, None)
    try:
        args = ["fit", "--config", "sft", "--config", "peft/lora", "--config", "trainer/cpu", "--run", "run"]
        assert main([*args, "--model.policy", tiny_model_folder, "--data.train", "rows.jsonl", "--data.validation",
                     "rows.jsonl", "--trainer.max_steps", "1"]) == 0  # fmt: skip
    finally:
        os.chdir(before)
    return folder / "run"


@pytest.mark.parametrize("name", sorted(CASES))
def test_one_sentence(name, ftlit, found, trained, tiny_model_folder, tmp_path):
    world = World(tmp_path, tiny_model_folder, trained)
    assert ftlit(*CASES[name][1](world)) == 1, ftlit.out[-1000:] + ftlit.err[-1000:]
    assert "Traceback" not in ftlit.err + ftlit.out
    (sentence,) = [line for line in ftlit.err.splitlines() if line.startswith("ftlit: ")]
    assert ftlit.err.rstrip().endswith(sentence), "something is said after the sentence"
    sentence = sentence.removeprefix("ftlit: ").replace(str(tmp_path), ".").replace(tiny_model_folder, "MODEL")
    sentence = sentence.replace(str(trained), "RUN")
    assert len(sentence) < 450, sentence
    found[name] = sentence
    if not WRITE:
        assert sentence == read_table().get(name), "run with FTLIT_WRITE_TABLE=1 and read the difference"


def test_the_table_is_whole():
    assert len(CASES) >= 60
    if not WRITE:
        assert set(read_table()) == set(CASES)
