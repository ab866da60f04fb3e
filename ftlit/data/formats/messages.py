"""Rows with a list of messages, as the chat APIs use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from ftlit.data.formats.base import Conversation, RowFormat, weight_of
from ftlit.data.formats.turns import tools_of, turns_of


class Messages(RowFormat):
    """`{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`.

    Optional: a `tools` column for the chat template, a `weight` column, `weight` or `train` in a message, and
    whatever else the template reads from a message (`tool_calls`, `name`). The role `developer` is `system`.

    Args:
        column: The column that holds the list.
    """

    columns: ClassVar[tuple[str, ...]] = ("messages",)
    optional: ClassVar[tuple[str, ...]] = ("tools", "weight")

    def __init__(self, column: str = "messages") -> None:
        self.column = column

    @override
    def __call__(self, row: Mapping[str, Any]) -> Conversation:
        return Conversation(turns_of(row, self.column), tools_of(row), weight_of(row))
