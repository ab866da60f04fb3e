"""Lists of turns, as the formats with conversations have them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ftlit.data.formats.base import ROLES, Conversation, Message, RowError, note, text_of, weight_of
from ftlit.data.formats.calls import calls_in, calls_of, has_nulls, tools_in, tools_of, without_filled
from ftlit.data.formats.marks import MARKS, note_of_others, weight_of_turn
from ftlit.data.formats.parts import are_parts, content_of
from ftlit.data.formats.transcripts import turns_in_text, without_mark
from ftlit.data.formats.written import parsed
from ftlit.errors import ConfigError

CALL = "function_call"
"""The role of a turn that holds nothing but the JSON of a call."""

ROLE_OF: Mapping[str, str] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatbot", "ai", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys((CALL, "function_calls", "tool_call", "tool_calls"), CALL),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
    **dict.fromkeys(("function_response", "tool_response", "tool_result"), "tool"),
}
"""What tools and data sets call a role, in small letters, to its name here."""

# Columns and keys with what is no text.
_MEDIA = ("images", "videos", "audios")
_MEDIUM = ("image", "video", "audio")
_NO_MEDIA = "nothing: ftlit trains on text alone"

_ROLE_KEYS = ("role", "from", "speaker")
_CONTENT_KEYS = ("content", "value", "text", "message", "parts")
_OWN = (*_ROLE_KEYS, "content", "value", "tool_calls", "function_call", *MARKS)
# A question and its answer in one turn, by what they are called.
_ASKED = ("input", "instruction", "prompt", "question", "query")
_ANSWERED = ("output", "response", "completion", "answer")
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


def conversation_of(row: Mapping[str, Any], column: str, roles: Mapping[str, str] | None = None) -> Conversation:
    """A row whose conversation is one column: its turns, with `system`, `tools` and `weight` beside them.

    Args:
        row: The row.
        column: The column of the turns.
        roles: What the turns call a role to its name here, where `ROLE_OF` does not know it.

    Raises:
        RowError: If the row cannot be read.
    """
    refuse_media(row)
    if isinstance(system := row.get("system"), str) and turns_in_text(row.get(column)):
        row = {**row, "system": without_mark(system)}
    messages = with_system_column(turns_of(row, column, roles), row)
    messages, tools = with_tools(messages, tools_of(row))
    return Conversation(messages, tools, weight_of(row))


def turns_of(row: Mapping[str, Any], column: str, roles: Mapping[str, str] | None = None) -> tuple[Message, ...]:
    """A column that holds turns: objects with `role` and `content`, or `from` and `value`; or the text of such a list.

    The content may be text or a list of parts. A turn may carry marks of how much it is trained (see
    `weight_of_turn`), `tool_calls`, or the `function_call` of older rows, and may then be without content; arguments
    become objects. A turn of the role `function_call` holds the JSON of calls and becomes part of the answer that it
    follows. Whatever else a turn carries goes to the chat template, less what is null.

    Args:
        row: The row; its `tools` say which arguments can be null.
        column: The column.
        roles: What the turns call a role to its name here, where `ROLE_OF` does not know it.

    Raises:
        RowError: If it does not hold turns.
    """
    turns = row.get(column)
    if not isinstance(turns, list | tuple) or not all(_has_role(turn) for turn in turns):
        turns = listed(turns)
    if not isinstance(turns, list | tuple) or not turns:
        raise RowError(column, "a list of at least one message", row.get(column))
    names = ROLE_OF if not roles else {**ROLE_OF, **{name.strip().casefold(): role for name, role in roles.items()}}
    read = _Turns(names)
    for number, turn in enumerate(turns):
        read.add(f"{column}[{number}]", turn)
    return _without_filled(read.messages, row, turns) if read.has_nulls else tuple(read.messages)


def listed(turns: Any) -> Any:
    """A list of turns that may be given as text, or as an object of lists, as older data sets have it.

    A turn of several speakers, `{"human": ..., "assistant": ...}`, or of a question and its answer, `{"input": ...,
    "output": ...}`, becomes several; texts alone, of which the second answers the first and so on, become turns of a
    user and an assistant. A text is read by the marks of its speakers.
    """
    turns = turns_in_text(turns) or parsed(turns)
    if isinstance(turns, Mapping):
        lists = {key: value for key, value in turns.items() if value is not None}
        if not lists or any(not isinstance(value, list | tuple) for value in lists.values()):
            return turns
        if len({len(value) for value in lists.values()}) != 1:
            return turns
        turns = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    if not isinstance(turns, list | tuple):
        return turns
    turns = [parsed(turn) for turn in turns]
    if turns and len(turns) % 2 == 0 and all(isinstance(turn, str) for turn in turns):
        note("turns without a role are read as a user's and an assistant's, one after the other")
        return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)]
    return [part for turn in turns for part in _speakers(turn)]


def as_turns(value: Any) -> Any:
    """A list of turns that is given as text, as CSV files have it; anything else, also other text, as it is."""
    if not isinstance(value, str):
        return value
    turns = parsed(value)
    if not isinstance(turns, list | tuple) or not turns:
        return value
    return turns if all(_has_role(turn) for turn in turns) else value


def _has_role(turn: Any) -> bool:
    """Whether a turn is an object that says who speaks."""
    return isinstance(turn, Mapping) and any(key in turn for key in _ROLE_KEYS)


def _speakers(turn: Any) -> list[Any]:
    """The turns of an object that has speakers as its keys; the turn itself where it has not."""
    if not isinstance(turn, Mapping) or _has_role(turn):
        return [turn]
    said = {key: text for key, text in turn.items() if text is not None}
    roles = {key: ROLE_OF.get(key.casefold()) for key in said}
    asked, answered = ([key for key in keys if key in said] for keys in (_ASKED, _ANSWERED))
    if len(asked) == len(answered) == 1:
        roles |= {asked[0]: "user", answered[0]: "assistant"}
    order = ("system", "user", "assistant")
    if not said or not all(role in order for role in roles.values()):
        return [turn]
    return [{"role": roles[key], "content": said[key]} for key in sorted(said, key=lambda key: order.index(roles[key]))]


def check_roles(roles: Mapping[str, str] | None) -> dict[str, str]:
    """The `roles` of a format.

    Raises:
        ConfigError: If it names a role that there is not.
    """
    for name, role in (roles or {}).items():
        if role not in (*ROLES, CALL):
            raise ConfigError(f"data.format: roles gives {name!r} the role {role!r}; it must be one of {_roles()}.")
    return dict(roles or {})


def _roles() -> str:
    return ", ".join(ROLES)


def template_kwargs_of(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The `chat_template_kwargs` column: values for variables of the chat template, as an object or its JSON text.

    What is null in it says nothing: tables put a null where another row has a value.

    Raises:
        RowError: If it holds something else.
    """
    given = parsed(row.get("chat_template_kwargs"))
    if given is None or given == "":
        return None
    if not isinstance(given, Mapping):
        raise RowError("chat_template_kwargs", 'an object such as {"enable_thinking": false}, or its JSON text', given)
    return {str(name): value for name, value in given.items() if value is not None} or None


class _Turns:
    """The messages of one conversation, turn after turn."""

    def __init__(self, roles: Mapping[str, str]) -> None:
        self.roles = roles
        self.messages: list[Message] = []
        self.has_nulls = False

    def add(self, place: str, turn: Any) -> None:
        """Reads one turn."""
        if not isinstance(turn, Mapping):
            raise RowError(place, "an object with role and content", turn)
        if len(turn) == 2 and (message := self._plain(turn)) is not None:
            self.messages.append(message)
            return
        role = self._role(place, turn)
        key, content = _content(place, turn)
        if role == CALL:
            self._add_calls(place, key, content, turn)
        else:
            self._add(place, role, key, content, turn)

    def _plain(self, turn: Mapping[str, Any]) -> Message | None:
        """A turn of a role and its text, as most are; None where it is another one."""
        who, says = ("role", "content") if "content" in turn else ("from", "value")
        role, text = turn.get(who), turn.get(says)
        role = self.roles.get(role) if isinstance(role, str) else None
        if role is None or role == CALL or not isinstance(text, str) or not text.strip():
            return None
        return Message(role, text)

    def _role(self, place: str, turn: Mapping[str, Any]) -> str:
        given = [key for key in _ROLE_KEYS if turn.get(key) is not None] or ["role"]
        roles = [self._named(turn.get(key)) for key in given]
        if roles[0] is None:
            wanted = f"one of {_roles()} (data.format's roles can name others)"
            raise RowError(f"{place}.{given[0]}", wanted, turn.get(given[0]))
        if given[:2] == ["role", "from"] and roles[1] != roles[0]:
            raise RowError(f"{place}.from", f"what role says ({roles[0]}), or nothing", turn["from"])
        return roles[0]

    def _named(self, name: Any) -> str | None:
        """The role that a name means."""
        return self.roles.get(name) or self.roles.get(name.strip().casefold()) if isinstance(name, str) else None

    def _add(self, place: str, role: str, key: str, content: Any, turn: Mapping[str, Any]) -> None:
        more = {k: value for k, value in turn.items() if k not in _OWN and k != key and value is not None}
        _refuse_media_of(place, more)
        calls = calls_of(turn, place)
        if content is None and role == "assistant" and isinstance(more.get("refusal"), str):
            content = more.pop("refusal")
        if content is None and role == "tool":
            content = ""
        if are_parts(content):
            parts = content_of(content, f"{place}.{key}")
            calls += parts.calls
            for result in parts.results:
                self.messages.append(Message("tool", result.text, more=result.more or None))
            if parts.results and not (parts.text or calls):
                return
            if parts.reasoning:
                more["reasoning_content"] = _once(place, "reasoning_content", parts.reasoning, more)
            if parts.tools is not None:
                more["tools"] = _once(place, "tools", parts.tools, more)
            content = parts.text
        elif role == "tool" and not isinstance(content, str):
            content = json.dumps(content, ensure_ascii=False)
        if calls:
            if role != "assistant":
                raise RowError(f"{place}.tool_calls", "calls in a turn of the assistant", role)
            more["tool_calls"] = calls
            self.has_nulls = self.has_nulls or has_nulls(calls)
            content = "" if content is None else content
        blank_is_fine = role in ("system", "tool") or calls
        if not isinstance(content, str) or not (blank_is_fine or content.strip()):
            raise RowError(f"{place}.{key}", "non-empty text", content)
        if role != "assistant":
            note_of_others(turn)
        self.messages.append(Message(role, content, weight_of_turn(turn, place), more or None))

    def _add_calls(self, place: str, key: str, content: Any, turn: Mapping[str, Any]) -> None:
        """Reads a turn that holds the JSON of calls; it belongs to the answer that it follows."""
        text, written = "", content
        if isinstance(content, str) and (thought := _THOUGHT.match(content)):
            text, written = thought[0], content[thought.end() :]
        try:
            calls = calls_in(written, f"{place}.{key}")
        except RowError as error:
            raise RowError(error.column, "the JSON of a call with name and arguments", error.got) from None
        if not calls:
            raise RowError(f"{place}.{key}", "the JSON of a call with name and arguments", content)
        self.has_nulls = self.has_nulls or has_nulls(calls)
        weight = weight_of_turn(turn, place)
        more = {k: value for k, value in turn.items() if k not in _OWN and k != key and value is not None}
        last = self.messages[-1] if self.messages else None
        if last is not None and last.role == "assistant" and last.weight == weight and not (text.strip() or more):
            before = last.more or {}
            calls = [*before.get("tool_calls", ()), *calls]
            self.messages[-1] = last._replace(more={**before, "tool_calls": calls})
        else:
            self.messages.append(Message("assistant", text, weight, {**more, "tool_calls": calls}))


def _content(place: str, turn: Mapping[str, Any]) -> tuple[str, Any]:
    """The key of a turn's content, and the content.

    Raises:
        RowError: If it has two that differ.
    """
    given = [key for key in _CONTENT_KEYS if turn.get(key) is not None]
    if given[:2] == ["content", "value"] and turn["content"] != turn["value"]:
        raise RowError(f"{place}.value", "what content holds, or nothing", turn["value"])
    named = [key for key in _CONTENT_KEYS if key in turn]
    key = (given or named or ["content" if "from" not in turn else "value"])[0]
    return key, turn.get(key)


def _once(place: str, key: str, value: Any, more: Mapping[str, Any]) -> Any:
    """What the parts of a turn say, which the turn itself must not say otherwise."""
    if more.get(key, value) != value:
        raise RowError(f"{place}.{key}", "what the parts of the content say, or nothing", more[key])
    return value


# ---- what belongs to the whole conversation -------------------------------------------------------------------------


def with_system_column(messages: tuple[Message, ...], row: Mapping[str, Any]) -> tuple[Message, ...]:
    """Turns with the row's `system` column before them.

    Raises:
        RowError: If they open with another system turn.
    """
    system = text_of(row, "system", required=False)
    if not system.strip():
        return messages
    if messages[0].role != "system":
        return (Message("system", system), *messages)
    if messages[0].content.strip() != system.strip():
        raise RowError(
            "system",
            "what the system turn says, or nothing (data.columns={system: null} leaves the column out)",
            system,
        )
    return messages


def with_tools(
    messages: tuple[Message, ...], tools: tuple[Mapping[str, Any], ...] | None
) -> tuple[tuple[Message, ...], tuple[Mapping[str, Any], ...] | None]:
    """Turns and tools, with the tools that a turn brings among the tools.

    Raises:
        RowError: If there are others.
    """
    if not any(message.more and "tools" in message.more for message in messages):
        return messages, tools
    left = []
    for message in messages:
        more = dict(message.more or {})
        if "tools" in more:
            own = tools_in(more.pop("tools"), "tools")
            if own and tools and own != tools:
                raise RowError("tools", "the same tools as the turns, or nothing", list(tools))
            tools = tools or own
        left.append(message._replace(more=more or None))
    return tuple(left), tools


def refuse_media(row: Mapping[str, Any]) -> None:
    """Stops where a row has images, videos or audio, which would be trained blindly.

    Raises:
        RowError: Naming the column.
    """
    for column in _MEDIA:
        if not _is_empty(row.get(column)):
            raise RowError(column, _no_media(column), row[column])
    for column in _MEDIUM:
        value = row.get(column)
        if not _is_empty(value) and (not isinstance(value, str) or f"<{column}>" in repr(row)):
            raise RowError(column, _no_media(column), value)


def _no_media(column: str) -> str:
    return f"{_NO_MEDIA} (data.columns={{{column}: null}} leaves the column out, where the texts make sense without)"


def _refuse_media_of(place: str, more: dict[str, Any]) -> None:
    """Stops where a turn has images, videos or audio; takes away what is empty."""
    for key in (*_MEDIA, *_MEDIUM):
        if key in more:
            if not _is_empty(more[key]):
                raise RowError(f"{place}.{key}", _NO_MEDIA, more[key])
            del more[key]


def _is_empty(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_empty(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return all(_is_empty(inner) for inner in value)
    return value is None or (isinstance(value, str) and value.strip() in ("", "[]"))


# ---- nulls ----------------------------------------------------------------------------------------------------------


def _without_filled(
    messages: Sequence[Message], row: Mapping[str, Any], turns: Sequence[Mapping[str, Any]]
) -> tuple[Message, ...]:
    """Messages without the nulls that a table filled the arguments of calls up with."""
    tools = tools_of(row) or ()
    is_filled = any(_is_filled(turn) for turn in turns)
    made = []
    for message in messages:
        more = message.more or {}
        if "tool_calls" in more:
            calls = without_filled(more["tool_calls"], tools, is_filled)
            message = message._replace(more={**more, "tool_calls": calls})
        made.append(message)
    return tuple(made)


def _is_filled(turn: Mapping[str, Any]) -> bool:
    """Whether a turn has a null that only a table puts there: calls in a turn that can hold none, say."""
    role = turn.get("role", turn.get("from"))
    never = {"assistant": ("tool_call_id",), "tool": ("tool_calls", CALL)}
    keys = never.get(role, ("tool_calls", CALL, "tool_call_id")) if isinstance(role, str) else ()
    return any(key in turn and turn[key] is None for key in keys)


__all__ = [
    "CALL",
    "ROLE_OF",
    "as_turns",
    "check_roles",
    "conversation_of",
    "listed",
    "refuse_media",
    "template_kwargs_of",
    "tools_of",
    "turns_of",
    "weight_of_turn",
    "with_system_column",
    "with_tools",
]
