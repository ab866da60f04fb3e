"""Conversations that are written as one text, each turn after the mark of its speaker."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ftlit.data.formats.written import parsed

# A speaker at the beginning of a line, as Glaive (`FUNCTION RESPONSE:`), HH-RLHF (`Human:`), others (`### Bot:`) write.
_MARK = re.compile(
    r"^[ \t]*(?:#+[ \t]*|\*\*)?(system|user|human|assistant|gpt|bot|ai|function response|observation)"
    r"(?:\*\*)?[ \t]*:(?:\*\*)?[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)
_ENDS = re.compile(r"(?:\s*(?:<\|endoftext\|>|<\|im_end\|>|</s>))+\s*$")
_CALL = re.compile(r"<functioncall>\s*(\{.*\})\s*(?:</functioncall>)?\s*$", re.DOTALL)
_QUOTED = re.compile(r"""("arguments"\s*:\s*)'(\{.*\})'(?=\s*\})""", re.DOTALL)


def turns_in_text(text: Any) -> list[dict[str, Any]] | None:
    """The turns of a text that has the mark of a speaker before each; None where it is no such text.

    End marks of models after a turn are taken away, and a `<functioncall>` at the end of one is read as a call.
    """
    if not isinstance(text, str):
        return None
    marks = list(_MARK.finditer(text))
    if len(marks) < 2 or text[: marks[0].start()].strip():
        return None
    stops = [mark.start() for mark in marks[1:]] + [len(text)]
    return [_turn(mark[1], text[mark.end() : stop]) for mark, stop in zip(marks, stops, strict=True)]


def without_mark(text: str) -> str:
    """The text of one turn without the mark of a system turn, `SYSTEM: `, before it."""
    found = _MARK.match(text)
    return text[found.end() :] if found and found[1].casefold() == "system" else text


def _turn(speaker: str, text: str) -> dict[str, Any]:
    """One turn by its speaker and what follows the mark."""
    turn: dict[str, Any] = {"role": speaker.casefold().replace(" ", "_"), "content": _ENDS.sub("", text).strip()}
    if found := _CALL.search(turn["content"]):
        call = _call(found[1])
        if call is not None:
            turn |= {"content": turn["content"][: found.start()].rstrip(), "tool_calls": [call]}
    return turn


def _call(text: str) -> Mapping[str, Any] | None:
    """A call, whose arguments may be JSON between single quotes; None where it cannot be read."""
    call = parsed(_QUOTED.sub(lambda found: found[1] + json.dumps(found[2]), text))
    return call if isinstance(call, Mapping) else None


__all__ = ["turns_in_text", "without_mark"]
