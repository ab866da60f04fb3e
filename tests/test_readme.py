"""The README is true: its extension recipes run, its commands exist, its paths are there."""

import inspect
import re
from pathlib import Path
from typing import ClassVar

import pytest

from ftlit.__main__ import MODELS, TRAINING
from ftlit.callbacks import GenerationEval
from ftlit.data.datamodules import SFTData
from ftlit.data.formats import BUILT_IN, detect
from ftlit.data.reading import SUFFIXES
from ftlit.shipped import names
from ftlit.stages import DPO, PPO, SFT, Stage
from ftlit.testing import PEFTStrategySuite, RowFormatSuite, VerifierSuite

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def recipe(name):
    (block,) = [block for block in BLOCKS if f"class {name}(" in block or f"def {name}(" in block]
    scope = {"__name__": "mine"}
    exec(block, scope)
    return scope[name]


class TestBitFitOfTheReadme(PEFTStrategySuite):
    family = "qwen2"

    def make(self):
        return recipe("BitFit")()


class TestQAOfTheReadme(RowFormatSuite):
    golden = (({"q": "Hi?", "a": "Yes."}, (("user", "Hi?"), ("assistant", "Yes."))),)
    bad = (({"q": "Hi?"}, "a"), ({"q": 3, "a": "Yes."}, "q"), ({"q": "Hi?", "a": " "}, "a"))

    def make(self):
        return recipe("QA")()


class TestTheVerifierOfTheReadme(VerifierSuite):
    columns: ClassVar = {"reference": [None, None]}
    right = ("Here it is. Thanks!", "goodbye")
    wrong = ("Thanks, here it is.", "")

    def make(self):
        return recipe("ends_politely")


def test_the_table_of_row_formats():
    """The columns that are named choose the format that is named."""
    table = re.findall(r"^\| (`.*?) \| `(\w+)` \|", README, re.M)
    assert {kind for _, kind in table} == {kind.__name__ for kind in BUILT_IN}
    for columns, kind in table:
        needed = re.findall(r"`(\w+)`", columns.split(";")[0].split("(")[0])
        assert type(detect(needed, "rows")).__name__ == kind


def test_suffixes_and_settings_exist():
    for suffix in SUFFIXES:
        assert suffix == ".ndjson" or f"`{suffix}`" in README
    kinds = {"data": [SFTData], "model": [SFT, DPO, PPO], "trainer.callbacks": [GenerationEval]}
    for place, some in kinds.items():
        known = {name for kind in [*some, Stage] for name in inspect.signature(kind).parameters}
        for name in re.findall(rf"--{place}\.(\w+)", README):
            assert name in known, f"{place}.{name}"


def test_the_objective_of_the_readme():
    import torch

    from ftlit.objectives.scores import TokenScores

    logps = torch.tensor([0.5, 0.25]).log()
    torch.testing.assert_close(
        recipe("Focal")(gamma=1.0)(TokenScores(logps, logps > 0)), torch.tensor([0.5, 0.75]) * -logps
    )


def test_commands_configs_and_scripts_exist():
    for verb in re.findall(r"^ftlit (\w+)", README, re.M):
        assert verb in {**TRAINING, **MODELS}
    for config in re.findall(r"--config ([a-z]+(?:/\w+)?)(?=[\s`])", README):
        assert config in names()
    for script in re.findall(r"scripts/[\w/.]+\w", README):
        assert (ROOT / script).exists()


@pytest.mark.parametrize("name", ["CHANGELOG.md", "LICENSE", ".pre-commit-config.yaml", ".ci/run", "ftlit/py.typed"])
def test_what_belongs_to_a_project_is_there(name):
    assert (ROOT / name).exists()
