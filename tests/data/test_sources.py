import json
import os
import re
import subprocess
import sys

import datasets
import pytest

from ftlit.data.formats import Alpaca, Conversation, Message, Messages, detect_preference
from ftlit.data.sources import Source, fill, with_system
from ftlit.errors import DataError

OK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
TURNS = (Message("user", "hi"), Message("assistant", "yo"))
BOM = b"\xef\xbb\xbf"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        if isinstance(content, list):
            content = "\n".join(json.dumps(row, ensure_ascii=False) for row in content) + "\n"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def conversations(source):
    return [source.record(i).messages for i in range(len(source))]


def answered(answer):
    return {"messages": [OK["messages"][0], {"role": "assistant", "content": answer}]}


def read_all(name):
    return conversations(Source(name))


def error_of(name):
    with pytest.raises(DataError) as error:
        read_all(name)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", json.dumps(OK) + "\n" + json.dumps(answered("no")) + "\n"),
        ("rows.jsonl", json.dumps(OK) + "\n" + json.dumps(answered("no"))),
        ("rows.jsonl", json.dumps(OK) + "\r\n" + json.dumps(answered("no")) + "\r\n"),
        ("rows.jsonl", "\n" + json.dumps(OK) + "\n\n  \n" + json.dumps(answered("no")) + "\n\n"),
        ("rows.json", json.dumps([OK, answered("no")])),
        ("rows.json", json.dumps([OK, answered("no")], indent=2)),
        ("rows.json", json.dumps(OK) + "\n" + json.dumps(answered("no"))),
        ("rows.jsonl", BOM + (json.dumps(OK) + "\n" + json.dumps(answered("no"))).encode()),
    ],
    ids=["jsonl", "no-last-newline", "crlf", "blank-lines", "array", "indented", "lines-in-json", "bom"],
)
def test_rows_are_read_in_order(write, name, text):
    source = Source(write(name, text))
    assert conversations(source) == [TURNS, (Message("user", "hi"), Message("assistant", "no"))]
    assert len(source) == 2
    assert type(source.row_format) is Messages


def test_one_indented_object_is_one_row(write):
    assert conversations(Source(write("rows.json", json.dumps(OK, indent=2)))) == [TURNS]


def test_format_is_detected_or_as_given(write):
    rows = [{"instruction": "i", "output": "o", "chat": OK["messages"]}]
    name = write("rows.jsonl", rows)
    assert type(Source(name).row_format) is Alpaca
    assert Source(name, Messages(column="chat")).record(0).messages == TURNS


def test_text_that_looks_like_numbers_stays_text(write):
    rows = [{"instruction": "1+1", "output": "2", "input": "007"}, {"instruction": "10/4", "output": "2.5"}]
    for name in (write("rows.jsonl", rows), write("rows.json", json.dumps(rows))):
        assert [turns[-1].content for turns in conversations(Source(name))] == ["2", "2.5"]
        assert Source(name).record(0).messages[0].content == "1+1\n007"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("kind", ["alpaca", "messages"])
def test_text_that_looks_like_dates_stays_text(write, name, kind):
    if kind == "alpaca":
        rows = [{"instruction": "When?", "output": "2020-01-01"}, {"instruction": "Then?", "output": "2021-02-03"}]
    else:
        rows = [{"messages": [{"role": r, "content": "2020-01-01"} for r in ("user", "assistant")]}] * 2
    source = Source(write(name, json.dumps(rows) if name == "rows.json" else rows))
    assert conversations(source)[0][-1].content == "2020-01-01"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_column_of_mixed_types_does_not_hinder(write, name):
    rows = [{**OK, "id": 1}, {**OK, "id": "two"}, {**OK, "id": [3]}, {**OK, "id": {"n": 4}}, OK]
    source = Source(write(name, json.dumps(rows) if name == "rows.json" else rows))
    assert conversations(source) == [TURNS] * 5


@pytest.mark.parametrize(
    ("bad", "column", "got"),
    [
        ({"messages": "hi"}, "messages", "'hi'"),
        ({"messages": ["hi"]}, "messages[0]", "'hi'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "5"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content", "['a']"),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_row_of_another_type_is_named(write, name, bad, column, got):
    rows = [OK, OK, bad]
    path = write(name, json.dumps(rows) if name == "rows.json" else rows)
    text = error_of(path)
    assert text.startswith(f"{path}, row 3: column '{column}' must hold ")
    assert text.endswith(f", got {got}.")


def test_a_bad_row_is_counted_from_one(write):
    path = write("rows.jsonl", [OK, {"messages": []}])
    assert error_of(path) == f"{path}, row 2: column 'messages' must hold a list of at least one message, got []."
    assert Source(path).record(0).messages == TURNS


def test_a_missing_column_is_named_by_row(write):
    path = write("rows.jsonl", [{"instruction": "i", "output": "o"}, {"instruction": "i"}])
    assert error_of(path) == f"{path}, row 2: column 'output' must hold non-empty text, got null or nothing."


def test_at_adds_file_and_row_and_keeps_the_kind_of_error(write):
    source = Source(write("rows.jsonl", [OK] * 7))
    with pytest.raises(DataError, match=r"rows\.jsonl, row 7: too odd$"), source.at(6):
        raise DataError("too odd")
    with pytest.raises(KeyError), source.at(6):
        raise KeyError("x")


def test_torn_jsonl_names_the_row(write):
    path = write("rows.jsonl", json.dumps(OK) + "\n" + json.dumps(OK)[:30])
    assert error_of(path).startswith(f"{path}, row 2: not valid JSON (")


def test_torn_row_after_a_unicode_line_separator_is_still_row_2(write):
    path = write("rows.jsonl", json.dumps(answered("a\u2028b"), ensure_ascii=False) + "\n" + json.dumps(OK)[:30])
    assert error_of(path).startswith(f"{path}, row 2: not valid JSON (")


def test_torn_json_array_says_where(write):
    path = write("rows.json", "[" + json.dumps(OK) + ",\n")
    assert error_of(path).startswith(f"{path} is not valid JSON: ")
    assert "line 2 column 1" in error_of(path)


@pytest.mark.parametrize(
    ("rows", "row", "kind"), [("1\n2\n", 1, "int"), (json.dumps(OK) + "\n[1]\n", 2, "list"), ("[1]\n{}\n", 1, "list")]
)
def test_a_row_that_is_no_object_is_named(write, rows, row, kind):
    path = write("rows.jsonl", rows)
    assert error_of(path) == f"{path}, row {row}: a row must be a JSON object, got {kind}."


@pytest.mark.parametrize(
    "content",
    [
        b'{"instruction": "i", "output": "o"}\n{"instruction": "caf\xe9", "output": "o"}\n',
        b'{"messages": [{"role": "user", "content": "hi"}]}\n{"messages": [{"role": "user", "content": "\xff"}]}\n',
    ],
    ids=["alpaca", "messages"],
)
def test_invalid_utf8_in_jsonl_names_file_and_line(write, content):
    path = write("rows.jsonl", content)
    text = error_of(path)
    assert re.match(r", (line|row) 2: not valid UTF-8 \(", text.removeprefix(path))


def test_invalid_utf8_in_json_names_file_and_line(write):
    path = write("rows.json", b'[{"instruction": "i",\n "output": "caf\xe9"}]')
    assert error_of(path) == f"{path}, line 2: not valid UTF-8 (invalid continuation byte); save the file as UTF-8."


def test_empty_file_is_refused(write):
    path = write("rows.jsonl", "")
    assert error_of(path) == f"{path} is empty."


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", "\n \n"), ("b.json", "[]"), ("c.json", "[\n]\n")])
def test_file_without_rows_is_refused(write, name, text):
    path = write(name, text)
    assert error_of(path) == f"{path} holds no rows."


def test_file_of_a_lone_null_is_refused_and_does_not_crash(write, tmp_path):
    path = write("rows.jsonl", "null\n")
    code = (
        "import sys; from ftlit.data.sources import Source; from ftlit.errors import DataError\n"
        "try: Source(sys.argv[1])\nexcept DataError as error: print(error)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, path],
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert child.returncode == 0
    assert f"{path}, row 1: a row must be a JSON object" in child.stdout


def test_missing_file_suggests_the_nearest_name(write, tmp_path):
    write("training_rows.jsonl", [OK])
    wanted = str(tmp_path / "trainingrows.jsonl")
    assert error_of(wanted) == (f"{wanted} does not exist (looked in {tmp_path}); did you mean 'training_rows.jsonl'?")


def test_missing_file_without_a_near_name_says_where_it_looked(tmp_path):
    wanted = str(tmp_path / "nowhere" / "rows.jsonl")
    assert error_of(wanted) == f"{wanted} does not exist (looked in {tmp_path / 'nowhere'})."


@pytest.mark.parametrize(
    ("name", "suffix"), [("rows.xlsx", ".xlsx"), ("rows", "no suffix"), ("rows.gz", ".gz"), ("rows.parquet.gz", ".gz")]
)
def test_wrong_suffix_is_refused(write, name, suffix):
    path = write(name, [OK])
    assert error_of(path) == (
        f"{path}: rows are read from .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow, .txt, .md files, "
        f"got '{suffix}'."
    )


def test_a_home_folder_is_expanded(write, tmp_path, monkeypatch):
    write("rows.jsonl", [OK])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert conversations(Source("~/rows.jsonl")) == [TURNS]


@pytest.mark.parametrize("same_time", [False, True])
def test_a_rewritten_file_is_read_anew(write, same_time):
    for answer in ("one", "two"):
        path = write("rows.jsonl", [{"instruction": "i", "output": answer}])
        if same_time:  # as after `cp -p`, or from an archive with fixed times
            os.utime(path, (1_000_000_000, 1_000_000_000))
        assert Source(path).record(0).messages[1].content == answer


def test_columns_of_every_row_count_where_arrow_cannot_read(write):
    # Half of a surrogate pair, as text cut in the middle of an emoji has it: Arrow refuses the file.
    path = write("rows.jsonl", '{"instruction": "a\\ud83d"}\n{"instruction": "b", "output": "p"}\n')
    assert Source(path).record(1).messages == (Message("user", "b"), Message("assistant", "p"))
    assert error_of(path) == f"{path}, row 1: column 'output' must hold non-empty text, got null or nothing."


@pytest.mark.parametrize(("name", "rows"), [("identity", 104), ("general", 150)])
def test_samples_load(name, rows):
    source = Source(f"sample:{name}")
    assert len(source) == rows
    assert all(turns[-1].role == "assistant" for turns in conversations(source))


def test_identity_sample_has_both_placeholders_and_fill_leaves_none():
    filled = ""
    for turns in conversations(Source("sample:identity")):
        conversation = fill(Conversation(turns), {"name": "Nova", "author": "Acme"})
        filled += "".join(message.content for message in conversation.messages)
    assert "{{" not in filled
    assert filled.count("Nova") > 50
    assert filled.count("Acme") > 10


def test_unknown_sample_suggests_the_nearest():
    assert error_of("sample:identiti") == "there is no sample 'sample:identiti': did you mean 'identity'?"


CHAT = Conversation((Message("user", "I am {{user}}"), Message("assistant", "I am {{name}}, {{name}}.")))


def test_fill_replaces_every_placeholder_and_leaves_others():
    filled = (Message("user", "I am {{user}}"), Message("assistant", "I am Nova, Nova."))
    assert fill(CHAT, {"name": "Nova"}).messages == filled
    assert fill(CHAT, {}) is CHAT


def test_system_turn_is_put_first_only_where_none_is():
    assert with_system(CHAT, "be kind").messages == (Message("system", "be kind"), *CHAT.messages)
    assert with_system(CHAT, "").messages[0] == Message("system", "")
    assert with_system(CHAT, None) is CHAT
    own = Conversation((Message("system", "mine"), *CHAT.messages))
    assert with_system(own, "be kind") is own


def test_columns_that_one_file_lacks_do_not_matter_where_it_fits(write):
    """Whole conversations beside pairs whose prompt is called otherwise."""
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    other = [turns[0], {"role": "assistant", "content": "No."}]
    path = write("whole.jsonl", json.dumps({"chosen": turns, "rejected": other}) + "\n")
    source = Source(str(path), None, {"prompt": "question", "margin": None}, choose=detect_preference)
    assert len(source.record(0).answers) == 2
