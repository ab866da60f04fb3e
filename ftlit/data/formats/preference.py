"""Rows with several answers to one prompt, or with one answer that is said to be good or bad."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from typing_extensions import override

from ftlit.data.formats.asked import (
    ANSWER,
    BEFORE,
    PROMPTS,
    Answer,
    Prompt,
    answer_of,
    asked_and_answered,
    no_prompt,
    prompt_of,
    told,
    with_own_system,
)
from ftlit.data.formats.base import (
    Comparison,
    Completion,
    Conversation,
    Message,
    RowError,
    RowFormat,
    number_of,
    weight_of,
)
from ftlit.data.formats.turns import refuse_media, tools_of, with_tools

# What opens a turn in the texts that chat templates make.
_TURN = re.compile(r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<\|(?:user|assistant)\|>")


class PreferenceFormat(RowFormat):
    """What the formats with prompts and answers share.

    The prompt is a `prompt` (text, or a list of messages), a list of `messages` or ShareGPT `conversations`, an Alpaca
    `instruction` with its `input`, or a `question`; several of them must say the same. `history`, `system`, `tools` and
    `weight` columns are optional. Answers may be whole conversations: what all begin with is then the prompt, and
    columns that hold it again, or one of the answers whole, change nothing. Between texts nothing is put, as
    `PromptCompletion` does it, unless the file has a `system` column or the row a `history`; everything else goes
    through the chat template.
    """

    optional: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys((*PROMPTS, *BEFORE, "tools", "weight")))

    @override
    def prompt(self, row: Mapping[str, Any]) -> Conversation | Completion:
        try:
            answers = self.answers(row)
        except RowError:  # rows that are to be answered need have none
            answers = {}
        given = asked_and_answered(row, answers)[0] if answers else prompt_of(row)
        if given is None:
            raise no_prompt(row)
        if isinstance(given, str):
            return Completion(given, "")
        refuse_media(row)
        return Conversation(*with_tools(_check_prompt(given), tools_of(row)))

    @abstractmethod
    def answers(self, row: Mapping[str, Any]) -> dict[str, Answer]:
        """The answers of a row, by the names that errors call them.

        Raises:
            RowError: If it has none, or they cannot be read.
        """

    @abstractmethod
    @override
    def __call__(self, row: Mapping[str, Any]) -> Comparison:
        """Reads one row.

        Raises:
            RowError: If the row cannot be read: which column, what it must hold, what it holds.
        """


class Pairs(PreferenceFormat):
    """`{"prompt": ..., "chosen": ..., "rejected": ...}` with texts, messages, or ShareGPT turns as answers.

    Without a prompt, `chosen` and `rejected` are whole conversations (or whole texts): what they begin with alike, turn
    by turn, is the prompt; of texts it ends after the last mark of a speaker that both have (`Assistant:`), or where
    there are no marks with a word. A `margin` column says by how much the chosen answer is better.
    """

    columns: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    optional: ClassVar[tuple[str, ...]] = (*PreferenceFormat.optional, "margin")

    @override
    def answers(self, row: Mapping[str, Any]) -> dict[str, Answer]:
        return {column: answer_of(row, column) for column in self.columns}

    @override
    def __call__(self, row: Mapping[str, Any]) -> Comparison:
        prompt, answers = asked_and_answered(row, self.answers(row))
        margin = number_of(row, "margin", 0.0)
        return comparison(prompt, answers, (1.0, 0.0), row)._replace(margin=margin)


class Ranking(PreferenceFormat):
    """`{"prompt": ..., "answers": [...]}`: two or more answers, the best first.

    With `scores`, a number for each answer, they may come in any order; answers with equal scores are not compared.
    """

    columns: ClassVar[tuple[str, ...]] = ("answers",)
    optional: ClassVar[tuple[str, ...]] = (*PreferenceFormat.optional, "scores")

    @override
    def answers(self, row: Mapping[str, Any]) -> dict[str, Answer]:
        given = told(row, "answers")
        if not isinstance(given, list | tuple) or len(given) < 2:
            raise RowError("answers", "a list of at least two answers", given)
        return {f"answers[{i}]": answer_of({f"answers[{i}]": one}, f"answers[{i}]") for i, one in enumerate(given)}

    @override
    def __call__(self, row: Mapping[str, Any]) -> Comparison:
        prompt, answers = asked_and_answered(row, self.answers(row))
        grades = [float(len(answers) - place) for place in range(len(answers))]
        if row.get("scores") is None:
            return comparison(prompt, answers, tuple(grades), row)
        return ranked(prompt, answers, _scores(row["scores"], len(answers)), row)


class Labelled(PreferenceFormat):
    """`{"prompt": ..., "completion": ..., "label": true}`: one answer that is good or bad, as KTO takes it.

    Or `{"messages": [...], "label": true}`, whose last turn is the answer.
    """

    columns: ClassVar[tuple[str, ...]] = ("label",)
    optional: ClassVar[tuple[str, ...]] = (*PreferenceFormat.optional, "completion")

    @override
    def answers(self, row: Mapping[str, Any]) -> dict[str, Answer]:
        if row.get("completion") is not None:
            return {"completion": answer_of(row, "completion")}
        for column in ("conversations", "messages"):
            if row.get(column) is not None:
                return {column: answer_of(row, column)}
        raise RowError("completion", ANSWER, None)

    @override
    def __call__(self, row: Mapping[str, Any]) -> Comparison:
        label = row.get("label")
        if isinstance(label, str) and label.strip().lower() in ("true", "false", "1", "0"):
            label = label.strip().lower() in ("true", "1")
        if label not in (True, False):
            raise RowError("label", "true or false", label)
        prompt, answers = asked_and_answered(row, self.answers(row))
        return comparison(prompt, answers, (1.0 if label else 0.0,), row)


# ---- records --------------------------------------------------------------------------------------------------------


def comparison(prompt: Prompt, answers: list[Answer], grades: tuple[float, ...], row: Mapping[str, Any]) -> Comparison:
    """Answers with their prompt before each."""
    refuse_media(row)
    weight = weight_of(row)
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        if not prompt.strip():
            raise RowError("prompt", "non-empty text", prompt)
        texts = tuple(Completion(prompt, str(answer)) for answer in answers)
        return Comparison(texts, grades, weight=weight)
    turns = with_own_system((Message("user", prompt),), row) if isinstance(prompt, str) else prompt or ()
    given, tools = with_tools(_check_prompt(turns), tools_of(row))
    whole = []
    for answer in answers:
        turns = (Message("assistant", answer),) if isinstance(answer, str) else answer
        if not turns[-1].content.strip() and not (turns[-1].more or {}).get("tool_calls"):
            turns = ()
        whole.append(Conversation((*given, *turns), tools, given=len(given)))
    return Comparison(tuple(whole), grades, weight=weight)


def ranked(prompt: Prompt, answers: list[Answer], scores: Sequence[float], row: Mapping[str, Any]) -> Comparison:
    """Answers by their scores, the best first."""
    places = tuple(sorted(range(len(answers)), key=lambda place: -scores[place]))
    made = comparison(prompt, [answers[place] for place in places], tuple(scores[place] for place in places), row)
    return made._replace(places=places)


def _check_prompt(given: tuple[Message, ...]) -> tuple[Message, ...]:
    """Refuses turns that nobody can answer, and texts that are whole conversations already."""
    if not given or given[-1].role == "assistant":
        raise RowError("prompt", "messages that end in something to answer", [m.role for m in given])
    if len(given) == 1 and (found := _TURN.search(given[0].content)):
        wanted = f"a turn, or with answers that are texts the text of a chat, not a turn with {found[0]} in it"
        raise RowError("prompt", wanted, given[0].content)
    return given


def _scores(scores: Any, count: int) -> list[float]:
    wanted = f"{count} numbers, one an answer"
    if not isinstance(scores, list | tuple) or len(scores) != count:
        raise RowError("scores", wanted, scores)
    if not all(isinstance(s, int | float) and not isinstance(s, bool) and math.isfinite(s) for s in scores):
        raise RowError("scores", wanted, scores)
    return [float(score) for score in scores]


__all__ = ["Labelled", "Pairs", "PreferenceFormat", "Ranking", "comparison", "ranked"]
