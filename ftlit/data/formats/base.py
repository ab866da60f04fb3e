"""The contract of a row format, and what every format makes of a row."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple

from ftlit.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


class Message(NamedTuple):
    """One turn.

    Attributes:
        role: One of `ROLES`.
        content: Its text.
        weight: How much its tokens count where they are trained; 0 is not trained.
        more: What else the chat template is handed, such as `tool_calls` or `name`.
    """

    role: str
    content: str
    weight: float = 1.0
    more: Mapping[str, Any] | None = None

    def turn(self) -> dict[str, Any]:
        """The turn as a chat template takes it."""
        return {"role": self.role, "content": self.content, **(self.more or {})}


class Conversation(NamedTuple):
    """What a chat template renders.

    Attributes:
        messages: The turns in order.
        tools: The tools that the chat template is handed, if any.
        weight: How much the trained tokens of the row count.
        given: How many of the first messages are given: their answers are not trained.
        template_kwargs: Values for variables of the chat template, such as `{"enable_thinking": False}`.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    weight: float = 1.0
    given: int = 0
    template_kwargs: Mapping[str, Any] | None = None


class Completion(NamedTuple):
    """Plain text that goes on from plain text, without a chat template.

    Attributes:
        prompt: What is given; not trained.
        completion: What is trained, with the end token after it.
        weight: How much its trained tokens count.
        earlier: Stretches before the prompt, and whether each is trained.
    """

    prompt: str
    completion: str
    weight: float = 1.0
    earlier: tuple[tuple[str, bool], ...] = ()

    @property
    def given(self) -> str:
        """All that stands before the completion."""
        return "".join(text for text, _ in self.earlier) + self.prompt


class Text(NamedTuple):
    """A document: every token is trained; a long one is cut into windows.

    Attributes:
        text: The document.
        weight: How much its tokens count.
    """

    text: str
    weight: float = 1.0


class Comparison(NamedTuple):
    """Answers to one prompt, and how good they are.

    Attributes:
        answers: Each whole, with the prompt that all of them share: conversations with the same first `given` turns,
            or completions of the same prompt. An empty completion, or a conversation of nothing but what is given, is
            an empty answer.
        grades: How good each is: one is preferred to another where its grade is higher. A single answer is good where
            its grade is above 0.
        margin: By how much the better answers are better than the worse ones; 0 where nobody said.
        weight: How much the row counts.
        places: Where each stands among the answers of the row, from 0; in their order when left out.
    """

    answers: tuple[Conversation | Completion, ...]
    grades: tuple[float, ...]
    margin: float = 0.0
    weight: float = 1.0
    places: tuple[int, ...] = ()


Record = Conversation | Completion | Text | Comparison
"""What a row becomes."""


class RowError(DataError):
    """A row that a format cannot read; whoever read the row adds file and number.

    Args:
        column: The column at fault.
        wanted: What it must hold.
        got: What it holds.
    """

    def __init__(self, column: str, wanted: str, got: Any) -> None:
        self.column, self.wanted, self.got = column, wanted, got
        super().__init__(f"column {column!r} must hold {wanted}, got {show(got)}.")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.column, self.wanted, show(self.got))


class RowFormat(ABC):
    """Reads rows of one shape. No tokenizer and no torch in here.

    Subclass it in a file of your own and name the class under `data.format`; `ftlit.testing.RowFormatSuite` tests a
    subclass in four lines.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    """Columns that a row must have for this format to be chosen by itself; empty: only when named."""

    optional: ClassVar[tuple[str, ...]] = ()
    """Columns that are read where they are there."""

    answer: ClassVar[str | None] = None
    """The column that holds nothing but the answer; rows to be answered may leave it out."""

    @abstractmethod
    def __call__(self, row: Mapping[str, Any]) -> Record:
        """Reads one row.

        Raises:
            RowError: If the row cannot be read: which column, what it must hold, what it holds.
        """

    def prompt(self, row: Mapping[str, Any]) -> Conversation | Completion | Text:
        """Reads one row up to where its last answer begins; the answer may be missing.

        Raises:
            RowError: As above.
        """
        if self.answer is not None and not row.get(self.answer):
            row = {**row, self.answer: "-"}
        return unanswered(self(row))


def unanswered(record: Record) -> Conversation | Completion | Text:
    """A record without its last answer."""
    if isinstance(record, Comparison):
        best = record.answers[0]
        if isinstance(best, Conversation):
            return best._replace(messages=best.messages[: best.given], given=0)
        return best._replace(completion="")
    if isinstance(record, Completion):
        return record._replace(completion="")
    if isinstance(record, Conversation) and record.messages and record.messages[-1].role == "assistant":
        return record._replace(messages=record.messages[:-1])
    return record


_notes: ContextVar[Counter[str] | None] = ContextVar("notes", default=None)


def note(sentence: str) -> None:
    """Says something of a row that is read although it leaves a question open; whoever reads the rows counts it."""
    if (notes := _notes.get()) is not None:
        notes[sentence] += 1


@contextmanager
def noting(notes: Counter[str]) -> Iterator[None]:
    """Counts what is noted inside."""
    token = _notes.set(notes)
    try:
        yield
    finally:
        _notes.reset(token)


def likeliest(words: Iterable[str], columns: Iterable[str]) -> str:
    """The column that is called by one of some words, the first of them first, or nearly so; empty where none is."""
    by_fold = {column.casefold(): column for column in columns}
    words = list(words)
    for word in words:
        if word in by_fold:
            return by_fold[word]
    for word in words:
        if close := difflib.get_close_matches(word, by_fold, n=1, cutoff=0.8):
            return by_fold[close[0]]
    return ""


def text_of(row: Mapping[str, Any], column: str, *, required: bool = True) -> str:
    """A column that holds text.

    Args:
        row: The row.
        column: The column.
        required: Whether the text must be there and hold more than white space; else a missing one is `""`.

    Raises:
        RowError: If it does not.
    """
    value = row.get(column)
    if value is None and not required:
        return ""
    if not isinstance(value, str) or (required and not value.strip()):
        raise RowError(column, "non-empty text" if required else "text or null", value)
    return value


def weight_of(row: Mapping[str, Any], place: str = "weight") -> float:
    """The `weight` of a row or a message: 1 when left out.

    Args:
        row: The row or message.
        place: What to call it in an error.

    Raises:
        RowError: If it is not a finite number of at least 0.
    """
    return number_of(row, "weight", 1.0, place)


def number_of(row: Mapping[str, Any], column: str, default: float, place: str | None = None) -> float:
    """A number of at least 0; text that is a number counts, as a CSV file has it.

    Args:
        row: The row or message.
        column: The column.
        default: What it is when left out.
        place: What to call it in an error, if not the column.

    Raises:
        RowError: If it is not a finite number of at least 0.
    """
    value = row.get(column)
    if value is None or value == "":
        return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise RowError(place or column, "a number of at least 0", value)
    return number


def show(value: Any, limit: int = 60) -> str:
    """A value as it appears in an error, cut to `limit` characters."""
    if value is None:
        return "null or nothing"
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
