"""Rows come out of tables as they were put in, whoever wrote them."""

import datetime
import decimal
import json

import datasets
import numpy
import pandas
import pyarrow
import pytest
from pyarrow import ipc, parquet

from ftlit.data.arrow import ArrowRows
from ftlit.data.formats import Messages
from ftlit.data.sources import Source
from ftlit.data.sources import _dataset as dataset_table
from ftlit.errors import DataError

ASK = {"role": "user", "content": "Hi?"}


def row(name, properties, **arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    schema = {"type": "object", "properties": properties, "required": list(arguments)}
    return {
        "messages": [
            ASK,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": '{"ok": 1}', "name": name},
            {"role": "assistant", "content": "Done."},
        ],
        "tools": [{"type": "function", "function": {"name": name, "description": "Does.", "parameters": schema}}],
    }


TEXT, NUMBER = {"type": "string"}, {"type": "integer"}
PLAIN = [row("weather", {"city": TEXT}, city="Rome"), row("stock", {"sym": TEXT, "n": NUMBER}, sym="X", n=3)]
MIXED = [row("weather", {"city": TEXT}, city="Rome"), row("find", {"city": {}}, city=3)]
DEEP = [row("f", {"x": {}}, x={"a": [1, "b", None]}), row("f", {"x": {}}, x="{not json"), row("f", {"x": {}}, x=None)]
ROWS = {"plain": PLAIN, "mixed": MIXED, "deep": DEEP}


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def loaded(path, rows):
    file = lines(path.with_suffix(".source.jsonl"), rows)
    return datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(path.parent / "cache"))


def listed(path, rows):
    return datasets.Dataset.from_list(rows, on_mixed_types="use_json")


def typed(path, rows):
    features = datasets.Features({"messages": datasets.Json(), "tools": datasets.List(datasets.Json())})
    return datasets.Dataset.from_list(rows, features=features)


def as_numpy(rows):
    """What pandas makes of a table: lists become arrays, here also where they lie in objects."""
    return pandas.DataFrame({key: [numpy.array(row[key], dtype=object) for row in rows] for key in rows[0]})


def stripped(path, rows):
    """A file whose features only its metadata knows, as readers without the JSON type of Arrow leave it."""
    table = listed(path, rows).data.table
    text = pyarrow.Table.from_pylist(table.to_pylist())
    return text.replace_schema_metadata(table.schema.metadata)


WRITERS = {
    "loaded.parquet": lambda path, rows: loaded(path, rows).to_parquet(str(path)),
    "listed.parquet": lambda path, rows: listed(path, rows).to_parquet(str(path)),
    "typed.parquet": lambda path, rows: typed(path, rows).to_parquet(str(path)),
    "stripped.parquet": lambda path, rows: parquet.write_table(stripped(path, rows), path),
    "foreign.parquet": lambda path, rows: parquet.write_table(listed(path, rows).data.table, path, store_schema=False),
    "loaded": lambda path, rows: loaded(path, rows).save_to_disk(str(path)),
    "chosen": lambda path, rows: listed(path, rows[::-1]).select(range(len(rows))[::-1]).save_to_disk(str(path)),
    "loaded.jsonl": lambda path, rows: loaded(path, rows).to_json(str(path)),
    "pandas.jsonl": lambda path, rows: pandas.DataFrame(rows).to_json(path, orient="records", lines=True),
    "pandas.json": lambda path, rows: pandas.DataFrame(rows).to_json(path),
    "index.json": lambda path, rows: pandas.DataFrame(rows).to_json(path, orient="index"),
    "split.json": lambda path, rows: pandas.DataFrame(rows).to_json(path, orient="split"),
    "table.json": lambda path, rows: pandas.DataFrame(rows).to_json(path, orient="table"),
    "numpy.csv": lambda path, rows: listed(path, rows).to_pandas().to_csv(path, index=False),
    "struct.csv": lambda path, rows: as_numpy(rows).to_csv(path, index=False),
    "pandas.csv": lambda path, rows: pandas.DataFrame(rows).to_csv(path, index=False),
    "listed.csv": lambda path, rows: listed(path, rows).to_csv(str(path)),
}
# Writers that know no mixed types.
STRICT = {
    "struct.parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(str(path)),
    "struct": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(str(path)),
    "struct.jsonl": lambda path, rows: datasets.Dataset.from_list(rows).to_json(str(path)),
    "struct.arrow": lambda path, rows: write_arrow(path, pyarrow.Table.from_pylist(rows)),
    "pandas.parquet": lambda path, rows: pandas.DataFrame(rows, index=[7, 9]).to_parquet(path),
    "arrays.csv": lambda path, rows: pyarrow.Table.from_pylist(rows).to_pandas().to_csv(path, index=False),
}


def write_arrow(path, table):
    with ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def records(path):
    source = Source(str(path))
    return [source.record(number) for number in range(len(source))]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("writer", WRITERS)
def test_rows_of_any_writer_are_the_rows_that_were_written(tmp_path, writer, rows):
    WRITERS[writer](tmp_path / writer, ROWS[rows])
    assert records(tmp_path / writer) == [Messages()(one) for one in ROWS[rows]]


@pytest.mark.parametrize("writer", STRICT)
def test_what_tables_fill_up_is_not_read(tmp_path, writer):
    STRICT[writer](tmp_path / writer, PLAIN)
    assert records(tmp_path / writer) == [Messages()(one) for one in PLAIN]
    source = Source(str(tmp_path / writer))
    assert source.unread() == []
    if not writer.endswith(("jsonl", "csv")):
        assert any("arguments of calls that are null are read as not given" in note for note in source.notes)


def decoded(rows, kind=None, metadata=None):
    table = pyarrow.Table.from_pylist(rows, schema=kind)
    return list(ArrowRows(table.replace_schema_metadata(metadata) if metadata else table))


def test_maps_are_objects_and_keep_their_nulls():
    text = pyarrow.map_(pyarrow.string(), pyarrow.string())
    kind = pyarrow.schema([("c", pyarrow.list_(pyarrow.struct([("arguments", text), ("x", pyarrow.int64())])))])
    rows = [{"c": [{"arguments": [("city", "Rome"), ("unit", None)], "x": None}, {"arguments": [], "x": 1}]}]
    assert decoded(rows, kind) == [{"c": [{"arguments": {"city": "Rome", "unit": None}}, {"arguments": {}, "x": 1}]}]
    nested = pyarrow.schema([("m", pyarrow.map_(pyarrow.string(), pyarrow.map_(pyarrow.int64(), pyarrow.string())))])
    assert decoded([{"m": [("a", [(1, "x")])]}], nested) == [{"m": {"a": [[1, "x"]]}}]
    twice = decoded([{"m": [("a", "x"), ("a", "y")]}], pyarrow.schema([("m", text)]))
    assert twice == [{"m": [["a", "x"], ["a", "y"]]}]


def test_json_that_only_the_features_know():
    features = {
        "a": {"_type": "Json"},
        "b": {"feature": {"x": {"_type": "Json"}}, "_type": "List"},
        "c": [{"_type": "Json"}],
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    rows = [{"a": '{"x": null}', "b": [{"x": "[1]"}, {"x": "no json"}], "c": ['"3"', "3", None], "d": "[1]"}]
    assert decoded(rows, metadata=metadata) == [
        {"a": {"x": None}, "b": [{"x": [1]}, {"x": "no json"}], "c": ["3", 3, None], "d": "[1]"}
    ]


@pytest.mark.parametrize("size", [2, 512])
def test_rows_that_are_chosen_of_a_table_come_in_their_order(monkeypatch, size):
    monkeypatch.setattr(ArrowRows, "BLOCK", size)
    data = listed(None, PLAIN * 2 + MIXED).select([5, 0, 0, 3, 4])
    assert data._indices is not None
    wanted = [(PLAIN * 2 + MIXED)[number] for number in (5, 0, 0, 3, 4)]
    table = dataset_table(data, "chosen")
    assert list(table.rows) == wanted
    assert len(table.rows) == 5


def test_single_values_inside_of_lists_are_what_json_would_have():
    day = datetime.datetime(2024, 5, 31)
    rows = [{"c": [{"d": day, "t": day.replace(hour=7), "n": decimal.Decimal("1.50"), "i": decimal.Decimal("2.00")}]}]
    assert decoded(rows) == [{"c": [{"d": "2024-05-31", "t": "2024-05-31T07:00:00", "n": 1.5, "i": 2}]}]
    assert decoded([{"d": day}]) == [{"d": day}]


def test_names_that_are_kept_as_numbers():
    names = {"_type": "ClassLabel", "names": ["user", "assistant"]}
    turn = {"role": names, "content": {"dtype": "string", "_type": "Value"}}
    rows = [{"messages": [{"role": 0, "content": "Hi?"}, {"role": 1, "content": "Yes."}], "label": 1}]
    for feature in ([turn], {"feature": turn, "_type": "List"}, {"feature": turn, "_type": "Sequence"}):
        features = {"info": {"features": {"messages": feature, "label": names}}}
        (found,) = decoded(rows, metadata={"huggingface": json.dumps(features)})
        assert [turn["role"] for turn in found["messages"]] == ["user", "assistant"]
        assert found["label"] == 1


def test_an_object_of_lists_is_a_list_of_turns(tmp_path):
    turn = {"from": datasets.List(datasets.Value("string")), "value": datasets.List(datasets.Value("string"))}
    rows = [{"conversations": {"from": ["human", "gpt"], "value": ["Hi?", "Yes."]}}]
    datasets.Dataset.from_list(rows, features=datasets.Features({"conversations": turn})).to_parquet(
        str(tmp_path / "rows.parquet")
    )
    assert [m.content for m in records(tmp_path / "rows.parquet")[0].messages] == ["Hi?", "Yes."]


@pytest.mark.parametrize("metadata", [{}, {"huggingface": "{"}, {"huggingface": "[]"}, {"huggingface": '{"info": 3}'}])
def test_metadata_of_no_meaning_changes_nothing(metadata):
    assert decoded([{"c": ['{"a": 1}']}], metadata=metadata) == [{"c": ['{"a": 1}']}]


def test_dates_that_a_loader_made_of_texts_are_texts_again(tmp_path):
    rows = [row("book", {"day": TEXT}, day="2024-05-31"), row("book", {"day": TEXT}, day="2024-06-01")]
    table = pyarrow.Table.from_pylist(rows)
    days = [row("book", {"day": TEXT}, day=datetime.datetime(2024, *day)) for day in ((5, 31), (6, 1))]
    parquet.write_table(pyarrow.Table.from_pylist(days), tmp_path / "rows.parquet")
    source = Source(str(tmp_path / "rows.parquet"))
    assert [source.record(0), source.record(1)] == [Messages()(one) for one in rows]
    assert [note for note in source.notes if "times inside" in note] == [
        f"{tmp_path}/rows.parquet: times inside of lists are read as texts (day), such as 2024-05-31"
    ]
    assert table.num_rows == 2


# ---- JSON files with their rows inside ------------------------------------------------------------------------------

CHAT = [{"messages": [ASK, {"role": "assistant", "content": "Yes."}]}] * 2


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ({"data": CHAT}, "the rows are those under 'data'"),
        ({"rows": CHAT, "version": "1.0"}, "the rows are those under 'rows'; not read beside them: version"),
        ({"type": "conversation", "instances": CHAT}, "under 'instances'; not read beside them: type"),
        ({"rows": [{"row_idx": i, "row": r, "truncated_cells": []} for i, r in enumerate(CHAT)]}, "under 'rows'"),
        ({"columns": ["messages"], "index": [0, 1], "data": [[r["messages"]] for r in CHAT]}, None),
        ({"messages": {"0": CHAT[0]["messages"], "1": CHAT[1]["messages"]}}, None),
    ],
)
def test_rows_inside_of_an_object(tmp_path, content, note):
    (tmp_path / "rows.json").write_text(json.dumps(content, indent=1))
    assert records(tmp_path / "rows.json") == [Messages()(one) for one in CHAT]
    notes = Source(str(tmp_path / "rows.json")).notes
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]


def test_one_row_is_not_taken_for_many(tmp_path):
    for one in (CHAT[0], {"messages": CHAT[0]["messages"], "data": [{"a": 1}]}):
        (tmp_path / "rows.json").write_text(json.dumps(one))
        assert len(records(tmp_path / "rows.json")) == 1


def test_rows_that_a_viewer_cut_off_are_refused(tmp_path):
    cut = [{"row_idx": 0, "row": CHAT[0], "truncated_cells": ["messages"]}]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": cut}))
    with pytest.raises(DataError, match="row 1: the viewer that wrote it cut cells off; take the data set itself"):
        Source(str(tmp_path / "rows.json"))


def test_what_rows_leave_open_is_counted(tmp_path):
    source = Source(str(lines(tmp_path / "rows.jsonl", [row("f", {"a": TEXT}), CHAT[0]] * 2)))
    assert [source.record(number) for number in range(4)]
    assert source.remarks() == []
    open_rows = [{"messages": row("f", {}, a=None)["messages"]}] * 2
    source = Source(str(lines(tmp_path / "open.jsonl", [*open_rows, CHAT[0]])))
    assert [source.record(number) for number in range(3)]
    assert source.remarks() == [f"{source.name}: 2 rows: calls have arguments that are null: they are kept"]
