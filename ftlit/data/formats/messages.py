"""Rows with a list of messages, as the chat APIs use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from ftlit.data.formats.base import Conversation, RowFormat
from ftlit.data.formats.turns import check_roles, conversation_of


class Messages(RowFormat):
    """`{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`.

    Content may be text or a list of parts, turns may have `from` and `value` instead, and roles the names that other
    tools give them (`developer`, `human`, `model`). Optional: a `system` column, a `tools` column for the chat
    template, a `weight` column, marks of how much a message is trained (`weight`, `train`, `loss` and the like), and
    whatever else the template reads from a message (`tool_calls`, `name`).

    Args:
        column: The column that holds the list.
        roles: Further names of roles, such as `{narrator: user, hero: assistant}`.
    """

    columns: ClassVar[tuple[str, ...]] = ("messages",)
    optional: ClassVar[tuple[str, ...]] = ("system", "tools", "functions", "weight")

    def __init__(self, column: str = "messages", roles: dict[str, str] | None = None) -> None:
        self.column, self.roles = column, check_roles(roles)

    @override
    def __call__(self, row: Mapping[str, Any]) -> Conversation:
        return conversation_of(row, self.column, self.roles)
