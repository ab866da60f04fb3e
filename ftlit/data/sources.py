"""Where rows come from: files, folders, data sets on disk and on the hub, and the samples that ship with ftlit."""

from __future__ import annotations

import contextlib
import difflib
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ftlit.data.folders import Splits, choose, configs, read_folder
from ftlit.data.formats import (
    Comparison,
    Completion,
    Conversation,
    Message,
    RawText,
    Record,
    RowError,
    RowFormat,
    Text,
    detect,
    known_columns,
    suggest,
)
from ftlit.data.formats.base import noting
from ftlit.data.formats.turns import template_kwargs_of
from ftlit.data.reading import SUFFIXES, Table, arrow_table, read_table, suffix_of
from ftlit.errors import DataError, nearest

SAMPLES = Path(__file__).parent / "samples"
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


class Source:
    """The rows of one file, folder or data set.

    Args:
        name: A file (`.json`, `.jsonl`, `.csv`, `.tsv`, `.parquet`, `.arrow`, `.txt`, `.md`; those of text also with
            `.gz`), a folder of such files or one made by `save_to_disk` (`folder:split`, `folder:config:split`), a hub
            id (`org/name`, `org/name:split`, `org/name:config:split`), or `sample:NAME` for rows that ship with ftlit.
            The splits of a folder of files are those that its card or the names of files and folders say, as
            `datasets` has it; its card, licence and other files beside the rows are not read.
        row_format: How to read a row; chosen from the columns when left out.
        columns: The format's name of a column to the file's, where they differ; to null leaves a column out.
        prefer: The split to take where the name says none: `train`, `validation` or `test`.
        answers: Whether rows must have an answer.
        choose: Chooses the format from the columns.
        known: Names the columns that have one meaning under other names than the formats'.

    Raises:
        DataError: If there is no such thing, it holds no rows, or it is torn.
    """

    def __init__(
        self,
        name: str,
        row_format: RowFormat | None = None,
        columns: Mapping[str, str | None] | None = None,
        prefer: str = "train",
        *,
        answers: bool = True,
        choose: Callable[..., RowFormat] = detect,
        known: Callable[..., Mapping[str, str]] = known_columns,
    ) -> None:
        self.name = name
        self.choose, self.known = choose, known
        self.is_sample = name.startswith("sample:")
        self.notes: list[str] = []
        self.answers = answers
        self.tables = self._open(name, prefer)
        self.notes += [note for table in self.tables for note in table.notes]
        self._remarks: Counter[str] = Counter()
        self._starts = [0]
        for table in self.tables:
            self._starts.append(self._starts[-1] + len(table.rows))
        if not len(self):
            raise DataError(f"{name} holds no rows.")
        self._columns = [self._renaming(table, columns or {}) for table in self.tables]
        if row_format is None:
            self._columns = [self._with_known(*both) for both in zip(self.tables, self._columns, strict=True)]
        self.formats = [
            self._format(table, row_format, renamed) for table, renamed in zip(self.tables, self._columns, strict=True)
        ]

    @property
    def row_format(self) -> RowFormat:
        """The format of the first row."""
        return self.formats[0]

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> Mapping[str, Any]:
        """One row with the format's names of its columns."""
        number, _ = self._find(index)
        return _renamed(self.own(index), self._columns[number])

    def own(self, index: int) -> Mapping[str, Any]:
        """One row with the columns of its file."""
        number, place = self._find(index)
        table = self.tables[number]
        row: Mapping[str, Any] = table.rows[place]
        if len(row) < len(table.columns):  # lines of JSON may leave columns out: a file is read in one way
            row = {**dict.fromkeys(table.columns), **row}
        return row

    def named(self, index: int) -> dict[str, Any]:
        """One row with the names that its columns have, and those that the format gives them."""
        return {**self.own(index), **self.row(index)}

    def record(self, index: int) -> Record:
        """What one row becomes.

        Raises:
            DataError: If it cannot be read: file, row, column, what it holds.
        """
        number, _ = self._find(index)
        read = self.formats[number]
        with self.at(index), noting(self._remarks):
            try:
                row = self.row(index)
                return with_template_kwargs(read(row) if self.answers else read.prompt(row), template_kwargs_of(row))
            except RowError as error:
                raise _in_file(error, self._columns[number]) from None

    def remarks(self) -> list[str]:
        """What the rows read so far leave open, and how many of them."""
        return [f"{self.name}: {count:,} row{'s' * (count > 1)}: {note}" for note, count in self._remarks.items()]

    def answered(self, index: int) -> Record | None:
        """What one row becomes with its last answer; None where it has none."""
        number, _ = self._find(index)
        try:
            row = self.row(index)
            return with_template_kwargs(self.formats[number](row), template_kwargs_of(row))
        except RowError:
            return None

    def where(self, index: int) -> str:
        """File and row (counted from 1) of a row."""
        number, place = self._find(index)
        return f"{self.tables[number].name}, {self.tables[number].place(place)}"

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """Adds file and row to a `DataError` raised inside."""
        try:
            yield
        except DataError as error:
            raise DataError(f"{self.where(index)}: {error}") from None

    def read_as(self) -> list[str]:
        """Which formats the rows are read as, and of several files how many are: `2 files as Alpaca (14 rows)`."""
        files: dict[str, list[int]] = {}
        for table, read in zip(self.tables, self.formats, strict=True):
            files.setdefault(type(read).__name__, []).append(len(table.rows))
        if len(self.tables) == 1:
            return [f"as {kind}" for kind in files]
        return [
            f"{len(rows):,} file{'s' * (len(rows) > 1)} as {kind} ({sum(rows):,} row{'s' * (sum(rows) > 1)})"
            for kind, rows in files.items()
        ]

    def unread(self) -> list[str]:
        """Columns that no format reads."""
        names: dict[str, None] = {}
        for table, read, renamed in zip(self.tables, self.formats, self._columns, strict=True):
            if not read.columns:
                continue  # a format that does not say what it reads
            known = {
                *read.columns,
                *read.optional,
                "chat_template_kwargs",
                *(v for v in vars(read).values() if isinstance(v, str)),
            }
            taken = {column for column in renamed.values() if column is not None}
            names.update(dict.fromkeys(c for c in table.columns if c not in taken and c not in known))
        return list(names)

    def _find(self, index: int) -> tuple[int, int]:
        number = bisect_right(self._starts, index) - 1 if len(self.tables) > 1 else 0
        return number, index - self._starts[number]

    def _format(self, table: Table, given: RowFormat | None, renamed: Mapping[str, str | None]) -> RowFormat:
        if table.is_document:
            return given if isinstance(given, RawText) else RawText()
        return given or self.choose(_names(table, renamed), table.name, answers=self.answers)

    def _with_known(self, table: Table, renamed: Mapping[str, str | None]) -> dict[str, str | None]:
        """The renamings of a table, and those of columns that are known by other names, which is said."""
        if table.is_document or not len(table.rows):
            return dict(renamed)
        have = _names(table, renamed)
        found = self.known(have, _renamed(table.rows[0], renamed), answers=self.answers)
        if more := {name: column for name, column in found.items() if name not in renamed}:
            listed = ", ".join(f"{name}: {column}" for name, column in more.items())
            self.notes.append(f"{table.name}: read with data.columns: {{{listed}}}")
        return {**renamed, **more}

    def _renaming(self, table: Table, columns: Mapping[str, str | None]) -> dict[str, str | None]:
        """The renamings that a table needs: none where it has the format's own name, or fits another format as it is.

        Raises:
            DataError: If it has neither name and fits no format.
        """
        if table.is_document:
            return {}
        renamed = {name: column for name, column in columns.items() if column is None or column in table.columns}
        absent = [name for name in columns if name not in renamed and name not in table.columns]
        if not absent or (all(column is None for column in renamed.values()) and self._fits(table)):
            return renamed
        name, column = absent[0], columns[absent[0]]
        likely = suggest(table.columns).get(name)
        hint = f"did you mean {likely!r}?" if likely else nearest(str(column), table.columns)
        raise DataError(f"{table.name} has no column {column!r}, which data.columns gives for {name!r}: {hint}")

    def _fits(self, table: Table) -> bool:
        """Whether a format reads the table without any renaming."""
        try:
            self.choose(table.columns, table.name, answers=self.answers)
        except DataError:
            return False
        return True

    # ---- opening --------------------------------------------------------------------------------------------------

    def _open(self, name: str, prefer: str) -> list[Table]:
        if self.is_sample:
            return [read_table(_sample(name), name)]
        path = Path(name).expanduser()
        if path.is_dir():
            return self._folder(path, name, [], prefer)
        if path.exists():
            if not suffix_of(path):
                raise DataError(
                    f"{name}: rows are read from {', '.join(SUFFIXES)} files, got {path.suffix or 'no suffix'!r}."
                )
            return [read_table(path, name)]
        head, *rest = name.split(":")
        if rest and Path(head).expanduser().is_dir():
            return self._folder(Path(head).expanduser(), head, rest, prefer)
        if _HUB.fullmatch(name.split(":")[0]) and not suffix_of(path):
            return [_from_hub(name, prefer)]
        near = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, near, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise DataError(f"{name} does not exist (looked in {path.absolute().parent}){hint}")

    def _folder(self, path: Path, name: str, rest: list[str], prefer: str) -> list[Table]:
        """The rows of a folder, after whose name a config, a split, or both may be asked for."""
        saved = any((path / mark).exists() for mark in ("dataset_dict.json", "state.json"))
        config = rest[0] if rest and not saved and rest[0] in configs(path) else None
        asked = rest[config is not None :]
        if len(asked) > 1:
            raise DataError(f"{':'.join([name, *rest])}: after a folder comes its split, such as {name}:train.")
        split = asked[0] if asked else None
        if saved:
            return [_from_disk(path, name, split, prefer)]
        splits, beside = read_folder(path, name, config)
        if not splits:
            raise DataError(f"folder {name} holds no file to read rows from ({', '.join(SUFFIXES)}).")
        if split is not None and set(splits) == {""}:
            raise DataError(f"{name} is a folder of files and has no split {split!r}; give a file in it.")
        chosen = choose(name, list(splits), split, prefer)
        self._say_files(path, name, splits, beside, chosen if split is None else None)
        return [read_table(file, str(file)) for file in splits[chosen]]

    def _say_files(self, path: Path, name: str, splits: Splits, beside: list[Path], chosen: str | None) -> None:
        """Notes which files of a folder are left, and which split is taken where none was asked for."""
        if beside:
            count = len(beside) + sum(map(len, splits.values()))
            shown = ", ".join(str(file.relative_to(path)) for file in beside[:5]) + ", ..." * (len(beside) > 5)
            self.notes.append(f"{name}: {len(beside):,} of {count:,} files are not read as rows: {shown}")
        if chosen and set(splits) != {"train"}:
            others = ", ".join(f"{name}:{split}" for split in splits if split != chosen)
            files = f"{len(splits[chosen]):,} file{'s' * (len(splits[chosen]) > 1)}"
            self.notes.append(f"{name}: split {chosen} ({files})" + (f"; the others are {others}" if others else ""))


def _names(table: Table, renamed: Mapping[str, str | None]) -> list[str]:
    """The columns of a table as they are called after a renaming."""
    left = [column for column in table.columns if column not in renamed.values() and column not in renamed]
    return left + [name for name, column in renamed.items() if column is not None]


def _renamed(row: Mapping[str, Any], renamed: Mapping[str, str | None]) -> Mapping[str, Any]:
    """A row with the format's names of its columns."""
    if not renamed:
        return row
    taken = set(renamed.values())
    left = {key: value for key, value in row.items() if key not in taken and key not in renamed}
    return {**left, **{name: row.get(column) for name, column in renamed.items() if column is not None}}


def _sample(name: str) -> Path:
    path = SAMPLES / f"{name.removeprefix('sample:')}.jsonl"
    if not path.exists():
        raise DataError(f"there is no sample {name!r}: {nearest(path.stem, [f.stem for f in SAMPLES.glob('*.jsonl')])}")
    return path


def _from_disk(path: Path, name: str, split: str | None, prefer: str) -> Table:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises what its files make it raise
        raise DataError(f"{name} is torn, or no data set saved by save_to_disk ({_first(error)}).") from None
    if isinstance(data, datasets.DatasetDict):
        data = data[choose(name, list(data), split, prefer)]
    elif split is not None:
        raise DataError(f"{name} has no splits, so there is no {split!r}; give {name} alone.")
    return _dataset(data, name if split is None else f"{name}:{split}")


def _from_hub(name: str, prefer: str) -> Table:
    import datasets

    hub_id, *rest = name.split(":")
    split = rest[-1] if rest else None
    config = rest[0] if len(rest) > 1 else None
    try:
        with _no_bars(datasets):
            known = [] if split else datasets.get_dataset_split_names(hub_id, config)
            split = split or choose(hub_id, known, None, prefer)
            return _dataset(datasets.load_dataset(hub_id, config, split=split), name)
    except DataError:
        raise
    except Exception as error:  # the hub, the network and the data set each raise kinds of their own
        raise DataError(
            f"{name} is no file or folder (looked in {Path.cwd()}), and as a hub id it cannot be had: "
            f"{_first(error).rstrip('.')}; check the name, or give a file."
        ) from None


@contextlib.contextmanager
def _no_bars(datasets: Any) -> Iterator[None]:
    were = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were:
            datasets.enable_progress_bars()


def _dataset(data: Any, name: str) -> Table:
    """A `datasets.Dataset` as a table, in the order of its rows."""
    data = data.with_format(None)
    indices = getattr(data, "_indices", None)
    return arrow_table(data.data.table, name, None if indices is None else indices.table.column(0))


def _first(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _in_file(error: RowError, renamed: Mapping[str, str | None]) -> RowError:
    """The error with the file's name of the column."""
    name = re.split(r"[.\[]", error.column, maxsplit=1)[0]
    column = renamed.get(name)
    return error if column is None else RowError(column + error.column[len(name) :], error.wanted, error.got)


# ---- what is done to every record -----------------------------------------------------------------------------------


def _texts(record: Record) -> list[str]:
    if isinstance(record, Comparison):
        return [text for answer in record.answers for text in _texts(answer)]
    if isinstance(record, Text):
        return [record.text]
    if isinstance(record, Completion):
        return [*(text for text, _ in record.earlier), record.prompt, record.completion]
    return [message.content for message in record.messages]


def fill(record: Record, values: Mapping[str, str]) -> Record:
    """Replaces each `{{key}}` in the texts by its value."""
    if not values:
        return record
    pattern = re.compile("|".join(re.escape("{{" + key + "}}") for key in values))

    def filled(text: str) -> str:
        return pattern.sub(lambda found: values[found[0][2:-2]], text)

    if isinstance(record, Comparison):
        return _each(record, lambda answer: fill(answer, values))
    if isinstance(record, Text):
        return record._replace(text=filled(record.text))
    if isinstance(record, Completion):
        earlier = tuple((filled(text), is_trained) for text, is_trained in record.earlier)
        return record._replace(prompt=filled(record.prompt), completion=filled(record.completion), earlier=earlier)
    return record._replace(messages=tuple(m._replace(content=filled(m.content)) for m in record.messages))


def refuse_placeholders(record: Record) -> None:
    """Stops where a shipped row still has a `{{key}}`.

    Raises:
        DataError: Naming the key and what to set.
    """
    for text in _texts(record):
        if found := re.search(r"\{\{(\w+)\}\}", text):
            raise DataError(f"the placeholder {found[0]} has no value: set data.fill, such as {{{found[1]}: ...}}.")


def with_system(record: Record, system: str | None) -> Record:
    """Puts a system turn before a conversation that has none."""
    if isinstance(record, Comparison):
        return _each(record, lambda answer: with_system(answer, system))
    if system is None or isinstance(record, Text | Completion):
        return record
    if record.messages and record.messages[0].role == "system":
        return record
    given = record.given + 1 if record.given else 0
    return record._replace(messages=(Message("system", system), *record.messages), given=given)


def with_template_kwargs(record: Record, given: Mapping[str, Any] | None) -> Record:
    """Gives a conversation values for variables of the chat template."""
    if given is None:
        return record
    if isinstance(record, Comparison):
        return _each(record, lambda answer: with_template_kwargs(answer, given))
    return record._replace(template_kwargs=given) if isinstance(record, Conversation) else record


def _each(record: Comparison, change: Callable[[Any], Any]) -> Comparison:
    """A comparison with each of its answers changed."""
    return record._replace(answers=tuple(change(answer) for answer in record.answers))
