"""Rows with a label."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from typing_extensions import override

from ftlit.data.formats.alpaca import Alpaca
from ftlit.data.formats.base import (
    Completion,
    Conversation,
    RowError,
    RowFormat,
    Text,
    likeliest,
    text_of,
    weight_of,
)
from ftlit.data.formats.prompt_completion import PromptCompletion
from ftlit.data.formats.turns import refuse_media, tools_of, turns_of
from ftlit.errors import DataError

# What files call the columns, likeliest first; of `_LABELS` and `_SCORES` those that come alone are read as such.
_TEXTS = (
    "sentence",
    "content",
    "review",
    "comment",
    "tweet",
    "title",
    "body",
    "document",
    "question",
    "input",
    "prompt",
)
_LABELS = (
    "labels",
    "class",
    "category",
    "target",
    "sentiment",
    "emotion",
    "intent",
    "topic",
    "tag",
    "output",
    "rating",
)
_KNOWN_LABELS = ("labels", "label_text", "class", "sentiment", "emotion", "intent")
_SCORES = ("rating", "stars", "similarity_score", "relatedness_score")
_PAIRS = (
    ("sentence1", "sentence2"),
    ("sentence_a", "sentence_b"),
    ("text1", "text2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("query", "document"),
)
_KNOWN_TEXTS = ("sentence", "content", "review", "comment", "tweet", "question", "document", "title")
# What is labelled: these columns, the first that are all there.
_WHOLE = (("messages",), ("text",), ("prompt", "completion"), ("instruction", "output"))


class TextPair(NamedTuple):
    """Two texts that are read together, as a tokenizer joins them.

    Attributes:
        first: The one, such as a premise.
        second: The other, such as a hypothesis.
    """

    first: str
    second: str


class LabelledRow(NamedTuple):
    """Something and what it is.

    Attributes:
        content: A conversation, a text without a chat template, one that goes on from another, or two texts.
        labels: The names of its labels; exactly one unless `several`.
        several: Whether a row can have any number of labels.
        weight: How much the row counts.
        score: Its label as a number, where it is one.
        is_scored: Whether the number stands in the column `score`, so that it is no name.
        is_fraction: Whether the label is a number (and no text) that is not whole.
    """

    content: Conversation | Completion | Text | TextPair
    labels: tuple[str, ...]
    several: bool = False
    weight: float = 1.0
    score: float | None = None
    is_scored: bool = False
    is_fraction: bool = False


class Classification(RowFormat):
    """`{"text": "...", "label": "spam"}`, or `messages` in place of `text`.

    A label is text, a whole number, or true or false; a list of labels means that a row can have any number of them. A
    number that is not whole, or a `score` in place of the label, is what a regression learns. Two texts are `text` and
    `text_pair`; an answer to a prompt is `prompt` and `completion`, or `instruction` and `output`. Optional: a `weight`
    column, and `tools` for the chat template.

    Args:
        labelled: Whether the label must be there.
    """

    columns: ClassVar[tuple[str, ...]] = ("label",)
    optional: ClassVar[tuple[str, ...]] = (
        *("score", "text", "text_pair", "messages", "prompt", "completion", "instruction", "input", "output", "system"),
        *("tools", "weight"),
    )

    def __init__(self, labelled: bool = True) -> None:
        self.labelled = labelled

    @override
    def __call__(self, row: Mapping[str, Any]) -> LabelledRow:  # type: ignore[override]
        content, weight, label = self._content(row), weight_of(row), row.get("label")
        if label is None and (score := row.get("score")) is not None:
            number = _number("score", score)
            return LabelledRow(content, (str(score).strip(),), False, weight, number, is_scored=True)
        if isinstance(label, list | tuple):
            names = dict.fromkeys(name_of(f"label[{i}]", one) for i, one in enumerate(label))
            return LabelledRow(content, tuple(names), True, weight)
        if label is None and not self.labelled:
            return LabelledRow(content, (), weight=weight)
        if isinstance(label, float) and math.isfinite(label) and not label.is_integer():
            return LabelledRow(content, (str(label),), False, weight, label, is_fraction=True)
        return LabelledRow(content, (name_of("label", label),), False, weight, _as_number(label))

    @staticmethod
    def _content(row: Mapping[str, Any]) -> Conversation | Completion | Text | TextPair:
        """What is labelled."""
        refuse_media(row)
        found = next((names for names in _WHOLE if all(row.get(name) is not None for name in names)), ("text",))
        if found == ("messages",):
            return Conversation(turns_of(row, "messages"), tools_of(row))
        if found == ("text",):
            text = text_of(row, "text")
            return Text(text) if row.get("text_pair") is None else TextPair(text, text_of(row, "text_pair"))
        read = PromptCompletion() if found[0] == "prompt" else Alpaca()
        answered: Any = read({**row, "weight": None})
        return answered if isinstance(answered, Completion) else answered._replace(given=0)


def _as_number(label: Any) -> float | None:
    """A label as a finite number, None where it is none."""
    try:
        number = math.nan if isinstance(label, bool) else float(label)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _number(place: str, value: Any) -> float:
    if (number := _as_number(value)) is None:
        raise RowError(place, "a finite number", value)
    return number


def detect_labelled(columns: Iterable[str], where: str) -> Classification:
    """The format of rows with labels.

    Args:
        columns: The columns of the rows.
        where: The file, for the error.

    Raises:
        DataError: If the rows have no labels, or nothing that is labelled; it names the `data.columns` that likely
            would do.
    """
    have = list(columns)
    needs = {} if {"label", "score"} & set(have) else {"label": likeliest(_LABELS, have)}
    if not any(set(names) <= set(have) for names in _WHOLE):
        needs = {"text": likeliest(_TEXTS, have), **needs}
    if not needs:
        return Classification()
    listed = ", ".join(f"{name}: {column or name.upper()}" for name, column in needs.items())
    raise DataError(
        f"{where}: columns {', '.join(sorted(have)) or '(none)'} are no rows with labels (Classification needs label, "
        f"or score, and text or messages). Say which is which, such as data.columns: {{{listed}}}."
    )


def known_labelled(columns: Iterable[str]) -> dict[str, str]:
    """The `data.columns` of rows with labels whose columns have one meaning, though other names.

    Returns:
        The format's name to the file's; empty where nothing is to be renamed, or it is not clear what.
    """
    have = {column.casefold(): column for column in columns}
    made: dict[str, str] = {}
    if not any(set(names) <= set(have) for names in _WHOLE):
        pair = next((pair for pair in _PAIRS if set(pair) <= set(have)), None)
        alone = [name for name in _KNOWN_TEXTS if name in have]
        if pair is not None:
            made = {"text": have[pair[0]], "text_pair": have[pair[1]]}
        elif len(alone) == 1:
            made = {"text": have[alone[0]]}
    if not {"label", "score"} & set(have):
        labels, scores = ([name for name in names if name in have] for names in (_KNOWN_LABELS, _SCORES))
        if len(labels) + len(scores) == 1:
            made["label" if labels else "score"] = have[(labels or scores)[0]]
    return made


def name_of(place: str, label: Any) -> str:
    """A label as text.

    Args:
        place: What to call it in an error.
        label: As a row or a config has it.

    Raises:
        RowError: If it is none.
    """
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():  # a column of numbers with gaps, as tables have them
        return str(int(label))
    if isinstance(label, int) or (isinstance(label, str) and label.strip()):
        return str(label).strip()
    raise RowError(place, "a label: text, a whole number, or true or false", label)


__all__ = ["Classification", "LabelledRow", "TextPair", "detect_labelled", "known_labelled", "name_of"]
