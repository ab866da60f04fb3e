"""Rows with a list of messages, as the chat APIs use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from ftlit.data.formats.base import ROLES, Conversation, Message, RowError, RowFormat


class Messages(RowFormat):
    """`{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`.

    Args:
        column: The column that holds the list.
    """

    columns: ClassVar[tuple[str, ...]] = ("messages",)

    def __init__(self, column: str = "messages") -> None:
        self.column = column

    @override
    def __call__(self, row: Mapping[str, Any]) -> Conversation:
        turns = row.get(self.column)
        if not isinstance(turns, list | tuple) or not turns:
            raise RowError(self.column, "a list of at least one message", turns)
        return Conversation(tuple(self._message(number, turn) for number, turn in enumerate(turns)))

    def _message(self, number: int, turn: Any) -> Message:
        place = f"{self.column}[{number}]"
        if not isinstance(turn, Mapping):
            raise RowError(place, "an object with role and content", turn)
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            raise RowError(f"{place}.role", f"one of {', '.join(ROLES)}", role)
        if not isinstance(content, str) or (role != "system" and not content.strip()):
            raise RowError(f"{place}.content", "non-empty text", content)
        return Message(role, content)
