"""Row formats, one a file, and how one is chosen from the columns."""

from collections.abc import Iterable

from ftlit.data.formats.alpaca import Alpaca
from ftlit.data.formats.base import Conversation, Message, RowError, RowFormat
from ftlit.data.formats.messages import Messages
from ftlit.errors import DataError

BUILT_IN: tuple[type[RowFormat], ...] = (Messages, Alpaca)


def detect(columns: Iterable[str], where: str) -> RowFormat:
    """The format that fits the columns.

    Args:
        columns: The columns of the rows.
        where: The file, for the error.

    Raises:
        DataError: If none fits.
    """
    have = set(columns)
    for kind in BUILT_IN:
        if set(kind.columns) <= have:
            return kind()
    known = "; ".join(f"{kind.__name__} needs {', '.join(kind.columns)}" for kind in BUILT_IN)
    raise DataError(
        f"{where}: columns {', '.join(sorted(have)) or '(none)'} fit no known row format ({known}). "
        "Rename the columns or give data.format a class of your own."
    )


__all__ = ["BUILT_IN", "Alpaca", "Conversation", "Message", "Messages", "RowError", "RowFormat", "detect"]
