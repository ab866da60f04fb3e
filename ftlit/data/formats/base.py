"""The contract of a row format, and the conversation that every format makes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from ftlit.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


class Message(NamedTuple):
    """One turn.

    Attributes:
        role: One of `ROLES`.
        content: Its text.
    """

    role: str
    content: str


class Conversation(NamedTuple):
    """What a chat template renders.

    Attributes:
        messages: The turns in order.
    """

    messages: tuple[Message, ...]


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


class RowFormat(ABC):
    """Reads rows of one shape. No tokenizer and no torch in here.

    Subclass it in a file of your own and name the class under `data.format`; `ftlit.testing.RowFormatSuite` tests a
    subclass in four lines.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    """Columns that a row must have for this format to be chosen by itself; empty: only when named."""

    @abstractmethod
    def __call__(self, row: Mapping[str, Any]) -> Conversation:
        """Reads one row.

        Raises:
            RowError: If the row cannot be read: which column, what it must hold, what it holds.
        """


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


def show(value: Any, limit: int = 60) -> str:
    """A value as it appears in an error, cut to `limit` characters."""
    if value is None:
        return "null or nothing"
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
