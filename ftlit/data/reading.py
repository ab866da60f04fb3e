"""Rows of one file, whatever its kind, and what can be wrong with it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ftlit.data.arrow import ArrowRows, notes_of
from ftlit.errors import DataError

TEXTS = (".txt", ".md")
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", *TEXTS)
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")
_PACKED = tuple(suffix for suffix in SUFFIXES if suffix not in (".parquet", ".arrow"))


class Table(NamedTuple):
    """Rows of one file or data set.

    Attributes:
        name: What it is called in errors.
        rows: The rows.
        columns: Every column that a row has.
        lines: The line of the file that each row begins at, where the file has lines.
        is_document: Whether it is one document of raw text.
        notes: What is to be said of how it is read.
    """

    name: str
    rows: Sequence[Mapping[str, Any]]
    columns: list[str]
    lines: Sequence[int] | None = None
    is_document: bool = False
    notes: Sequence[str] = ()

    def place(self, index: int) -> str:
        """A row as an error names it: counted from 1, with its line where that is another number."""
        line = self.lines[index] if self.lines is not None else index + 1
        return f"row {index + 1}" + (f" (line {line})" if line != index + 1 else "")


def suffix_of(path: Path) -> str:
    """The suffix that says how to read a file, `""` where it says nothing; `.gz` may follow it."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        suffix = Path(path.stem).suffix.lower()
        return suffix if suffix in _PACKED else ""
    return suffix if suffix in SUFFIXES else ""


def read_table(path: Path, name: str) -> Table:
    """Reads one file.

    JSON is parsed here and not by `datasets`: its reader names no row, turns texts that look like dates into dates,
    fills objects up with nulls, and answers from its cache when a file changes but its time stamp does not.

    Args:
        path: A file with one of `SUFFIXES`.
        name: What to call it in errors.

    Raises:
        DataError: If it is empty, torn, or not what its suffix says.
    """
    suffix = suffix_of(path)
    if suffix in (".parquet", ".arrow"):
        return _arrow(path, name, suffix)
    text = _text(path, name)
    if suffix in TEXTS:
        if not text.strip():
            raise DataError(f"{name} is empty.")
        return Table(name, [{"text": text}], ["text"], is_document=True)
    if suffix in (".csv", ".tsv"):
        return _csv(text, name, suffix)
    if suffix == ".json":
        return _json(text, name)
    return _lines(text, name)


def _text(path: Path, name: str) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name} is torn, or no gzip file ({error}); make it again.") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{name} is UTF-16; save the file as UTF-8.")
    if (place := data.find(b"\0")) >= 0:
        line = data[:place].count(b"\n") + 1
        raise DataError(f"{name}, line {line}: holds a NUL byte, so it is torn or no text; save the file as UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{name}, line {line}: not valid UTF-8 ({error.reason}); save the file as UTF-8.") from None
    if not text:
        raise DataError(f"{name} is empty.")
    return text


# What files call the list of their rows.
_ROWS = ("data", "rows", "examples", "samples", "records", "instances", "items")
# Columns by which an object is a row itself.
_OF_A_ROW = {"messages", "conversations", "instruction", "prompt", "text", "chosen", "answers", "label"}

# ---- JSON -----------------------------------------------------------------------------------------------------------


class _JSONRows(Sequence[Mapping[str, Any]]):
    """Rows kept as the bytes of their lines and parsed when asked for: a tenth of the memory of Python objects."""

    def __init__(self, lines: list[bytes]) -> None:
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        return json.loads(self._lines[index])


def _json(text: str, name: str) -> Table:
    """A JSON array of rows, an object that has them inside, or a single row; lines of JSON are often `.json` too."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise DataError(f"{name} is not valid JSON: {error}.") from None
        return _lines(text, name)
    rows, notes = (found, []) if isinstance(found, list) else _rows_in(found, name)
    columns: dict[str, None] = {}
    for number, row in enumerate(rows, start=1):
        _check_row(row, f"{name}, row {number}", columns)
    return Table(name, rows, list(columns), notes=notes)


def _rows_in(found: Any, name: str) -> tuple[list[Any], list[str]]:
    """The rows of a JSON object: those that it has under a name for rows, those of a table of pandas, or itself.

    Returns:
        The rows, and what is to be said of what is left.

    Raises:
        DataError: If rows of it are cut off.
    """
    if not isinstance(found, dict):
        return [found], []
    if (rows := _of_pandas(found)) is not None:
        return rows, []
    under = [key for key in _ROWS if isinstance(found.get(key), list) and _are_rows(found[key])]
    if len(under) != 1 or _OF_A_ROW & found.keys():
        return [found], []
    rows, left = found[under[0]], [key for key in found if key != under[0]]
    if rows and all(isinstance(row, dict) and isinstance(row.get("row"), dict) and "row_idx" in row for row in rows):
        if cut := next((number for number, row in enumerate(rows, 1) if row.get("truncated_cells")), None):
            raise DataError(f"{name}, row {cut}: the viewer that wrote it cut cells off; take the data set itself.")
        rows = [row["row"] for row in rows]
    beside = f"; not read beside them: {', '.join(left)}" if left else ""
    return rows, [f"{name}: the rows are those under {under[0]!r}{beside}"]


def _are_rows(rows: list[Any]) -> bool:
    """Whether a list holds objects that are no turns of one conversation."""
    return all(isinstance(row, dict) and not {"role", "from"} & row.keys() for row in rows)


def _of_pandas(found: dict[str, Any]) -> list[Any] | None:
    """The rows of what pandas writes as `columns`, its default, `index` or `split`; None where it is none of them."""
    if set(found) == {"columns", "index", "data"} and all(isinstance(value, list) for value in found.values()):
        return [dict(zip(found["columns"], cells, strict=False)) for cells in found["data"]]
    inner = list(found.values())
    if not inner or not all(isinstance(value, dict) and value for value in inner):
        return None
    if all(key.isdecimal() for key in found):
        return inner
    if all(key.isdecimal() for value in inner for key in value) and len({tuple(value) for value in inner}) == 1:
        return [{column: cells[key] for column, cells in found.items()} for key in inner[0]]
    return None


def _lines(text: str, name: str) -> Table:
    """A row a line; not `splitlines`, because a JSON text may hold other line separators than the line feed."""
    kept: list[bytes] = []
    numbers: list[int] = []
    columns: dict[str, None] = {}
    for number, record in enumerate(text.split("\n"), start=1):
        if record.strip():
            place = f"{name}, row {len(kept) + 1}" + (f" (line {number})" if number != len(kept) + 1 else "")
            try:
                row = json.loads(record)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: not valid JSON ({error}).") from None
            _check_row(row, place, columns)
            kept.append(record.encode())
            numbers.append(number)
    return Table(name, _JSONRows(kept), list(columns), numbers)


def _check_row(row: Any, place: str, columns: dict[str, None]) -> None:
    if not isinstance(row, dict):
        raise DataError(f"{place}: a row must be a JSON object, got {type(row).__name__}.")
    columns.update(dict.fromkeys(row))


# ---- tables ---------------------------------------------------------------------------------------------------------


class _CSVRows(Sequence[Mapping[str, Any]]):
    def __init__(self, columns: list[str], cells: list[list[str]]) -> None:
        self._columns, self._cells = columns, cells

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: Any) -> Any:
        return dict(zip(self._columns, self._cells[index], strict=True))


def _csv(text: str, name: str, suffix: str) -> Table:
    """Every cell is text; an empty one is `""`. A header of semicolons and no comma is what Excel writes in Europe."""
    header = text.split("\n", 1)[0]
    delimiter = "\t" if suffix == ".tsv" else ";" if ";" in header and "," not in header else ","
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        columns: list[str] = []
        cells: list[list[str]] = []
        lines: list[int] = []
        begin = 1
        try:
            for cell in reader:
                if not columns and cell:
                    columns = _header(cell, name)
                elif cell:
                    if len(cell) != len(columns):
                        raise DataError(
                            f"{name}, row {len(cells) + 1} (line {begin}): has {len(cell)} cells where the header has "
                            f"{len(columns)}; quote cells that hold a {'tab' if delimiter == chr(9) else delimiter!r}."
                        )
                    cells.append(cell)
                    lines.append(begin)
                begin = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{name}, row {len(cells) + 1} (line {begin}): not valid CSV ({error}).") from None
    finally:
        csv.field_size_limit(limit)
    return Table(name, _CSVRows(columns, cells), columns, lines)


def _header(cells: list[str], name: str) -> list[str]:
    columns = [cell.strip() for cell in cells]
    for number, column in enumerate(columns):
        if not column:
            raise DataError(f"{name}, line 1: column {number + 1} of the header has no name; give it one.")
        if column in columns[:number]:
            raise DataError(f"{name}, line 1: the header has the column {column!r} twice; rename one.")
    return columns


def _arrow(path: Path, name: str, suffix: str) -> Table:
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if suffix == ".parquet":
            table = parquet.ParquetFile(path).read()
        else:
            source = pyarrow.memory_map(str(path))
            try:
                table = ipc.open_file(source).read_all()
            except pyarrow.ArrowInvalid:
                source.seek(0)
                table = ipc.open_stream(source).read_all()
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{name} is torn, or no {suffix} file ({reason}); make it again.") from None
    columns = table.column_names
    if len(set(columns)) < len(columns):
        double = next(column for column in columns if columns.count(column) > 1)
        raise DataError(f"{name} has the column {double!r} twice; rename one.")
    if index := [column for column in columns if _PANDAS_INDEX.fullmatch(column)]:
        table = table.drop_columns(index)
    return arrow_table(table, name)


def arrow_table(table: Any, name: str, indices: Any = None) -> Table:
    """An Arrow table as rows.

    Args:
        table: The table.
        name: What to call it in errors.
        indices: Which rows of it, in their order; all when left out.
    """
    return Table(name, ArrowRows(table, indices), table.column_names, notes=notes_of(table.schema, name))


__all__ = ["SUFFIXES", "Table", "arrow_table", "read_table", "suffix_of"]
