"""Rows with conversations of `from` and `value`, as ShareGPT has them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from ftlit.data.formats.base import Conversation, Message, RowError, RowFormat, text_of, weight_of
from ftlit.data.formats.turns import tools_of, turns_of, weight_of_turn

ROLE_OF = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "function_call",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_PREFERENCE = (
    "a conversation that ends in an answer (to train on the chosen ones: "
    "data.format={class_path: ShareGPT, init_args: {answer_column: chosen}})"
)


class ShareGPT(RowFormat):
    """`{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}`.

    Turns may have `role` and `content` instead. A `system` column, a `tools` column for the chat template, a `weight`
    column, and `weight` or `train` in a turn are optional. A `function_call` turn holds the JSON of a call (`name`,
    `arguments`) and becomes an assistant turn with `tool_calls`; `observation` is the tool's answer.

    Args:
        answer_column: A column with one more turn, such as `chosen` of preference rows.
    """

    columns: ClassVar[tuple[str, ...]] = ("conversations",)
    optional: ClassVar[tuple[str, ...]] = ("system", "tools", "weight")

    def __init__(self, answer_column: str | None = None) -> None:
        self.answer_column = answer_column

    @override
    def __call__(self, row: Mapping[str, Any]) -> Conversation:
        messages = self._messages(row)
        if self.answer_column is not None:
            messages = (*messages, _turn(self.answer_column, row.get(self.answer_column)))
        elif messages[-1].role == "user" and row.get("chosen") is not None:
            raise RowError("conversations", _PREFERENCE, row["conversations"])
        return Conversation(messages, tools_of(row), weight_of(row))

    @override
    def prompt(self, row: Mapping[str, Any]) -> Conversation:
        messages = self._messages(row)
        if self.answer_column is None and messages[-1].role == "assistant":
            messages = messages[:-1]
        return Conversation(messages, tools_of(row))

    def _messages(self, row: Mapping[str, Any]) -> tuple[Message, ...]:
        turns = row.get("conversations")
        if not isinstance(turns, list | tuple) or not turns:
            raise RowError("conversations", "a list of at least one turn", turns)
        messages: tuple[Message, ...]
        if isinstance(turns[0], Mapping) and turns[0].get("from") is None and "role" in turns[0]:
            messages = turns_of(row, "conversations")
        else:
            messages = tuple(_turn(f"conversations[{number}]", turn) for number, turn in enumerate(turns))
        if (system := text_of(row, "system", required=False)) and messages[0].role != "system":
            messages = (Message("system", system), *messages)
        return messages


def _turn(place: str, turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(place, "an object with from and value", turn)
    name, value = turn.get("from"), turn.get("value")
    role = ROLE_OF.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowError(f"{place}.from", f"one of {', '.join(ROLE_OF)}", name)
    weight = weight_of_turn(turn, place)
    if role == "function_call":
        return Message("assistant", "", weight, {"tool_calls": _calls(f"{place}.value", value)})
    if not isinstance(value, str) or not (role in ("system", "tool") or value.strip()):
        raise RowError(f"{place}.value", "non-empty text", value)
    return Message(role, value, weight)


def _calls(place: str, value: Any) -> list[dict[str, Any]]:
    try:
        calls = json.loads(value)
    except (TypeError, ValueError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowError(place, "the JSON of a call with name and arguments", value)
    return [{"type": "function", "function": call} for call in calls]
