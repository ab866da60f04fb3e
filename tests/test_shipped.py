from pathlib import Path

import pytest

from ftlit.errors import ConfigError
from ftlit.shipped import config_dir, names, resolve, resolve_all


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_shipped_file_is_listed_by_name():
    files = {file for file in config_dir().rglob("*") if file.is_file()}
    assert {config_dir() / f"{name}.yaml" for name in names()} == files
    assert names() == sorted(names())
    assert {"base", "sft", "peft/full", "peft/lora", "peft/prefix_tuning", "peft/prompt_tuning"} <= set(names())


def test_every_listed_name_resolves_to_its_file():
    for name in names():
        assert Path(resolve(name)) == config_dir() / f"{name}.yaml"


@pytest.mark.parametrize(
    ("short", "long"), [("sft", "configs/sft.yaml"), ("peft/lora", "configs/peft/lora.yaml"), ("sft", "sft.yaml")]
)
def test_short_and_long_names_mean_the_same_file(short, long):
    assert resolve(short) == resolve(long)
    assert Path(resolve(short)).is_file()


def test_a_file_of_that_path_wins(tmp_path):
    (tmp_path / "sft.yaml").write_text("a: 1\n", encoding="utf-8")
    assert resolve("sft.yaml") == "sft.yaml"
    assert Path(resolve("sft")) == config_dir() / "sft.yaml"
    assert resolve(str(tmp_path / "sft.yaml")) == str(tmp_path / "sft.yaml")


def test_a_folder_of_that_name_does_not(tmp_path):
    (tmp_path / "sft").mkdir()
    assert Path(resolve("sft")) == config_dir() / "sft.yaml"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("stf", "did you mean 'sft'?"),
        ("peft/lroa", "did you mean 'peft/lora'?"),
        ("peft/LoRA", "did you mean 'peft/lora'?"),
        ("lora", "did you mean 'peft/lora'?"),
        ("configs/peft/prefix.yaml", "did you mean 'peft/prefix_tuning'?"),
    ],
)
def test_unknown_name_suggests_the_nearest(name, hint):
    with pytest.raises(ConfigError) as error:
        resolve(name)
    assert str(error.value) == f"config {name!r} is neither a file nor a shipped config: {hint}"


def test_name_without_a_near_one():
    with pytest.raises(ConfigError, match="'zzzzzz' is neither a file nor a shipped config: ftlit configs lists those"):
        resolve("zzzzzz")


@pytest.mark.parametrize("name", ["", "."])
def test_empty_name_is_a_config_error(name):
    with pytest.raises(ConfigError, match="is neither a file nor a shipped config"):
        resolve(name)


@pytest.mark.parametrize("name", ["sft.txt", "peft/lora.json", "sft.yaml.bak"])
def test_another_suffix_is_not_taken_for_a_shipped_config(name):
    with pytest.raises(ConfigError, match="is neither a file nor a shipped config"):
        resolve(name)


def test_every_config_argument_is_resolved_and_nothing_else():
    sft, lora = (str(config_dir() / f"{name}.yaml") for name in ("sft", "peft/lora"))
    args = ["fit", "-c", "sft", "--config=peft/lora", "--config", "sft", "--data.train", "sft", "--config"]
    assert resolve_all(args) == [
        "fit",
        "-c",
        sft,
        f"--config={lora}",
        "--config",
        sft,
        "--data.train",
        "sft",
        "--config",
    ]
    assert resolve_all([]) == []


def test_unknown_config_argument_is_refused():
    for args in (["fit", "--config", "stf"], ["fit", "--config=stf"], ["fit", "-c", "stf"]):
        with pytest.raises(ConfigError, match="did you mean 'sft'"):
            resolve_all(args)
