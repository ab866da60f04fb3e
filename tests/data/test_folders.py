"""Which files of a folder hold rows, and of which split."""

import json

import pytest
from datasets.data_files import get_data_patterns, resolve_pattern

from ftlit.data.datamodules import SFTData
from ftlit.data.folders import read_folder
from ftlit.data.sources import Source
from ftlit.errors import DataError
from ftlit.testing import tiny_tokenizer

SPLITS = ("train", "validation", "test")


@pytest.fixture
def lay(tmp_path):
    """Writes files; each row says the name of its file."""

    def lay(*names, **more):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"text": name}) + "\n")
        for name, text in more.items():
            (tmp_path / name.replace("__", ".")).write_text(text)
        return tmp_path

    return lay


def names(folder, rest="", prefer="train"):
    source = Source(f"{folder}{rest}", prefer=prefer)
    return [source.record(row).text for row in range(len(source))]


LAYOUTS = {
    "shards": (*(f"data/{s}-00000-of-00001.jsonl" for s in SPLITS), "data/train-00001-of-00002.jsonl"),
    "shards with hashes": tuple(f"data/{s}-00000-of-00001-0123456789abcdef.jsonl" for s in SPLITS),
    "shards of other names": ("data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"),
    "folders": ("data/train/0.jsonl", "data/train/1.jsonl", "data/dev/0.jsonl", "data/test/0.jsonl"),
    "folders at the top": ("train/a.jsonl", "valid/a.jsonl", "eval/a.jsonl"),
    "names": ("train.jsonl", "val.jsonl", "test.jsonl"),
    "longer names": ("gsm8k_train_v2.jsonl", "gsm8k_dev.jsonl", "gsm8k-test.jsonl"),
    "numbers": ("train0.jsonl", "train1.jsonl", "validation.0.jsonl", "testing 1.jsonl"),
    "words inside words": ("retrain.jsonl", "contest.jsonl", "latest.jsonl", "devil.jsonl", "evaluations.jsonl"),
    "folders win": ("train/test_cases.jsonl", "test/training_of_cats.jsonl"),
    "no train": ("validation.jsonl", "test.jsonl"),
    "no splits": ("a.jsonl", "b/c.jsonl"),
    "hidden": ("train.jsonl", ".cache/test.jsonl", "__pycache__/test.jsonl"),
}  # fmt: skip


def matched(pattern, folder):
    try:
        return resolve_pattern(pattern, str(folder))
    except FileNotFoundError:
        return []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_those_of_datasets(lay, layout):
    folder = lay(*LAYOUTS[layout])
    theirs = {
        str(split): sorted({file for pattern in patterns for file in matched(pattern, folder)})
        for split, patterns in get_data_patterns(str(folder)).items()
    }
    ours = {split or "train": list(map(str, files)) for split, files in read_folder(folder, "f").splits.items()}
    assert ours == theirs


def test_what_datasets_would_leave_is_taken(lay):
    """Files without a split beside a test file are for training, and splits in folders and in names go together."""
    folder = lay("cats.jsonl", "dogs.jsonl", "test.jsonl")
    assert names(folder) == ["cats.jsonl", "dogs.jsonl"]
    assert names(folder, prefer="test") == ["test.jsonl"]
    folder = lay("more/train/a.jsonl", "more/val.jsonl")
    assert names(folder / "more") == ["more/train/a.jsonl"]
    assert names(folder / "more", ":val") == names(folder / "more", prefer="validation") == ["more/val.jsonl"]


def test_a_split_is_asked_for(lay):
    folder = lay(*LAYOUTS["shards"])
    assert names(folder) == [f"data/train-0000{n}-of-0000{n + 1}.jsonl" for n in range(2)]
    for split, asked in (("validation", "validation"), ("validation", "dev"), ("test", "test")):
        assert names(folder, f":{asked}") == [f"data/{split}-00000-of-00001.jsonl"]
    assert names(folder, prefer="validation") == names(folder, ":validation")
    with pytest.raises(DataError, match="has no split 'tset': did you mean 'test'"):
        Source(f"{folder}:tset")
    with pytest.raises(DataError, match="after a folder comes its split"):
        Source(f"{folder}:a:b")


def test_several_splits_of_which_none_is_meant(lay):
    folder = lay(*LAYOUTS["shards of other names"])
    with pytest.raises(DataError, match=rf"has several splits \(test_sft, train_sft\); name one, such as {folder}:"):
        Source(str(folder))
    assert names(folder, ":train_sft") == ["data/train_sft-00000-of-00001.jsonl"]


def test_it_is_said_what_is_taken(lay):
    folder = lay(*LAYOUTS["names"], "README.md")
    assert Source(str(folder)).notes == [
        f"{folder}: 1 of 4 files are not read as rows: README.md",
        f"{folder}: split train (1 file); the others are {folder}:test, {folder}:validation",
    ]
    assert Source(f"{folder}:test").notes == [f"{folder}: 1 of 4 files are not read as rows: README.md"]
    only = lay("only/test.jsonl") / "only"
    assert Source(str(only)).notes == [f"{only}: split test (1 file)"]
    plain = lay("plain/a.jsonl") / "plain"
    assert Source(str(plain)).notes == []


def test_a_name_of_two_splits_is_refused(lay):
    folder = lay("train_test.jsonl", "b.jsonl")
    with pytest.raises(DataError, match=r"the name 'train_test\.jsonl' says train and test"):
        Source(str(folder))


# ---- files beside the rows ------------------------------------------------------------------------------------------

ABOUT = ("README.md", "README_zh.md", "LICENSE", "LICENSE.txt", "LICENSE-MIT.txt", "NOTICE.md", "requirements.txt",
         "requirements-dev.txt", "CITATION.cff", "CONTRIBUTING.md", "how_to.md", "dataset_infos.json",
         "dataset_info.json", "config.json", ".gitattributes", ".git/x.txt", "photo.png", "script.py")  # fmt: skip


@pytest.mark.parametrize("rows", ["rows.jsonl", "data/train-00000-of-00001.jsonl"])
def test_files_about_the_rows_are_none(lay, rows):
    folder = lay(rows, *ABOUT)
    assert names(folder) == [rows]
    assert Source(str(folder)).notes[0].startswith(f"{folder}: {len(ABOUT)} of {len(ABOUT) + 1} files are not read")


def test_a_folder_of_texts_is_a_corpus(lay):
    folder = lay("a.md", "b/c.txt", "test_plan.md", "evaluation.txt", "LICENSE.txt", "README.md")
    assert [len(Source(str(folder)).tables), Source(str(folder)).record(0).text] == [4, '{"text": "a.md"}\n']
    folder = lay("wiki/wiki.train.txt", "wiki/wiki.valid.txt", "wiki/wiki.test.txt") / "wiki"
    assert [table.name for table in Source(str(folder)).tables] == [f"{folder}/wiki.train.txt"]
    assert [table.name for table in Source(f"{folder}:valid").tables] == [f"{folder}/wiki.valid.txt"]


def test_rows_called_like_a_licence_are_rows(lay):
    assert names(lay("license-plates.jsonl", "notice_board.jsonl", "states.json")) == [
        "license-plates.jsonl",
        "notice_board.jsonl",
        "states.json",
    ]


# ---- configs of a card ----------------------------------------------------------------------------------------------

CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: ["main/test-*"]
- config_name: hard
  data_files: hard/*.jsonl
---
# A data set
"""
FILES = ("main/train-00000-of-00001.jsonl", "main/test-00000-of-00001.jsonl", "hard/x.jsonl", "raw/all.jsonl")


def test_configs_of_the_card(lay):
    folder = lay(*FILES, README__md=CARD)
    with pytest.raises(DataError, match=rf"has several configs \(main, hard\); name one, such as {folder}:main"):
        Source(str(folder))
    assert names(folder, ":main") == names(folder, ":main:train") == [FILES[0]]
    assert names(folder, ":main:test") == names(folder, ":main", "test") == [FILES[1]]
    assert names(folder, ":hard") == [FILES[2]]


def test_a_default_config(lay):
    folder = lay(*FILES, README__md=CARD.replace("config_name: main", "config_name: main\n  default: true"))
    assert names(folder) == names(folder, ":train") == [FILES[0]]
    assert names(folder, ":hard") == [FILES[2]]


@pytest.mark.parametrize("card", ["# No data", "---\nlicense: mit\n---\n", "---\n: [\n---\n", "---\nconfigs: 3", ""])
def test_a_card_without_configs(lay, card):
    assert names(lay("train.jsonl", "test.jsonl", README__md=card)) == ["train.jsonl"]


def test_training_and_validation_from_one_folder(lay, capsys):
    folder = str(lay(*LAYOUTS["shards"]))
    data = SFTData(train=folder, validation=folder, test=folder, cache=False)
    data.use_tokenizer(tiny_tokenizer())
    data.setup("fit")
    data.setup("test")
    assert [counts.rows for counts in data.statistics] == [2, 1, 1]
    assert not any(counts.in_train for counts in data.statistics)
    assert "split validation (1 file)" in capsys.readouterr().out
