"""Rows with a question that is answered by calls of tools, as xLAM has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from ftlit.data.formats.base import Conversation, Message, RowError, RowFormat, text_of, weight_of
from ftlit.data.formats.calls import calls_in, tools_of


class FunctionCalls(RowFormat):
    """`{"query": "...", "tools": [...], "answers": [{"name": "...", "arguments": {...}}]}`; lists may be JSON text.

    The answer is one turn with all the calls. A `system` and a `weight` column are optional.
    """

    columns: ClassVar[tuple[str, ...]] = ("query", "tools", "answers")
    optional: ClassVar[tuple[str, ...]] = ("system", "weight")

    @override
    def __call__(self, row: Mapping[str, Any]) -> Conversation:
        given = self.prompt(row)
        calls = calls_in(row.get("answers"), "answers")
        if not calls:
            raise RowError("answers", "a list of calls with name and arguments, or its JSON text", row.get("answers"))
        answer = Message("assistant", "", more={"tool_calls": calls})
        return given._replace(messages=(*given.messages, answer), weight=weight_of(row))

    @override
    def prompt(self, row: Mapping[str, Any]) -> Conversation:
        tools = tools_of(row)
        if tools is None:
            raise RowError("tools", "a list of tools, or its JSON text", row.get("tools"))
        turns = [Message("user", text_of(row, "query"))]
        if system := text_of(row, "system", required=False):
            turns.insert(0, Message("system", system))
        return Conversation(tuple(turns), tools)
