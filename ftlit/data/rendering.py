"""The text of turns, by the model's chat template.

Templates want calls in different ways: arguments as an object or as JSON text, the content of a turn that only calls as
an empty text or as nothing, texts as such or as lists of parts. A small conversation of marks shows which way a
template shows what it is given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from ftlit.data.formats.base import Message
from ftlit.data.plain import plain_template
from ftlit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Sequence[Mapping[str, Any]] | None
Options = Mapping[str, Any] | None

# Names under which templates read what was thought before an answer; the first is the usual one.
REASONING = ("reasoning_content", "thinking", "reasoning")

# What the template is handed anyhow, so that nobody else can set it.
_OWN_NAMES = ("messages", "tools", "add_generation_prompt", "documents", "chat_template", "tokenize")


def choose_template(tokenizer: PreTrainedTokenizerBase, template: str | None, options: Options = None) -> bool:
    """Sets a tokenizer's chat template, and what its variables are where a row does not say.

    Args:
        tokenizer: The model's tokenizer; changed.
        template: A Jinja chat template, the path of one, `plain`, or None for the tokenizer's own.
        options: Values for variables of the template, such as `{enable_thinking: false}`. They are written into it, so
            that whoever uses the tokenizer later renders as training did.

    Returns:
        Whether the plain template was taken because there was no other.

    Raises:
        ConfigError: If what is given is no template, or it does not read a variable.
    """
    is_assumed = template is None and not tokenizer.chat_template
    if is_assumed or template == "plain":
        tokenizer.chat_template = plain_template(tokenizer)
    elif template is not None:
        is_file = "{" not in template and Path(template).is_file()
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8") if is_file else template
        if "{" not in tokenizer.chat_template:
            raise ConfigError(
                f"data.chat_template {template!r} is neither a file nor a Jinja template, nor the word plain."
            )
    options = {name: value for name, value in (options or {}).items() if value is not None}
    if options:
        own = tokenizer.chat_template
        for name in options:
            if (wrong := wrong_option(name, own if isinstance(own, str) else "\n".join(own.values()))) is not None:
                raise ConfigError(f"data.chat_template_kwargs: {wrong}.")
        if isinstance(own, str):
            tokenizer.chat_template = _with_defaults(own, options)
        else:
            tokenizer.chat_template = {name: _with_defaults(one, options) for name, one in own.items()}
    return is_assumed


def _with_defaults(template: str, options: Mapping[str, Any]) -> str:
    """A template whose variables have values where nobody gives others."""
    lines = [
        "{%- if NAME is not defined or NAME is none %}{% set NAME = VALUE %}{% endif %}".replace("NAME", name).replace(
            "VALUE", _literal(value)
        )
        for name, value in options.items()
    ]
    # The empty expression at the end keeps a line break at the start of the template.
    defaults = "".join(lines) + "{{- '' }}"
    return template if template.startswith(defaults) else defaults + template


def _literal(value: Any) -> str:
    """A value as Jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)


def wrong_option(name: str, template: str) -> str | None:
    """Why a variable cannot be set in a template; None where it can."""
    if name in _OWN_NAMES or not name.isidentifier():
        return f"{name!r} is not for setting: the rows decide it"
    if not re.search(rf"\b{re.escape(name)}\b", template):
        return f"the chat template reads no {name!r}, so that it would do nothing; leave it out"
    return None


class Style(NamedTuple):
    """How a template wants its turns.

    Attributes:
        parts: Whether texts are lists of parts.
        json_arguments: Whether the arguments of calls are JSON text.
        no_content: Whether a turn that only calls has no content.
    """

    parts: bool = False
    json_arguments: bool = False
    no_content: bool = False


class Rendered(NamedTuple):
    """A rendered text.

    Attributes:
        text: The text.
        marks: The stretches that the template itself marks as trained; None where it has no marks.
    """

    text: str
    marks: list[tuple[int, int]] | None = None


class Renderer:
    """Renders turns with a tokenizer's chat template.

    Args:
        tokenizer: The tokenizer, with its template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.renders = 0
        """How often the template was rendered."""
        self._parts: dict[str, bool] = {}
        self._calls: dict[str, Style] = {}

    def __call__(
        self, messages: Sequence[Message], tools: Tools = None, *, prompt: bool = False, options: Options = None
    ) -> str:
        """The text of some messages; with `prompt`, up to where the next answer starts.

        Raises:
            DataError: If the template refuses the messages, or does not read what an option says.
        """
        return self.marked(messages, tools, prompt=prompt, options=options, marks=False).text

    def marked(
        self,
        messages: Sequence[Message],
        tools: Tools = None,
        *,
        prompt: bool = False,
        options: Options = None,
        marks: bool = True,
    ) -> Rendered:
        """The same with the template's own marks of what is trained."""
        options = self.read_options(options, tools)
        turns = self.turns(messages, tools)
        marks = marks and self.has_marks(tools)
        try:
            return self._render(turns, tools, prompt, options, marks)
        except (TemplateError, TypeError, ValueError) as error:
            typed = [_typed(turn) for turn in turns]
            if typed != turns:
                try:
                    return self._render(typed, tools, prompt, options, marks)
                except (TemplateError, TypeError, ValueError):
                    pass
            roles = ", ".join(message.role for message in messages)
            raise DataError(f"the chat template refuses these turns ({roles}): {error}") from None

    def _render(
        self, turns: list[dict[str, Any]], tools: Tools, prompt: bool, options: Options, marks: bool = False
    ) -> Rendered:
        from transformers.utils.chat_template_utils import render_jinja_template

        self.renders += 1
        texts, found = render_jinja_template(
            conversations=[turns],
            tools=given(tools),
            chat_template=self.template(tools),
            return_assistant_tokens_mask=marks,
            add_generation_prompt=prompt,
            **self.variables(options),
        )
        return Rendered(texts[0], [(start, end) for start, end in found[0] if end > start] if marks else None)

    def variables(self, options: Options) -> dict[str, Any]:
        """What the template can read beside turns and tools."""
        return {**self.tokenizer.special_tokens_map, **(options or {})}

    def template(self, tools: Tools) -> str:
        """The template as text: of several the one for tools, where there are tools."""
        return self.tokenizer.get_chat_template(None, given(tools))

    def has_marks(self, tools: Tools) -> bool:
        """Whether the template marks what is trained."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.template(tools)) is not None

    def read_options(self, options: Options, tools: Tools = None) -> Options:
        """The options that the template reads; a switch that it does not have does nothing.

        Raises:
            DataError: If it does not read one that says something, such as a text.
        """
        template = self.template(tools)
        read = {}
        for name, value in (options or {}).items():
            wrong = wrong_option(name, template)
            if wrong is None:
                read[name] = value
            elif value and not isinstance(value, bool | int | float):
                raise DataError(f"chat_template_kwargs: {wrong}, or data.columns: {{chat_template_kwargs: null}}.")
        return read

    # ---- how the template wants its turns -------------------------------------------------------------------------

    def turns(self, messages: Sequence[Message], tools: Tools = None) -> list[dict[str, Any]]:
        """The turns as the template wants them."""
        template = self.template(tools)
        if template not in self._parts:
            self._parts[template] = self._wants_parts(tools)
        style = Style(self._parts[template])
        if any(map(calls_of, messages)):
            if template not in self._calls:
                self._calls[template] = self._wanted_calls(style, tools)
            style = self._calls[template]
        return [_turn(message, style) for message in messages]

    def _shows(self, messages: Sequence[Message], style: Style, tools: Tools) -> str:
        """A conversation of marks in a style; empty where the template refuses it."""
        try:
            return self._render([_typed(_turn(message, style)) for message in messages], tools, False, None).text
        except (TemplateError, TypeError, ValueError):
            return ""

    def _wants_parts(self, tools: Tools) -> bool:
        turns = [Message("user", "zqtext")]
        as_text = self._shows(turns, Style(), tools)
        if as_text == "" or "zqtext" in as_text:
            return False
        as_parts = self._shows(turns, Style(True), tools)
        return "zqtext" in as_parts and "'zqtext'" not in as_parts  # not a list as Python writes it

    def _wanted_calls(self, style: Style, tools: Tools) -> Style:
        call = {
            "id": "zqcall001",
            "type": "function",
            "function": {"name": "zqname", "arguments": {"zqkey": "zqvalue"}},
        }
        turns = [Message("user", "zqtext"), Message("assistant", "", more={"tool_calls": [call]})]
        for no_content in (False, True):
            for json_arguments in (False, True):
                tried = style._replace(json_arguments=json_arguments, no_content=no_content)
                text = self._shows(turns, tried, tools)
                # An object that is shown as Python writes it is no JSON.
                if "zqname" in text and "zqvalue" in text and "{'zqkey'" not in text:
                    return tried
        return style


def given(tools: Tools) -> list[dict[str, Any]] | None:
    """Tools as transformers takes them."""
    return [dict(tool) for tool in tools] if tools else None


def reasoning_of(message: Message) -> str:
    """What a turn thought before its answer, where it says so beside its content."""
    more = message.more or {}
    return next((more[name] for name in REASONING if isinstance(more.get(name), str)), "")


def calls_of(message: Message) -> Sequence[Mapping[str, Any]]:
    """The calls of a turn, also one of the old kind."""
    more = message.more or {}
    old = more.get("function_call")
    return more.get("tool_calls") or ([{"type": "function", "function": old}] if isinstance(old, Mapping) else ())


def name_of(tool: Mapping[str, Any]) -> str:
    """The name of a tool or of a call, `""` where it has none."""
    inner = tool.get("function")
    name = inner.get("name") if isinstance(inner, Mapping) else tool.get("name")
    return name if isinstance(name, str) else ""


def arguments_of(call: Mapping[str, Any]) -> Any:
    """The arguments of a call, an object as a rule; None where it has none."""
    inner = call.get("function")
    return (inner if isinstance(inner, Mapping) else call).get("arguments")


def _turn(message: Message, style: Style) -> dict[str, Any]:
    """A turn in a style; reasoning stands under every name that templates read."""
    turn = message.turn()
    if (reasoning := reasoning_of(message)) and message.role == "assistant":
        turn = {**turn, **{name: turn.get(name) or reasoning for name in REASONING[:2]}}
    if calls := calls_of(message):
        turn.pop("function_call", None)
        turn["tool_calls"] = [_with_json(call) for call in calls] if style.json_arguments else list(calls)
        if style.no_content and not message.content.strip():
            turn["content"] = None
    if style.parts and turn["content"] is not None:
        turn["content"] = [{"type": "text", "text": message.content}]
    return turn


def _with_json(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with its arguments as JSON text."""
    if isinstance(inner := call.get("function"), Mapping):
        return {**call, "function": _with_json(inner)}
    arguments = call.get("arguments")
    if arguments is None or isinstance(arguments, str):
        return dict(call)
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}


def _typed(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn whose calls say that they are calls of functions, as some templates need it."""
    if not turn.get("tool_calls"):
        return turn
    return {**turn, "tool_calls": [{"type": "function", **call} for call in turn["tool_calls"]]}


__all__ = [
    "REASONING",
    "Options",
    "Rendered",
    "Renderer",
    "Tools",
    "arguments_of",
    "calls_of",
    "choose_template",
    "given",
    "name_of",
    "reasoning_of",
    "wrong_option",
]
