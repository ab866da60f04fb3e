"""Rows with several answers to one prompt, or with one answer that is said to be good or bad."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Self

from typing_extensions import override

from ftlit.data.formats.asked import (
    ANSWER,
    BEFORE,
    LISTS,
    PROMPTS,
    Answer,
    Prompt,
    answer_of,
    asked_and_answered,
    no_prompt,
    prompt_of,
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
from ftlit.data.formats.written import parsed
from ftlit.errors import ConfigError

# What the columns of a better and a worse answer are called, where that has one meaning.
_PAIRS = (
    *(("chosen", "rejected"), ("preferred_output", "non_preferred_output"), ("response_j", "response_k")),
    *(("messages", "rejected_messages"), ("messages", "rejected_response")),
)
_TEXTS = ("answer", "response", "text", "completion", "output", "content")
_SCORES = ("score", "overall_score", "fine-grained_score", "rating", "reward")
_LABELS = {"true": True, "1": True, "desirable": True, "false": False, "0": False, "undesirable": False}
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

    @classmethod
    def of(cls, columns: Collection[str]) -> Self | None:
        """The format for rows with some columns; None where it does not fit them.

        Raises:
            DataError: If the user must say which columns are meant.
        """
        return cls() if set(cls.columns) <= set(columns) else None

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

    Other columns that are known: `preferred_output` and `non_preferred_output` with `input`, `response_j` and
    `response_k`, and `messages` that end in the good answer beside a `rejected_response` or `rejected_messages`.

    Args:
        chosen: Column of the better answer.
        rejected: Column of the worse one.
        margin_of: Two columns of scores, such as `[score_chosen, score_rejected]`, whose difference is the margin.

    Raises:
        ConfigError: If `margin_of` are not two columns.
    """

    columns: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    optional: ClassVar[tuple[str, ...]] = (*PreferenceFormat.optional, "margin")

    def __init__(self, chosen: str = "chosen", rejected: str = "rejected", margin_of: list[str] | None = None) -> None:
        self.chosen, self.rejected, self.margin_of = chosen, rejected, margin_of
        if margin_of is not None and len(margin_of) != 2:
            raise ConfigError(f"Pairs' margin_of must be the scores of chosen and rejected, got {margin_of}.")

    @classmethod
    @override
    def of(cls, columns: Collection[str]) -> Self | None:
        return next((cls(*names) for names in _PAIRS if set(names) <= set(columns)), None)

    @override
    def answers(self, row: Mapping[str, Any]) -> dict[str, Answer]:
        chosen, rejected = (answer_of(row, column) for column in (self.chosen, self.rejected))
        if self.chosen in LISTS and (isinstance(rejected, str) or rejected[0].role == "assistant"):
            chosen = chosen[-1:]  # the prompt is before it
        return {self.chosen: chosen, self.rejected: rejected}

    @override
    def __call__(self, row: Mapping[str, Any]) -> Comparison:
        row = _with_input(row)
        prompt, answers = asked_and_answered(row, self.answers(row))
        margin = number_of(row, "margin", 0.0)
        if self.margin_of is not None:
            good, bad = (_score(row, column) for column in self.margin_of)
            if good < bad:
                raise RowError(self.margin_of[0], f"at least what {self.margin_of[1]!r} holds ({bad:g})", good)
            margin = good - bad
        return comparison(prompt, answers, (1.0, 0.0), row)._replace(margin=margin)

    @override
    def prompt(self, row: Mapping[str, Any]) -> Conversation | Completion:
        return super().prompt(_with_input(row))


class Ranking(PreferenceFormat):
    """`{"prompt": ..., "answers": [...]}`: two or more answers, the best first.

    With `scores`, a number for each answer, they may come in any order; answers with equal scores are not compared. An
    answer may be an object with its text (`answer`, `response`, `text`) and its `rank` (1 is the best) or its score.

    Args:
        column: Column of the answers. Of `completions` the order says nothing: they need ranks or scores.
        score: Key of the score of answers that are objects, where several could be.
    """

    columns: ClassVar[tuple[str, ...]] = ("answers",)
    optional: ClassVar[tuple[str, ...]] = (*PreferenceFormat.optional, "scores")

    def __init__(self, column: str = "answers", score: str | None = None) -> None:
        self.column, self.score = column, score

    @classmethod
    @override
    def of(cls, columns: Collection[str]) -> Self | None:
        asks = not {"prompt", "instruction", "question", *LISTS}.isdisjoint(columns)
        known = ("answers", "completions") if asks else ("answers",)
        return next((cls(column) for column in known if column in columns), None)

    @override
    def answers(self, row: Mapping[str, Any]) -> dict[str, Answer]:
        given = self._listed(row)
        places = {f"{self.column}[{i}]": _text_of_object(one) for i, one in enumerate(given)}
        return {place: answer_of({place: one}, place) for place, one in places.items()}

    def _listed(self, row: Mapping[str, Any]) -> Sequence[Any]:
        given = parsed(row.get(self.column))
        if not isinstance(given, list | tuple) or len(given) < 2:
            raise RowError(self.column, "a list of at least two answers", given)
        return given

    @override
    def __call__(self, row: Mapping[str, Any]) -> Comparison:
        prompt, answers = asked_and_answered(row, self.answers(row))
        if row.get("scores") is not None:
            return ranked(prompt, answers, _scores(row["scores"], len(answers)), row)
        if (scores := self._own_scores(self._listed(row))) is not None:
            return ranked(prompt, answers, scores, row)
        if self.column == "completions":
            raise RowError(
                self.column, "objects with a rank or a score (data.columns={answers: completions}: the best first)",
                row[self.column],
            )  # fmt: skip
        grades = [float(len(answers) - place) for place in range(len(answers))]
        return comparison(prompt, answers, tuple(grades), row)

    def _own_scores(self, given: Sequence[Any]) -> list[float] | None:
        """How good the answers are by their own ranks or scores; None where they have none."""
        objects = [one for one in given if isinstance(one, Mapping) and _text_of_object(one) is not one]
        keys = [key for key in (*_SCORES, "rank") if objects and all(one.get(key) is not None for one in objects)]
        if self.score is not None:
            keys = [self.score]
        if not objects or not keys:
            return None
        if len(keys) > 1:
            line = f"data.format={{class_path: Ranking, init_args: {{column: {self.column}, score: {keys[0]}}}}}"
            raise RowError(self.column, f"one score an answer, not {' and '.join(keys)} (choose one: {line})", given[0])
        sign = -1.0 if keys[0] == "rank" else 1.0
        return [sign * _score(one, keys[0], f"{self.column}[{i}].{keys[0]}") for i, one in enumerate(objects)]


class Labelled(PreferenceFormat):
    """`{"prompt": ..., "completion": ..., "label": true}`: one answer that is good or bad, as KTO takes it.

    Or `{"messages": [...], "label": true}`, whose last turn is the answer. The answer may be called `output`,
    `response` or `answer`, too.

    Args:
        label: Column of the label.
    """

    columns: ClassVar[tuple[str, ...]] = ("label",)
    optional: ClassVar[tuple[str, ...]] = (*PreferenceFormat.optional, "completion", "output", "response", "answer")

    def __init__(self, label: str = "label") -> None:
        self.label = label

    @classmethod
    @override
    def of(cls, columns: Collection[str]) -> Self | None:
        return next((cls(label) for label in ("label", "kto_tag") if label in columns), None)

    @override
    def answers(self, row: Mapping[str, Any]) -> dict[str, Answer]:
        for column in ("completion", "output", "response", "answer"):
            if row.get(column) is not None:
                return {column: answer_of(row, column)}
        for column in ("conversations", "messages"):
            if row.get(column) is not None:
                return {column: answer_of(row, column)}
        raise RowError("completion", ANSWER, None)

    @override
    def __call__(self, row: Mapping[str, Any]) -> Comparison:
        label = row.get(self.label)
        if isinstance(label, str):
            label = _LABELS.get(label.strip().lower(), label)
        if label not in (True, False):
            raise RowError(self.label, "true or false", label)
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


def _with_input(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row with the messages and tools that OpenAI's preference files have in an `input`."""
    given = row.get("input")
    if not isinstance(given, Mapping) or "messages" not in given:
        return row
    return {**row, "input": None, "messages": given["messages"], "tools": given.get("tools") or row.get("tools")}


def _text_of_object(one: Any) -> Any:
    """The answer of an object that has it beside a rank or a score; else the answer as it is."""
    if not isinstance(one, Mapping) or "role" in one or "from" in one:
        return one
    return next((one[key] for key in _TEXTS if one.get(key) is not None), one)


def _score(row: Mapping[str, Any], column: str, place: str = "") -> float:
    value = row.get(column)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(place or column, "a number", value)
    return number


def _scores(scores: Any, count: int) -> list[float]:
    wanted = f"{count} numbers, one an answer"
    if not isinstance(scores, list | tuple) or len(scores) != count:
        raise RowError("scores", wanted, scores)
    if not all(isinstance(s, int | float) and not isinstance(s, bool) and math.isfinite(s) for s in scores):
        raise RowError("scores", wanted, scores)
    return [float(score) for score in scores]


__all__ = ["Labelled", "Pairs", "PreferenceFormat", "Ranking", "comparison", "ranked"]
