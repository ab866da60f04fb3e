"""Rows from files: JSON and JSONL through `datasets`, and the samples that ship with ftlit."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftlit.data.formats import Conversation, Message, RowFormat, detect
from ftlit.errors import DataError, nearest

SAMPLES = Path(__file__).parent / "samples"
_SUFFIXES = (".json", ".jsonl")


class Source:
    """The rows of one file.

    Args:
        name: A `.json` or `.jsonl` file, or `sample:NAME` for rows that ship with ftlit.
        row_format: How to read a row; chosen from the columns when left out.

    Raises:
        DataError: If there is no such file, or it is empty or torn.
    """

    def __init__(self, name: str, row_format: RowFormat | None = None) -> None:
        self.name = name
        self.is_sample = name.startswith("sample:")
        self.path = _path_of(name)
        self.rows: Sequence[Mapping[str, Any]] = _read(self.path, name)
        if not len(self.rows):
            raise DataError(f"{name} holds no rows.")
        self.row_format = row_format or detect(_columns(self.rows), name)

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int) -> Conversation:
        """One row as a conversation.

        Raises:
            DataError: If it cannot be read: file, row, column, what it holds.
        """
        with self.at(index):
            return self.row_format(self.rows[index])

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """Adds file and row (counted from 1) to a `DataError` raised inside."""
        try:
            yield
        except DataError as error:
            raise DataError(f"{self.name}, row {index + 1}: {error}") from None


def fill(conversation: Conversation, values: Mapping[str, str]) -> Conversation:
    """Replaces each `{{key}}` in the messages by its value."""
    if not values:
        return conversation
    pattern = re.compile("|".join(re.escape("{{" + key + "}}") for key in values))
    return Conversation(
        tuple(
            Message(role, pattern.sub(lambda found: values[found[0][2:-2]], content))
            for role, content in conversation.messages
        )
    )


def refuse_placeholders(conversation: Conversation) -> None:
    """Stops where a shipped row still has a `{{key}}`.

    Raises:
        DataError: Naming the key and what to set.
    """
    for _, content in conversation.messages:
        if found := re.search(r"\{\{(\w+)\}\}", content):
            raise DataError(f"the placeholder {found[0]} has no value: set data.fill, such as {{{found[1]}: ...}}.")


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """Puts a system turn before a conversation that has none."""
    if system is None or conversation.messages[0].role == "system":
        return conversation
    return Conversation((Message("system", system), *conversation.messages))


def _path_of(name: str) -> Path:
    if name.startswith("sample:"):
        path = SAMPLES / f"{name.removeprefix('sample:')}.jsonl"
        if not path.exists():
            known = [file.stem for file in SAMPLES.glob("*.jsonl")]
            raise DataError(f"there is no sample {name!r}: {nearest(path.stem, known)}")
        return path
    path = Path(name).expanduser()
    if not path.exists():
        near = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, near, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise DataError(f"{name} does not exist (looked in {path.absolute().parent}){hint}")
    if not path.is_file():
        raise DataError(f"{name} is a folder; give a {' or '.join(_SUFFIXES)} file.")
    if path.suffix not in _SUFFIXES:
        raise DataError(
            f"{name}: rows are read from {' or '.join(_SUFFIXES)} files, got {path.suffix or 'no suffix'!r}."
        )
    return path


def _read(path: Path, name: str) -> Sequence[Mapping[str, Any]]:
    """The rows as a `datasets.Dataset`, or as they are where Arrow has no one type for a column.

    Parsed here and not by `datasets`: its JSON reader names no row, turns texts that look like dates into dates, and
    answers from its cache when a file changes but its time stamp does not.
    """
    rows = _parse(path, name)
    columns = {key: None for row in rows for key in row}
    import datasets
    import pyarrow

    try:
        return datasets.Dataset.from_dict({key: [row.get(key) for row in rows] for key in columns})
    except (pyarrow.ArrowException, UnicodeError, TypeError, ValueError):
        return rows


def _parse(path: Path, name: str) -> list[Mapping[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{name}, line {line}: not valid UTF-8 ({error.reason}); save the file as UTF-8.") from None
    if not text:
        raise DataError(f"{name} is empty.")
    rows: list[Any] = _whole(text, name) if path.suffix == ".json" else _lines(text, name)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{name}, row {number}: a row must be a JSON object, got {type(row).__name__}.")
    return rows


def _whole(text: str, name: str) -> list[Any]:
    """A JSON array of rows, or a single row; lines of JSON are often called `.json` too."""
    try:
        rows = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("["):
            raise DataError(f"{name} is not valid JSON: {error}.") from None
        return _lines(text, name)
    return rows if isinstance(rows, list) else [rows]


def _lines(text: str, name: str) -> list[Any]:
    """A row a line; not `splitlines`, because a JSON text may hold other line separators than the line feed."""
    rows = []
    for record in text.split("\n"):
        if record.strip():
            try:
                rows.append(json.loads(record))
            except ValueError as error:
                raise DataError(f"{name}, row {len(rows) + 1}: not valid JSON ({error}).") from None
    return rows


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = getattr(rows, "column_names", None)
    return list(names) if names is not None else sorted({name for row in rows for name in row})
