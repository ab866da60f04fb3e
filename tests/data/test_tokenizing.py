import json
import os
import time

import numpy as np
import pytest

from ftlit.data import tokenizing
from ftlit.data.sources import Source
from ftlit.data.templating import ChatTemplate
from ftlit.data.tokenizing import Progress, tokenize
from ftlit.errors import ConfigError, DataError
from ftlit.testing import tiny_tokenizer
from ftlit.testing.tiny import CHAT_TEMPLATE

ARRAYS = ("ids", "weights", "starts", "stops", "rows", "windowed")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenizing, "CACHED_FROM", 0)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"q{i}" * (i % 7 + 1), "output": f"a{i}" * (i % 11 + 1)} for i in range(700)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def made(path, **settings):
    template = settings.pop("template", None) or ChatTemplate(tiny_tokenizer())
    return tokenize(Source(str(path)), template, **settings)


def same(one, other):
    for name in ARRAYS:
        ours, theirs = getattr(one.examples, name), getattr(other.examples, name)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(one.digests, other.digests)
    np.testing.assert_array_equal(one.split, other.split)
    assert one.refused == other.refused


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir())


class Refusing(ChatTemplate):
    """A template that must not be asked."""

    def encode(self, record):
        raise AssertionError("tokenized again")


def test_a_cache_hit_is_a_miss_bit_for_bit(rows):
    miss = made(rows)
    hit = made(rows, template=Refusing(tiny_tokenizer()))
    assert isinstance(hit.examples.ids, np.memmap)
    same(miss, hit)
    same(miss, made(rows, cache=False))


def test_parallel_is_serial(rows):
    same(made(rows, cache=False, workers=0), made(rows, cache=False, workers=2))


def test_what_matters_is_in_the_key(rows, tmp_path):
    made(rows)
    made(rows, template=ChatTemplate(tiny_tokenizer(), train_on="all"))
    made(rows, template=ChatTemplate(tiny_tokenizer(CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>"))))
    made(rows, change=lambda record: record._replace(weight=2.0))
    bigger = tiny_tokenizer()
    bigger.add_tokens(["q1"])
    made(rows, template=ChatTemplate(bigger))
    assert len(folders(tmp_path)) == 5
    with rows.open("a") as file:
        file.write(json.dumps({"instruction": "new", "output": "new"}) + "\n")
    assert len(made(rows).examples) == 701
    assert len(folders(tmp_path)) == 6


def test_equal_rows_from_another_kind_of_file_are_a_hit(rows, tmp_path):
    miss = made(rows)
    other = tmp_path / "rows.json"
    other.write_text(json.dumps([json.loads(line) for line in rows.read_text().splitlines()]))
    os.utime(other, (1, 1))
    same(miss, made(other, template=Refusing(tiny_tokenizer())))


@pytest.mark.parametrize("torn", ["ids.npy", "index.json"])
def test_a_torn_cache_is_made_again_with_a_word(rows, tmp_path, torn, capsys):
    first = made(rows)
    (name,) = folders(tmp_path)
    path = tmp_path / "cache" / "tokens" / name / torn
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    capsys.readouterr()
    same(first, made(rows))
    assert "are torn (" in capsys.readouterr().out
    same(first, made(rows, template=Refusing(tiny_tokenizer())))


def test_a_cache_that_cannot_be_written_is_said_and_does_not_stop(rows, tmp_path, monkeypatch, capsys):
    first = made(rows, cache=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "file"))
    same(first, made(rows))
    assert capsys.readouterr().out.startswith("tokens are not kept: ")
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr("numpy.save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    same(first, made(rows))
    assert "No space left on device" in capsys.readouterr().out
    assert not any((tmp_path / "other" / "tokens").glob("[!.]*[!k]"))


def test_small_sources_are_not_kept(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "CACHED_FROM", 10**9)
    made(rows)
    assert not (tmp_path / "cache").exists()


def bad_rows(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]} for _ in range(600)
    ]
    lines[300] = {"messages": []}
    lines[20] = {"messages": [{"role": "user", "content": "never answered"}]}
    lines[590] = {"messages": [{"role": "user", "content": "half \ud83d"}, {"role": "assistant", "content": "a"}]}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_skipped_and_named_also_from_the_cache(tmp_path, workers):
    path = bad_rows(tmp_path)
    first, second = (made(path, skip=True, workers=workers) for _ in range(2))
    assert list(first.refused) == [20, 300, 590]
    assert first.refused[20].startswith(f"{path}, row 21: a conversation needs at least one assistant turn")
    assert first.refused[300].startswith(f"{path}, row 301: column 'messages' must hold")
    assert first.refused[590].startswith(f"{path}, row 591: the text cannot be tokenized")
    assert len(first.examples) == 597
    same(first, second)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_bad_row_is_the_error(tmp_path, workers):
    path = bad_rows(tmp_path)
    with pytest.raises(DataError, match=r"row 301: column 'messages'"):
        made(path, workers=workers)  # rows are read before any is rendered
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"messages": []' not in line))
    for _ in range(2):
        with pytest.raises(DataError, match=r"row 21: a conversation needs"):
            made(path, workers=workers)


def test_rows_skipped_once_are_errors_when_skipping_is_not_asked_for(tmp_path):
    path = bad_rows(tmp_path)
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if '"messages": []' not in line))
    with pytest.raises(DataError, match=r"bad\.jsonl, row 21: a conversation needs"):
        made(path)
    assert (len(made(path, skip=True).refused), len(made(path, skip=True).examples)) == (2, 597)
    with pytest.raises(DataError, match=r"bad\.jsonl, row 21: a conversation needs"):
        made(path)


class Dying(ChatTemplate):
    def encode(self, record):
        os._exit(9)


def test_a_process_that_dies_is_one_sentence(rows):
    with pytest.raises(ConfigError, match=r"^a tokenizing process died"):
        made(rows, template=Dying(tiny_tokenizer()), workers=2, cache=False)


def test_equal_rows_share_a_digest(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"instruction": "q", "output": "a"}
    path.write_text("".join(json.dumps(r) + "\n" for r in (row, {**row, "id": 3}, {**row, "output": "b"})))
    digests = made(path).digests
    assert digests[0].tolist() == digests[1].tolist() != digests[2].tolist()


def test_progress_says_nothing_for_what_is_over_soon_and_a_line_now_and_then_else(capsys, monkeypatch):
    progress = Progress(1000, "tokenizing x")
    for _ in range(1000):
        progress.update(1)
    assert capsys.readouterr().out == ""
    clock = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress(1000, "tokenizing x")
    for _ in range(500):
        clock[0] += 0.1
        progress.update(1)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert 1 <= len(lines) <= 3
    assert lines[0].startswith("tokenizing x: 192 of 1,000 rows, 10 a second, 81 s to go")
