import csv
import gzip
import json

import datasets
import pyarrow
import pytest
from pyarrow import ipc, parquet

from ftlit.data.formats import Alpaca, Messages, RawText, ShareGPT, Text
from ftlit.data.sources import Source
from ftlit.errors import DataError

ROWS = [{"instruction": "1+1", "input": "", "output": "2"}, {"instruction": "wann?", "input": "x\ny", "output": "2020"}]
CHAT = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}] * 2


def csv_text(rows=ROWS, delimiter=","):
    lines = [",".join(rows[0])] if delimiter == "," else [delimiter.join(rows[0])]
    return "\n".join(lines + [delimiter.join('"' + str(v).replace('"', '""') + '"' for v in r.values()) for r in rows])


def write_arrow(path, rows, stream=False):
    table = pyarrow.Table.from_pylist(rows)
    with (ipc.new_stream if stream else ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.jsonl": lambda path: path.write_text("\n".join(json.dumps(row) for row in ROWS)),
    "rows.ndjson": lambda path: path.write_text("\n".join(json.dumps(row) for row in ROWS)),
    "rows.JSONL": lambda path: path.write_text("\n".join(json.dumps(row) for row in ROWS)),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress("\n".join(json.dumps(r) for r in ROWS).encode())),
    "rows.csv": lambda path: path.write_text(csv_text()),
    "crlf.csv": lambda path: path.write_bytes(csv_text().replace('"\n"', '"\r\n"').encode()),
    "bom.csv": lambda path: path.write_bytes(b"\xef\xbb\xbf" + csv_text().encode()),
    "excel.csv": lambda path: path.write_text(csv_text(delimiter=";")),
    "rows.csv.gz": lambda path: path.write_bytes(gzip.compress(csv_text().encode())),
    "rows.tsv": lambda path: path.write_text(csv_text(delimiter="\t")),
    "rows.parquet": lambda path: parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
    "rows.arrow": lambda path: write_arrow(path, ROWS),
    "stream.arrow": lambda path: write_arrow(path, ROWS, stream=True),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(str(path)),
}


def records(name, *args, **settings):
    source = Source(str(name), *args, **settings)
    return [source.record(row) for row in range(len(source))]


def error_of(name, *args, **settings):
    with pytest.raises(DataError) as error:
        records(name, *args, **settings)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_records(tmp_path, name):
    WRITERS[name](tmp_path / name)
    assert records(tmp_path / name) == [Alpaca()(row) for row in ROWS]


def test_arrow_does_not_fill_messages_up_with_nulls(tmp_path):
    rows = [*CHAT, {"messages": [{"role": "user", "content": "hi", "name": "Ada"}, *CHAT[0]["messages"][1:]]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert records(tmp_path / "rows.parquet") == [Messages()(row) for row in rows]


@pytest.mark.parametrize("suffix", [".txt", ".md", ".txt.gz"])
def test_a_text_file_is_one_document(tmp_path, suffix):
    path = tmp_path / f"tale{suffix}"
    path.write_bytes(gzip.compress(b"Once\n\nupon") if suffix.endswith("gz") else b"Once\n\nupon")
    assert records(path) == [Text("Once\n\nupon")]
    assert records(path, Alpaca()) == [Text("Once\n\nupon")]


def test_a_folder_of_mixed_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("no")
    (tmp_path / "b" / "2.txt").write_text("tale")
    (tmp_path / "a.csv").write_text(csv_text())
    (tmp_path / "c.jsonl").write_text(json.dumps({"conversations": [{"from": "human", "value": "q"}]}))
    for name in ("photo.png", "README.md", "LICENSE.txt"):
        (tmp_path / name).write_text("no rows")
    source = Source(str(tmp_path))
    assert [type(read) for read in source.formats] == [Alpaca, RawText, ShareGPT]
    assert [source.where(row) for row in range(4)] == [
        f"{tmp_path}/a.csv, row 1 (line 2)",
        f"{tmp_path}/a.csv, row 2 (line 3)",
        f"{tmp_path}/b/2.txt, row 1",
        f"{tmp_path}/c.jsonl, row 1",
    ]
    assert source.notes == [
        f"{tmp_path}: 4 of 7 files are not read as rows: .git/x.txt, LICENSE.txt, README.md, photo.png"
    ]


def test_splits_on_disk(tmp_path):
    path = tmp_path / "saved"
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    datasets.DatasetDict(splits).save_to_disk(str(path))
    assert len(records(path)) == len(records(f"{path}:train")) == 2
    assert len(records(f"{path}:test")) == len(records(path, prefer="test")) == 1
    assert error_of(f"{path}:trian") == f"{path} has no split 'trian': did you mean 'train'?"
    assert (
        error_of(path, prefer="validation")
        == f"{path} has several splits (train, test); name one, such as {path}:train."
    )


def test_rows_on_disk_keep_their_order(tmp_path):
    chosen = datasets.Dataset.from_list(ROWS * 3).select([5, 0, 2])
    chosen.save_to_disk(str(tmp_path / "saved"))
    assert records(tmp_path / "saved") == [Alpaca()(ROWS[i]) for i in (1, 0, 0)]


def test_a_hub_id_without_the_hub_is_one_sentence():
    text = error_of("nobody/nothing-of-this-name:train")
    assert text.startswith("nobody/nothing-of-this-name:train is no file or folder (looked in ")
    assert "and as a hub id it cannot be had: " in text


# ---- what can be wrong ----------------------------------------------------------------------------------------------

BROKEN = {
    "short.csv": (b"instruction,output\na,b\nc\n", ", row 2 (line 3): has 1 cells where the header has 2; quote"),
    "long.csv": (
        b'instruction,output\n"a\nb",c\na,b,c\n',
        ", row 2 (line 4): has 3 cells where the header has 2; quote",
    ),
    "torn.csv": (b'instruction,output\na,b\nc,"d\n', ", row 2 (line 3): not valid CSV (unexpected end of data)."),
    "quote.csv": (b'instruction,output\na,"b"c\n', ", row 1 (line 2): not valid CSV ("),
    "twice.csv": (b"output,output\na,b\n", ", line 1: the header has the column 'output' twice; rename one."),
    "noname.csv": (b"instruction,,output\na,b,c\n", ", line 1: column 2 of the header has no name; give it one."),
    "header.csv": (b"instruction,output\n", " holds no rows."),
    "empty.csv": (b"", " is empty."),
    "empty.txt": (b" \n", " is empty."),
    "cell.csv": (
        b"instruction,output\na,b\na,\n",
        ", row 2 (line 3): column 'output' must hold non-empty text, got ''.",
    ),
    "nul.jsonl": (b'{"text": "a"}\n{"text": "b\0"}\n', ", line 2: holds a NUL byte, so it is torn or no text; save"),
    "wide.txt": ("Grüße".encode("utf-16"), " is UTF-16; save the file as UTF-8."),
    "latin.csv": ("instruction,output\nGrüße,b\n".encode("latin-1"), ", line 2: not valid UTF-8 ("),
    "torn.parquet": (b"PAR1 and no more", " is torn, or no .parquet file ("),
    "empty.parquet": (b"", " is torn, or no .parquet file ("),
    "torn.arrow": (b"ARROW1\0\0 and no more", " is torn, or no .arrow file ("),
    "torn.jsonl.gz": (gzip.compress(b'{"text": "a"}' * 99)[:-9], " is torn, or no gzip file ("),
    "no.jsonl.gz": (b'{"text": "a"}', " is torn, or no gzip file ("),
    "middle.jsonl.gz": (gzip.compress(bytes(range(256)) * 9)[:20] + b"xx", " is torn, or no gzip file ("),
    "blank.jsonl": (b'\n\n{"text": "a"}\n\n{"text": \n', ", row 2 (line 5): not valid JSON ("),
    "deep.jsonl": (b'{"text": ' + b"[" * 200_000, ", row 1: not valid JSON ("),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_sentence(tmp_path, name):
    content, text = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    assert error_of(tmp_path / name).startswith(f"{tmp_path / name}{text}")


def test_a_torn_real_parquet_file(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS * 500), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert error_of(path).startswith(f"{path} is torn, or no .parquet file (")
    path.write_bytes(content[:200] + bytes(200) + content[400:])
    assert error_of(path).startswith(f"{path} is torn, or no .parquet file (")


def test_folders_without_rows(tmp_path):
    assert error_of(tmp_path).startswith(f"folder {tmp_path} holds no file to read rows from (.json, ")
    (tmp_path / "a.jsonl").write_text("")
    assert error_of(tmp_path) == f"{tmp_path / 'a.jsonl'} is empty."
    assert error_of(f"{tmp_path}:train").endswith("is a folder of files and has no split 'train'; give a file in it.")
    (tmp_path / "state.json").write_text("{")
    assert error_of(tmp_path).startswith(f"{tmp_path} is torn, or no data set saved by save_to_disk (")


def test_the_csv_limit_is_left_as_it_was(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "rows.csv").write_text("text\n" + "a" * 200_000)
    assert len(records(tmp_path / "rows.csv")[0].text) == 200_000
    assert csv.field_size_limit() == before


# ---- columns --------------------------------------------------------------------------------------------------------


def odd(tmp_path):
    path = tmp_path / "odd.csv"
    path.write_text("Frage,Antwort,tool,Quelle\na,b,x,c\n")
    return path


def test_columns_can_be_renamed_and_left_out(tmp_path):
    names = {"instruction": "Frage", "output": "Antwort"}
    source = Source(str(odd(tmp_path)), columns=names)
    assert source.record(0) == Alpaca()({"instruction": "a", "output": "b"})
    assert source.unread() == ["tool", "Quelle"]
    (tmp_path / "bad.csv").write_text("Frage,Antwort\na,\n")
    assert error_of(tmp_path / "bad.csv", columns=names).endswith("column 'Antwort' must hold non-empty text, got ''.")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**CHAT[0], "tools": "nonsense"}))
    assert records(path, columns={"tools": None}) == [Messages()(CHAT[0])]


def test_a_column_that_is_not_there_suggests_the_nearest(tmp_path):
    path = odd(tmp_path)
    assert error_of(path, columns={"instruction": "Frag", "output": "Antwort"}) == (
        f"{path} has no column 'Frag', which data.columns gives for 'instruction': did you mean 'Frage'?"
    )
    assert "Say which is which, such as data.columns: {instruction: Frage, output: Antwort}" in error_of(path)


def test_a_file_that_needs_no_renaming_is_read_beside_one_that_does(tmp_path):
    odd(tmp_path)
    (tmp_path / "plain.json").write_text(json.dumps(ROWS))
    assert len(records(tmp_path, columns={"instruction": "Frage", "output": "Antwort"})) == 3


def test_rows_without_answers_are_read_where_they_are_to_be_answered(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("instruction\nq\n")
    assert "fit no known row format" in error_of(path)
    (record,) = records(path, answers=False)
    assert [message.content for message in record.messages] == ["q"]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "Once"}))
    (record,) = records(tmp_path / "p.jsonl", answers=False)
    assert record.prompt == "Once"
