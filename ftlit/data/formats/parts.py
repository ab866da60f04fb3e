"""Content that comes as a list of parts, as the newer chat APIs have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ftlit.data.formats.base import RowError
from ftlit.data.formats.calls import calls_in
from ftlit.data.formats.written import parsed

_TEXT = ("text", "input_text", "output_text")
_REASONING = ("reasoning", "reasoning_content", "thinking")
_CALL = ("tool_call", "tool_calls", "tool_use", "toolCall", "function_call")
_RESULT = ("tool_result", "tool_response", "toolResult", "function_response")
_MEDIA = ("image", "video", "audio", "file", "document")
# What a part may carry beside what it says, and no template shows.
_ASIDE = ("type", "cache_control", "signature", "id", "index", "annotations")
_WANTED = "parts of type text, reasoning, tool_call, tool_result or tools"


class Result(NamedTuple):
    """What a tool answered.

    Attributes:
        text: Its answer.
        more: What else is known of it: `tool_call_id`, `name`.
    """

    text: str
    more: Mapping[str, Any]


class Content(NamedTuple):
    """What the parts of a turn say.

    Attributes:
        text: Its texts, one right after the other, as chat templates put them.
        reasoning: Its reasoning.
        calls: Its calls of tools.
        tools: The tools that it brings.
        results: The answers of tools, which come before the text.
    """

    text: str
    reasoning: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    tools: Any = None
    results: tuple[Result, ...] = ()


def are_parts(content: Any) -> bool:
    """Whether content is a list of parts, or a single one."""
    if isinstance(content, Mapping):
        return isinstance(content.get("type"), str)
    if not isinstance(content, list | tuple) or (content and all(isinstance(part, str) for part in content)):
        return False
    return all(isinstance(part, str) or (isinstance(part, Mapping) and _is_part(part)) for part in content)


def _is_part(part: Mapping[str, Any]) -> bool:
    """Whether an object is a part: it has a type, or nothing but a text."""
    return "type" in part or {key for key, value in part.items() if value is not None} == {"text"}


def content_of(content: Any, place: str) -> Content:
    """Reads the parts of a turn.

    Args:
        content: A list of parts, or a single one.
        place: What to call it in an error.

    Raises:
        RowError: If a part is of another kind, is no text, or comes after what chat templates show behind it.
    """
    parts = [content] if isinstance(content, Mapping) else content
    read = _Parts()
    for number, part in enumerate(parts):
        read.add(part, f"{place}[{number}]")
    return Content("".join(read.texts), "".join(read.reasoning), tuple(read.calls), read.tools, tuple(read.results))


class _Parts:
    """The parts of one turn, one after the other."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.results: list[Result] = []
        self.tools: Any = None

    def add(self, part: Any, place: str) -> None:
        """Reads one part.

        Raises:
            RowError: As above.
        """
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise RowError(place, _WANTED, part)
        kind = part.get("type") or "text"
        if kind in _TEXT:
            self._text(part, kind, place)
        elif kind in _REASONING:
            self._in_order(place, part, "reasoning before the text and the calls", self.texts, self.calls)
            self.reasoning.append(_text_in(part, kind, place))
        elif kind in _CALL:
            self.calls += calls_in(_call_in(part, kind), place)
        elif kind in _RESULT:
            self._in_order(place, part, "what tools answered before the text", self.texts)
            self.results.append(_result(part, kind, place))
        elif kind == "tools":
            self.tools = next((part[key] for key in ("tools", "value", "text") if part.get(key) is not None), None)
        else:
            medium = next((name for name in _MEDIA if isinstance(kind, str) and name in kind), None)
            raise RowError(place, f"text: ftlit trains on no {medium}s" if medium else _WANTED, part)

    def _text(self, part: Mapping[str, Any], kind: str, place: str) -> None:
        text = _text_in(part, kind, place)
        if text.strip():
            self._in_order(place, part, "text before the calls", self.calls)
        self.texts.append(text)

    @staticmethod
    def _in_order(place: str, part: Any, wanted: str, *before: Sequence[Any]) -> None:
        if any(before):
            raise RowError(place, f"{wanted}, as chat templates put them", part)


def _text_in(part: Mapping[str, Any], kind: str, place: str) -> str:
    """The text of a part, which may be a list of texts of its own; nothing else may be in it."""
    key = next((key for key in (kind, "text", "value", "content", "summary") if part.get(key) is not None), kind)
    left = {name: value for name, value in part.items() if name not in (key, *_ASIDE) and value not in (None, [], {})}
    if left:
        raise RowError(place, f"nothing but its type and {key}", part)
    value = part.get(key)
    if isinstance(value, list | tuple):
        inner = content_of(value, f"{place}.{key}")
        if inner == Content(inner.text):
            return inner.text
    if not isinstance(value, str):
        raise RowError(f"{place}.{key}", "text", value)
    return value


def _call_in(part: Mapping[str, Any], kind: str) -> Any:
    """The call of a part, or the text of one: under its kind, as `value`, or in the part itself."""
    for key in (kind, "value", "text", "content"):
        if part.get(key) is not None:
            inner = parsed(part[key])
            outer = {"id": part["id"]} if part.get("id") is not None else {}
            return {**outer, **inner} if isinstance(inner, Mapping) else inner
    return {name: value for name, value in part.items() if name not in ("type", "cache_control")}


def _result(part: Mapping[str, Any], kind: str, place: str) -> Result:
    """What a tool answered, and to which call."""
    key = next((key for key in (kind, "content", "value", "text", "output") if part.get(key) is not None), "content")
    value = part.get(key)
    if value is not None and not isinstance(value, str):
        value = _text_in({"type": key, key: [value] if isinstance(value, Mapping) else value}, key, place)
    more = {
        {"tool_use_id": "tool_call_id", "call_id": "tool_call_id"}.get(name, name): inner
        for name, inner in part.items()
        if name not in (key, "type", "cache_control") and inner is not None
    }
    return Result(value or "", more)
