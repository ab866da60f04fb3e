"""What `ftlit score` reads and writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ftlit.data.formats import (
    Comparison,
    Completion,
    Conversation,
    Judged,
    Pairs,
    Ranking,
    RowFormat,
    Text,
    detect,
    known_columns,
    known_pairs,
)
from ftlit.data.formats.classification import Classification, LabelledRow, TextPair, known_labelled
from ftlit.data.formats.judged import one_verdict
from ftlit.data.sources import Source, with_system
from ftlit.errors import DataError
from ftlit.export.scorer import Content, SequenceScorer

_CHUNK = 256


class Rated(NamedTuple):
    """Something to be scored.

    Attributes:
        row: The number of its row, from 0.
        content: A conversation, a text, or a text with what goes on from it.
        shown: What stands for it in the output.
    """

    row: int
    content: Content
    shown: dict[str, Any]


def contents_of(name: str) -> list[Rated]:
    """What is in the rows of a file: of a preference row each answer with its prompt, else the whole row.

    Args:
        name: A file, a folder, a hub id, or `sample:NAME`.

    Raises:
        DataError: If it cannot be read.
    """
    source = Source(name, choose=_choose, known=_known)
    found: list[Rated] = []
    for row in range(len(source)):
        record: Any = source.record(row)
        if isinstance(record, LabelledRow):
            record = record.content
        answers = record.answers if isinstance(record, Comparison) else (record,)
        places = (getattr(record, "places", ()) or range(len(answers))) if len(answers) > 1 else (0,)
        for number, answer in sorted(zip(places, answers, strict=True), key=lambda one: one[0]):
            place = {"answer": number + 1} if len(answers) > 1 else {}
            if isinstance(answer, Conversation) and len(answer.messages) <= answer.given:
                raise DataError(f"{source.where(row)}: an answer is empty, there is nothing to score.")
            found.append(Rated(row, answer, {**_shown(answer), **place}))
    return found


def _known(columns: Sequence[str], row: Mapping[str, Any], *, answers: bool = True) -> Mapping[str, str]:
    """The columns of rows to score that have one meaning under other names; labels do not matter."""
    if any(kind.of(one_verdict(set(columns))) is not None for kind in (Pairs, Ranking, Judged)):
        return {}  # several answers to be scored, and not one with its references
    found = known_labelled(columns)
    if "text_pair" in found:
        return {name: found[name] for name in ("text", "text_pair")}
    texts = {name: column for name, column in found.items() if name == "text"}
    return known_pairs(columns) or known_columns(columns, row, answers=answers) or texts


def _choose(columns: Sequence[str], where: str, *, answers: bool = True) -> RowFormat:
    """The format of rows to score; labels do not matter.

    Raises:
        DataError: If there is nothing that can be scored.
    """
    have = set(columns)
    for kind in (Pairs, Ranking, Judged):
        if (made := kind.of(one_verdict(have))) is not None:
            return made
    if have & {"text", "messages"}:
        return Classification(labelled=False)
    try:
        return detect(columns, where, answers=answers)
    except DataError:
        raise DataError(
            f"{where}: columns {', '.join(sorted(have)) or '(none)'} hold nothing that can be scored; rename them to "
            "messages, text, prompt and completion, prompt, chosen and rejected, or prompt and answers."
        ) from None


def _shown(content: Content) -> dict[str, Any]:
    if isinstance(content, Text):
        return {"text": content.text}
    if isinstance(content, TextPair):
        return {"text": content.first, "text_pair": content.second}
    if isinstance(content, Completion):
        return {"prompt": content.prompt, "completion": content.completion}
    return {"messages": [message.turn() for message in content.messages]}


def rate(scorer: SequenceScorer, contents: Sequence[Rated], system: str | None = None) -> Iterator[Mapping[str, Any]]:
    """One object a row or answer: its number, what it is, and what the model says.

    A model with one output gives a `score`; others the likeliest `label` and the `probabilities`, or, where a row can
    have several, the `labels` of more than one half.

    Args:
        scorer: The model.
        contents: What is scored.
        system: System turn for conversations that have none, as the run was trained with.
    """
    outputs = scorer.outputs
    several = scorer.lm.config.problem_type == "multi_label_classification"
    for first in range(0, len(contents), _CHUNK):
        part = contents[first : first + _CHUNK]
        logits = scorer([_with_system(one.content, system) for one in part])
        for one, row in zip(part, logits, strict=True):
            line = {"row": one.row + 1, **one.shown}
            if len(outputs) == 1:
                yield {**line, "score": float(row[0])}
                continue
            shares = (row.sigmoid() if several else torch.softmax(row, 0)).tolist()
            if several:
                chosen: dict[str, Any] = {"labels": [n for n, p in zip(outputs, shares, strict=True) if p > 0.5]}
            else:
                chosen = {"label": outputs[int(row.argmax())]}
            yield {**line, **chosen, "probabilities": dict(zip(outputs, shares, strict=True))}


def _with_system(content: Content, system: str | None) -> Content:
    if isinstance(content, TextPair):
        return content
    changed: Any = with_system(content, system)
    return changed


__all__ = ["Rated", "contents_of", "rate"]
