"""Lists of turns, as the formats with conversations have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ftlit.data.formats.base import ROLES, Message, RowError, weight_of

# Names that other tools give a role.
ALIASES = {"developer": "system", "function": "tool"}


def turns_of(row: Mapping[str, Any], column: str) -> tuple[Message, ...]:
    """A column that holds messages with `role` and `content`.

    A message may carry `weight` (0 is not trained) or `train: false`; whatever else it carries, such as `tool_calls`,
    goes to the chat template, less what is null. The content may be missing where there are tool calls.

    Raises:
        RowError: If it does not.
    """
    turns = row.get(column)
    if not isinstance(turns, list | tuple) or not turns:
        raise RowError(column, "a list of at least one message", turns)
    return tuple(_message(f"{column}[{number}]", turn) for number, turn in enumerate(turns))


def _message(place: str, turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(place, "an object with role and content", turn)
    role, content = turn.get("role"), turn.get("content")
    role = ALIASES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise RowError(f"{place}.role", f"one of {', '.join(ROLES)}", role)
    more = {key: value for key, value in turn.items() if key not in _OWN and value is not None}
    calls = more.get("tool_calls")
    if calls is not None and (not isinstance(calls, list | tuple) or not all(isinstance(c, Mapping) for c in calls)):
        raise RowError(f"{place}.tool_calls", "a list of objects", calls)
    if calls is not None and not calls:
        del more["tool_calls"]
    if content is None and calls and role == "assistant":
        content = ""
    blank_is_fine = role in ("system", "tool") or (calls and role == "assistant")
    if not isinstance(content, str) or not (blank_is_fine or content.strip()):
        raise RowError(f"{place}.content", "non-empty text", content)
    return Message(role, content, weight_of_turn(turn, place), more or None)


_OWN = ("role", "content", "weight", "train")


def weight_of_turn(turn: Mapping[str, Any], place: str) -> float:
    """The weight of a message: its `weight`, or 0 where it says `train: false`.

    Raises:
        RowError: If either is of another kind.
    """
    train = turn.get("train")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"{place}.train", "true or false", train)
    return 0.0 if train is False else weight_of(turn, f"{place}.weight")


def tools_of(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    """The `tools` column: a list of JSON schemas, or the JSON text of one; None where there are none.

    Raises:
        RowError: If it holds something else.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise RowError("tools", "a list of tools, or its JSON text", tools) from None
    if not tools and tools in (None, [], ()):
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError("tools", "a list of tools, or its JSON text", tools)
    return tuple(tools)
