"""Whether a template shows everything that a row says.

Templates leave out without a word what they do not know: a field, a second call, a tool's answer. So a copy of the
turns in which every text is a mark of its own is rendered, once for each shape of turns; a mark that does not show is a
text that would be lost. Templates also look into texts (they cut at `</think>`, say), so the texts themselves are then
sought as well, in the order of the marks, white space aside, and as JSON or markup writes them.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ftlit.data.formats.base import Message, show
from ftlit.data.prefixes import Prefixes
from ftlit.data.rendering import REASONING, Options, Renderer, Tools, arguments_of, calls_of, name_of, reasoning_of
from ftlit.errors import DataError

# Words in texts that templates read as switches, and take out.
_SWITCHES = re.compile(r"/(?:no_?think|think|system_override)\b")
_THOUGHT = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]")
_TAGS = re.compile(r"</?(?:think|thinking|thought|reasoning)>|\[/?THINK\]")
_NO_LETTERS = re.compile(r"[\W_]+")
_MOST_SHAPES = 4096


class _Slot(NamedTuple):
    """A place of a row that holds text.

    Attributes:
        turn: Number of the turn; -1 for the tools.
        kind: `content`, `reasoning`, `name` (of a call), `arguments`, or `tool`.
        number: Which of the calls or tools.
    """

    turn: int
    kind: str
    number: int = 0


class _Shape(NamedTuple):
    """What a template does with turns of one shape.

    Attributes:
        order: The slots that show, in the order in which they do.
        lost: Those that do not.
        known: Whether the template could be asked at all.
    """

    order: tuple[_Slot, ...]
    lost: tuple[_Slot, ...]
    known: bool = True


class Shown:
    """Checks renderings against what they are made of.

    Args:
        render: The renderer.
    """

    def __init__(self, render: Renderer) -> None:
        self.render = render
        self._shapes: dict[Any, _Shape] = {}
        self._answers: dict[Any, dict[int, _Shape]] = {}

    def history(
        self,
        text: str | None,
        messages: Sequence[Message],
        tools: Tools = None,
        options: Options = None,
        *,
        prompt: bool,
    ) -> None:
        """Checks a text that shows some turns, as the model is fed it.

        What earlier answers thought, and what they said beside a call, may be gone where the template shows it only in
        the last turn.

        Args:
            text: The rendered text; None to go by marks alone.
            messages: The turns.
            tools: The tools.
            options: Variables of the template.
            prompt: Whether the text ends where the next answer starts.

        Raises:
            DataError: Naming the first text that is lost.
        """
        shape = self._shape(messages, tools, options, prompt)
        last = len(messages) - 1 if not prompt and messages and messages[-1].role == "assistant" else -1
        wanted = [slot for slot in _slots(messages, tools) if slot.kind != "reasoning" or slot.turn == last]
        for slot in wanted:
            if slot in shape.lost and not self._goes(slot, messages, tools, options):
                raise _lost(slot, messages, tools)
        if text is not None:
            _seek(text, shape, wanted, messages, tools, last)

    def answers(self, messages: Sequence[Message], numbers: Sequence[int], tools: Tools, options: Options) -> Answers:
        """What checks the texts of some answers of a conversation."""
        key = (self._key(messages, tools, options), tuple(numbers))
        if key not in self._answers:
            if len(self._answers) >= _MOST_SHAPES:
                self._answers.clear()
            self._answers[key] = self._asked_answers(messages, numbers, tools, options)
        return Answers(self._answers[key], messages)

    # ---- by marks -------------------------------------------------------------------------------------------------

    def _goes(self, slot: _Slot, messages: Sequence[Message], tools: Tools, options: Options) -> bool:
        """Whether the template shows a text of an earlier answer as long as no turn follows."""
        if slot.turn < 0 or slot.kind != "content" or not calls_of(messages[slot.turn]):
            return False
        return slot not in self._shape(messages[: slot.turn + 1], tools, options, False).lost

    @staticmethod
    def _key(messages: Sequence[Message], tools: Tools, options: Options) -> tuple[Any, ...]:
        return tuple(map(_form, messages)), len(tools or ()), json.dumps(options, default=str)

    def _shape(self, messages: Sequence[Message], tools: Tools, options: Options, prompt: bool) -> _Shape:
        key = (self._key(messages, tools, options), prompt)
        if key not in self._shapes:
            if len(self._shapes) >= _MOST_SHAPES:
                self._shapes.clear()
            self._shapes[key] = self._asked(messages, tools, options, prompt)
        return self._shapes[key]

    def _asked(self, messages: Sequence[Message], tools: Tools, options: Options, prompt: bool) -> _Shape:
        marks = _marks(messages, tools)
        marked, named = _all_marked(messages, tools, marks)
        try:
            return _found(self.render(marked, named, prompt=prompt, options=options), marks)
        except DataError:
            return _Shape(tuple(marks), (), known=False)

    def _asked_answers(
        self, messages: Sequence[Message], numbers: Sequence[int], tools: Tools, options: Options
    ) -> dict[int, _Shape]:
        marks = _marks(messages, tools)
        marked, named = _all_marked(messages, tools, marks)
        prefixes = Prefixes(self.render, marked, named, options, watch=len(numbers) > 2)
        shapes = {}
        for number in numbers:
            own = {slot: mark for slot, mark in marks.items() if slot.turn == number}
            try:
                shapes[number] = _found(prefixes.closed(number + 1).text, own)
            except DataError:
                shapes[number] = _Shape(tuple(own), (), known=False)
        return shapes


class Answers:
    """Checks the texts of the answers of one conversation.

    Args:
        shapes: What the template does with each answer.
        messages: The turns.
    """

    def __init__(self, shapes: Mapping[int, _Shape], messages: Sequence[Message]) -> None:
        self.shapes, self.messages = shapes, messages

    def check(self, number: int, text: str, thought_beside: bool = False) -> None:
        """Checks the text of an answer, as it is trained.

        Args:
            number: Which turn it is.
            text: The rendered text of this turn alone.
            thought_beside: Whether what it thought was put there by us, not by the template.

        Raises:
            DataError: Naming the first text that is lost.
        """
        shape = self.shapes[number]
        for slot in shape.lost:
            if not (thought_beside and slot.kind == "reasoning"):
                raise _lost(slot, self.messages, None)
        wanted = [slot for slot in _slots(self.messages, None) if slot.turn == number]
        _seek(text, shape, wanted, self.messages, None, number)


def _marks(messages: Sequence[Message], tools: Tools) -> dict[_Slot, str]:
    """A mark for each text."""
    return {slot: f"zq{number:05d}qz" for number, slot in enumerate(_slots(messages, tools))}


def _all_marked(
    messages: Sequence[Message], tools: Tools, marks: Mapping[_Slot, str]
) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Turns and tools with marks for their texts."""
    marked = [_marked(number, message, marks) for number, message in enumerate(messages)]
    return marked, [_named(tool, marks.get(_Slot(-1, "tool", i), "")) for i, tool in enumerate(tools or ())] or None


def _found(text: str, marks: Mapping[_Slot, str]) -> _Shape:
    """Which marks a text shows."""
    text = text.lower()
    places = {slot: text.find(mark) for slot, mark in marks.items()}
    order = sorted((slot for slot in marks if places[slot] >= 0), key=lambda slot: places[slot])
    return _Shape(tuple(order), tuple(slot for slot in marks if places[slot] < 0))


# ---- by the texts themselves ----------------------------------------------------------------------------------------


def _seek(
    text: str, shape: _Shape, wanted: Sequence[_Slot], messages: Sequence[Message], tools: Tools, last: int
) -> None:
    """Seeks texts in the order of their marks, each behind the one before.

    Args:
        text: Where.
        shape: The order.
        wanted: Which.
        messages: The turns.
        tools: The tools.
        last: The turn whose thoughts must show too.
    """
    page = _Page(text)
    chosen = set(wanted)
    for slot in (slot for slot in shape.order if slot in chosen):
        parts = list(_texts(slot, messages, tools, thoughts=slot.turn == last))
        lost = page.find(parts, ordered=shape.known, sorts=slot.kind == "arguments")
        if lost is not None:
            raise _lost(slot, messages, tools, lost)


class _Page:
    """A text in which others are sought."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0

    def find(self, parts: Sequence[str], ordered: bool, sorts: bool) -> str | None:
        """Seeks the parts of one place behind those found before.

        Args:
            parts: The parts.
            ordered: Whether this place stands behind those found before.
            sorts: Whether its parts may stand in any order, as keys do.

        Returns:
            The first that the page shows neither as such nor as some notation writes it.
        """
        start = end = self.place if ordered else 0
        for part in map(str.strip, parts):
            first = start if sorts else end
            place = self.text.find(part, first)
            if place >= 0:
                end = max(end, place + len(part))
            elif not _is_noted(part, self.text[first:]):
                return part
        self.place = end
        return None


def _is_noted(part: str, text: str) -> bool:
    """Whether a text is shown but for white space, in another notation, or without the marks that divide it."""
    bare = "".join(text.split())
    if any("".join(form.split()) in page for form in _notations(part) for page in (bare, html.unescape(bare))):
        return True
    # What is gone may divide it, but not begin or end it.
    return part[:1].isalnum() and part[-1:].isalnum() and _NO_LETTERS.sub("", part) in _NO_LETTERS.sub("", text)


def _notations(text: str) -> Iterator[str]:
    """A text as JSON and Python write it."""
    yield text
    yield json.dumps(text)[1:-1]
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield repr(text)[1:-1]
    if _SWITCHES.search(text):
        yield _SWITCHES.sub("", text)


def _slots(messages: Sequence[Message], tools: Tools) -> Iterator[_Slot]:
    """The places that hold text, in their order."""
    for number, tool in enumerate(tools or ()):
        if name_of(tool):
            yield _Slot(-1, "tool", number)
    for turn, message in enumerate(messages):
        if message.role == "assistant" and reasoning_of(message).strip():
            yield _Slot(turn, "reasoning")
        if message.content.strip():
            yield _Slot(turn, "content")
        for number, call in enumerate(calls_of(message)):
            if name_of(call):
                yield _Slot(turn, "name", number)
            if arguments_of(call):
                yield _Slot(turn, "arguments", number)


def _texts(slot: _Slot, messages: Sequence[Message], tools: Tools, thoughts: bool) -> Iterator[str]:
    """The texts of a slot that must show."""
    if slot.kind == "tool":
        yield name_of((tools or ())[slot.number])
        return
    message = messages[slot.turn]
    if slot.kind == "reasoning":
        yield reasoning_of(message)
    elif slot.kind == "content":
        yield from _content(message, thoughts)
    else:
        call = calls_of(message)[slot.number]
        if slot.kind == "name":
            yield name_of(call)
        else:
            yield from _leaves(arguments_of(call))


def _content(message: Message, thoughts: bool) -> Iterator[str]:
    """The texts of a content: of an answer the thought and what follows it, each by itself."""
    if message.role != "assistant" or not _THOUGHT.search(message.content):
        yield message.content
    elif thoughts:
        yield from (part for part in _TAGS.split(message.content) if part.strip())
    elif last := _THOUGHT.split(message.content)[-1].strip():
        yield last


def _leaves(value: Any) -> Iterator[str]:
    """The keys and texts of arguments; numbers and truth values have too many spellings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str) and value.strip():
        yield value


def _form(message: Message) -> tuple[Any, ...]:
    """What of a turn is its shape: everything but its texts."""
    more = message.more or {}
    calls = tuple(map(_form_of_call, calls_of(message)))
    return message.role, bool(message.content.strip()), bool(reasoning_of(message).strip()), calls, tuple(sorted(more))


def _form_of_call(call: Mapping[str, Any]) -> tuple[Any, ...]:
    arguments = arguments_of(call)
    keys = (*sorted(call), isinstance(call.get("function"), Mapping))
    return keys, bool(name_of(call)), type(arguments).__name__, bool(arguments)


def _marked(number: int, message: Message, marks: Mapping[_Slot, str]) -> Message:
    """A turn with marks for its texts."""
    more = dict(message.more or {})
    for name in REASONING:
        if isinstance(more.get(name), str):
            more[name] = marks.get(_Slot(number, "reasoning"), more[name])
    if calls := calls_of(message):
        more.pop("function_call", None)
        more["tool_calls"] = [
            _call(call, marks.get(_Slot(number, "name", i), ""), marks.get(_Slot(number, "arguments", i)))
            for i, call in enumerate(calls)
        ]
    return message._replace(content=marks.get(_Slot(number, "content"), message.content), more=more or None)


def _call(call: Mapping[str, Any], name: str, arguments: str | None) -> dict[str, Any]:
    """A call with marks for its name and its arguments."""
    if isinstance(inner := call.get("function"), Mapping):
        return {**call, "function": _call(inner, name, arguments)}
    call = {**call, "name": name}
    if arguments is not None:
        call["arguments"] = arguments if isinstance(call["arguments"], str) else {"zq": arguments}
    return call


def _named(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The simplest tool of the same form with another name."""
    if isinstance(inner := tool.get("function"), Mapping):
        return {**tool, "function": _named(inner, name)}
    parameters = {"type": "object", "properties": {"zq": {"type": "string", "description": "zq"}}, "required": ["zq"]}
    return {**tool, "name": name, "description": "zq", "parameters": parameters}


def _lost(slot: _Slot, messages: Sequence[Message], tools: Tools, part: str | None = None) -> DataError:
    """The sentence for a text that would be lost."""
    texts = list(_texts(slot, messages, tools, thoughts=True))
    text = show(part if part is not None else texts[0] if texts else "")
    if slot.kind == "tool":
        return DataError(
            f"the chat template does not show the tool {text}; give a data.chat_template that shows tools, or leave "
            "them out with data.columns: {tools: null}."
        )
    role = messages[slot.turn].role
    where = f"turn {slot.turn + 1} ({role}): the chat template does not show"
    other = "give a data.chat_template that does"
    if slot.kind == "reasoning":
        more = messages[slot.turn].more or {}
        name = next(name for name in REASONING if isinstance(more.get(name), str))
        return DataError(f"{where} its {name} ({text}); {other}, or leave {name} out of the rows.")
    if slot.kind in ("name", "arguments"):
        what = f"the call of {text}" if slot.kind == "name" else f"what a call is given ({text})"
        return DataError(f"{where} {what}; {other}, or leave the calls out of the rows.")
    what = "this system turn" if role == "system" else "its content"
    what = "the tool's answer" if role == "tool" else what
    if part is not None and _THOUGHT.search(messages[slot.turn].content):
        what = "what is thought in it"
    return DataError(f"{where} {what} ({text}); {other}, or leave it out of the rows.")


__all__ = ["Answers", "Shown"]
