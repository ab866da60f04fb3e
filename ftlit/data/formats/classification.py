"""Rows with a label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from typing_extensions import override

from ftlit.data.formats.base import Conversation, RowError, RowFormat, Text, likeliest, text_of, weight_of
from ftlit.data.formats.turns import tools_of, turns_of
from ftlit.errors import DataError

# What files call the columns, likeliest first; only ever used to suggest.
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


class LabelledRow(NamedTuple):
    """Something and what it is.

    Attributes:
        content: A conversation, or a text without a chat template.
        labels: The names of its labels; exactly one unless `several`.
        several: Whether a row can have any number of labels.
        weight: How much the row counts.
    """

    content: Conversation | Text
    labels: tuple[str, ...]
    several: bool = False
    weight: float = 1.0


class Classification(RowFormat):
    """`{"text": "...", "label": "spam"}`, or `messages` in place of `text`.

    A label is text, a whole number, or true or false; a list of labels means that a row can have any number of them.
    Optional: a `weight` column, and `tools` for the chat template.

    Args:
        labelled: Whether the label must be there.
    """

    columns: ClassVar[tuple[str, ...]] = ("label",)
    optional: ClassVar[tuple[str, ...]] = ("text", "messages", "tools", "weight")

    def __init__(self, labelled: bool = True) -> None:
        self.labelled = labelled

    @override
    def __call__(self, row: Mapping[str, Any]) -> LabelledRow:  # type: ignore[override]
        content: Conversation | Text
        if row.get("messages") is not None:
            content = Conversation(turns_of(row, "messages"), tools_of(row))
        else:
            content = Text(text_of(row, "text"))
        label = row.get("label")
        several = isinstance(label, list | tuple)
        names = [name_of(f"label[{i}]", one) for i, one in enumerate(label)] if several else []  # type: ignore[arg-type]
        if not several and (self.labelled or label is not None):
            names = [name_of("label", label)]
        return LabelledRow(content, tuple(dict.fromkeys(names)), several, weight_of(row))


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
    needs = {"label": likeliest(_LABELS, have)} if "label" not in have else {}
    if not {"text", "messages"} & set(have):
        needs = {"text": likeliest(_TEXTS, have), **needs}
    if not needs:
        return Classification()
    listed = ", ".join(f"{name}: {column or name.upper()}" for name, column in needs.items())
    raise DataError(
        f"{where}: columns {', '.join(sorted(have)) or '(none)'} are no rows with labels (Classification needs label, "
        f"and text or messages). Say which is which, such as data.columns: {{{listed}}}."
    )


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


__all__ = ["Classification", "LabelledRow", "detect_labelled", "name_of"]
