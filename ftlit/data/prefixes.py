"""What a template makes of every beginning of a conversation, from one rendering where that can be proven.

Rendering each beginning anew makes long conversations slow: their cost grows with the square of the turns. So the
template is handed turns that note when they are read. What stands before the place where a turn is first read is a
function of the turns before it; and what follows the last turn (the generation prompt) is the same for all beginnings,
where it reads neither turns nor what the template remembers of them. Where any of this cannot be seen, the beginning is
rendered by itself.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError, nodes
from jinja2.runtime import LoopContext
from typing_extensions import override

from ftlit.data.formats.base import Message
from ftlit.data.rendering import Options, Rendered, Renderer, Tools, given


class Prefixes:
    """Renderings of the beginnings of a conversation.

    Args:
        render: The renderer.
        messages: The turns.
        tools: The tools.
        options: Variables of the template.
        watch: Whether to try one rendering for all; it pays where several beginnings are wanted.
    """

    def __init__(
        self, render: Renderer, messages: Sequence[Message], tools: Tools, options: Options, watch: bool = True
    ) -> None:
        self.render, self.messages, self.tools, self.options = render, messages, tools, options
        self.watch = watch
        self._seen: dict[bool, _Seen | None] = {}

    def prompt(self, length: int) -> str:
        """The first `length` turns, up to where the next answer starts."""
        return self._beginning(length, True).text

    def closed(self, length: int) -> Rendered:
        """The first `length` turns, with the template's own marks of what is trained."""
        return self._beginning(length, False)

    def _beginning(self, length: int, prompt: bool) -> Rendered:
        if self.watch:
            if prompt not in self._seen:
                self._seen[prompt] = _watch(self.render, self.messages, self.tools, self.options, prompt)
            seen = self._seen[prompt]
            if seen is not None and (start := seen.starts.get(length)) is not None:
                text = seen.text[:start] + seen.text[seen.end :]
                marks = None if seen.marks is None else [mark for mark in seen.marks if mark[1] <= start]
                return Rendered(text, marks)
        messages = self.messages[:length]
        return self.render.marked(messages, self.tools, prompt=prompt, options=self.options, marks=not prompt)


class _Seen(NamedTuple):
    """A rendering of all turns.

    Attributes:
        text: The text.
        starts: For each number of turns where their text ends, as far as that is proven.
        end: Where the text of all turns ends.
        marks: The template's marks.
    """

    text: str
    starts: dict[int, int]
    end: int
    marks: list[tuple[int, int]] | None


def _watch(render: Renderer, messages: Sequence[Message], tools: Tools, options: Options, prompt: bool) -> _Seen | None:
    """Renders all turns and watches when each is read; None where nothing can be learnt from it."""
    source = render.template(tools)
    if not _ends_alike(source):
        return None
    whole = render.marked(messages, tools, prompt=prompt, options=options, marks=not prompt)
    log = _Log()
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        template = _compile_jinja_template(source)
        render.renders += 1
        for piece in template.generate(
            messages=_Watched(render.turns(messages, tools), log),
            tools=given(tools),
            documents=None,
            add_generation_prompt=prompt,
            **render.variables(options),
        ):
            log.pieces.append(piece)
            log.length += len(piece)
    except (ImportError, TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return None
    total = len(messages)
    if log.hidden or "".join(log.pieces) != whole.text or total not in log.starts:
        return None
    if len(set(log.starts.values())) == 1:  # the turns were put together first, and written at once
        return None
    starts = {length: start for length, start in log.starts.items() if length == total or length not in log.early}
    marks = whole.marks
    if marks is not None and any(end > log.starts[total] for _, end in marks):
        return None  # what follows the turns is marked too
    return _Seen(whole.text, starts, log.starts[total], marks)


class _Log:
    """What was written, and where turns were read."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.length = 0
        self.at = -1
        """The turn that is being written."""
        self.starts: dict[int, int] = {}
        """For each turn what had been written when it was asked for in the order of turns."""
        self.early: set[int] = set()
        """Turns whose absence would have been seen before: beginnings of that length may look otherwise."""
        self.hidden = False
        """Whether turns were read in a way that shows nothing."""
        self.loops = 0

    def read(self, number: int) -> None:
        """A turn is looked at out of order."""
        self.early.update(range(self.at + 1, number + 1))

    def step(self, number: int, total: int) -> None:
        """A turn is the next in order; behind the last one comes what follows the turns."""
        self.at = number if number < total else -1
        self.starts[number] = self.length


class _Watched(Sequence[Any]):
    """Turns that note when they are read."""

    def __init__(self, turns: Sequence[Any], log: _Log, first: int = 0) -> None:
        self._turns, self._log, self._first = turns, log, first

    @override
    def __len__(self) -> int:
        self._log.hidden = True
        return len(self._turns) - self._first

    def __bool__(self) -> bool:
        self._log.read(self._first)
        return len(self._turns) > self._first

    @override
    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            if place.stop is None and place.step in (None, 1) and (place.start or 0) >= 0:
                return _Watched(self._turns, self._log, self._first + (place.start or 0))
            self._log.hidden = True
            return list(self._turns[self._first :])[place]
        if not isinstance(place, int) or place < 0:
            self._log.hidden = True
            return self._turns[self._first :][place]
        self._log.read(self._first + place)
        return self._turns[self._first + place]

    @override
    def __iter__(self) -> Iterator[Any]:
        self._log.loops += 1
        self._log.hidden = self._log.hidden or self._log.loops > 1
        return _Steps(self._turns, self._log, self._first)


class _Steps:
    """Goes through turns in order."""

    def __init__(self, turns: Sequence[Any], log: _Log, first: int) -> None:
        self._turns, self._log, self._next = turns, log, first

    def __iter__(self) -> _Steps:
        return self

    def __next__(self) -> Any:
        number = self._next
        if sys._getframe(1).f_code is LoopContext._peek_next.__code__:  # loop.last, loop.nextitem
            self._log.read(number)
        else:
            self._log.step(number, len(self._turns))
        if number >= len(self._turns):
            raise StopIteration
        self._next += 1
        return self._turns[number]


@functools.lru_cache(maxsize=64)
def _ends_alike(source: str) -> bool:
    """Whether what follows the turns cannot know what the template remembers of them."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        tree = _compile_jinja_template(source).environment.parse(source)
    except TemplateError:
        return False
    remembered = {
        name.name
        for assign in tree.find_all(nodes.Assign)
        if any(isinstance(call.node, nodes.Name) and call.node.name in _MEMORY for call in assign.find_all(nodes.Call))
        for name in [assign.target]
        if isinstance(name, nodes.Name)
    }
    if not remembered:
        return True
    loops = [place for place, node in enumerate(tree.body) if isinstance(node, nodes.For) and not _over_tools(node)]
    if not loops or any(_names(macro) & remembered for macro in tree.find_all(nodes.Macro)):
        return False
    return not any(_names(node) & remembered for node in tree.body[loops[0] + 1 :])


_MEMORY = ("namespace", "cycler", "joiner")


def _over_tools(loop: nodes.For) -> bool:
    return _names(loop.iter) <= {"tools", "builtin_tools", "documents"}


def _names(node: nodes.Node) -> set[str]:
    names = {name.name for name in node.find_all(nodes.Name)} | {ref.name for ref in node.find_all(nodes.NSRef)}
    return names | ({node.name} if isinstance(node, nodes.Name) else set())


__all__ = ["Prefixes"]
