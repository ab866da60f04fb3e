"""Rows with several answers to one prompt, or with one answer that is said to be good or bad."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from ftlit.data.formats.base import (
    Comparison,
    Completion,
    Conversation,
    Message,
    RowError,
    RowFormat,
    number_of,
    text_of,
    weight_of,
)
from ftlit.data.formats.sharegpt import ShareGPT
from ftlit.data.formats.turns import tools_of, turns_of

_PROMPTS = ("prompt", "conversations", "messages", "instruction")
_FIRST_WIDE = 0x2E80  # the first of the characters that are written without spaces between words
_ANSWER = "text, a message, or a list of messages"

Prompt = tuple[Message, ...] | str | None
Answer = tuple[Message, ...] | str


class PreferenceFormat(RowFormat):
    """What the formats with prompts and answers share.

    The prompt is a `prompt` (text, or a list of messages), a list of `messages` or ShareGPT `conversations`, or an
    Alpaca `instruction` with its `input`; `system`, `tools` and `weight` columns are optional. Between texts nothing is
    put, as `PromptCompletion` does it, unless there is a `system` column; everything else goes through the chat
    template.
    """

    optional: ClassVar[tuple[str, ...]] = (*_PROMPTS, "input", "system", "tools", "weight")

    @override
    def prompt(self, row: Mapping[str, Any]) -> Conversation | Completion:
        given = self._prompt(row)
        if given is None:
            raise RowError("prompt", "text or a list of messages", None)
        return Completion(given, "") if isinstance(given, str) else Conversation(given, tools_of(row))

    @abstractmethod
    @override
    def __call__(self, row: Mapping[str, Any]) -> Comparison:
        """Reads one row.

        Raises:
            RowError: If the row cannot be read: which column, what it must hold, what it holds.
        """

    @staticmethod
    def _prompt(row: Mapping[str, Any]) -> Prompt:
        """The prompt of a row, None where it has none."""
        turns: tuple[Message, ...]
        if row.get("conversations") is not None:
            return ShareGPT()({**row, "chosen": None}).messages
        if row.get("messages") is not None:
            turns = turns_of(row, "messages")
        elif row.get("instruction") is not None:
            more = text_of(row, "input", required=False)
            turns = (Message("user", text_of(row, "instruction") + (f"\n{more}" if more else "")),)
        elif isinstance(row.get("prompt"), list | tuple):
            turns = turns_of(row, "prompt")
        elif row.get("prompt") is not None:
            text = text_of(row, "prompt")
            if "system" not in row:
                return text
            turns = (Message("user", text),)
        else:
            return None
        return _with_system(turns, row)


def _with_system(turns: tuple[Message, ...], row: Mapping[str, Any]) -> tuple[Message, ...]:
    system = text_of(row, "system", required=False)
    return (Message("system", system), *turns) if system and turns[0].role != "system" else turns


class Pairs(PreferenceFormat):
    """`{"prompt": ..., "chosen": ..., "rejected": ...}` with texts, messages, or ShareGPT turns as answers.

    Without a prompt, `chosen` and `rejected` are whole conversations (or whole texts): what they begin with alike, turn
    by turn (text by whole words), is the prompt. A `margin` column says by how much the chosen answer is better.
    """

    columns: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    optional: ClassVar[tuple[str, ...]] = (*PreferenceFormat.optional, "margin")

    @override
    def __call__(self, row: Mapping[str, Any]) -> Comparison:
        answers = [_answer(row, "chosen"), _answer(row, "rejected")]
        prompt = self._prompt(row)
        for column, answer in zip(("chosen", "rejected"), answers, strict=True):
            _check_end(column, answer)
        whole = [not isinstance(a, str) and a[0].role in ("system", "user") for a in answers]
        if whole[0] != whole[1]:
            raise RowError("rejected", "an answer of the same shape as chosen", row.get("rejected"))
        if all(whole):
            wholes = [_from_prompt(prompt, _with_system(a, row)) for a in answers if not isinstance(a, str)]
            prompt, answers = _shared_turns(*wholes)
        elif prompt is None:
            if not all(isinstance(answer, str) for answer in answers):
                raise RowError("prompt", "text or a list of messages", None)
            prompt, answers = _shared_words(*(str(answer) for answer in answers))
        margin = number_of(row, "margin", 0.0)
        return _comparison(prompt, answers, (1.0, 0.0), row)._replace(margin=margin)

    @override
    def prompt(self, row: Mapping[str, Any]) -> Conversation | Completion:
        given = self._prompt(row)
        if (given is None or _is_history(given)) and row.get("chosen") is not None and row.get("rejected") is not None:
            best = self(row).answers[0]
            if isinstance(best, Completion):
                return best._replace(completion="")
            return Conversation(best.messages[: best.given], best.tools)
        return super().prompt(row)


class Ranking(PreferenceFormat):
    """`{"prompt": ..., "answers": [...]}`: two or more answers, the best first.

    With `scores`, a number for each answer, they may come in any order; answers with equal scores are not compared.
    """

    columns: ClassVar[tuple[str, ...]] = ("answers",)
    optional: ClassVar[tuple[str, ...]] = (*PreferenceFormat.optional, "scores")

    @override
    def __call__(self, row: Mapping[str, Any]) -> Comparison:
        given = row.get("answers")
        if not isinstance(given, list | tuple) or len(given) < 2:
            raise RowError("answers", "a list of at least two answers", given)
        answers = [_answer({f"answers[{i}]": one}, f"answers[{i}]") for i, one in enumerate(given)]
        for place, answer in enumerate(answers):
            _check_end(f"answers[{place}]", answer)
        prompt = self._prompt(row)
        if prompt is None:
            raise RowError("prompt", "text or a list of messages", None)
        places: tuple[int, ...] = ()
        grades = [float(len(answers) - place) for place in range(len(answers))]
        if row.get("scores") is not None:
            grades = _scores(row["scores"], len(answers))
            places = tuple(sorted(range(len(answers)), key=lambda place: -grades[place]))
            answers, grades = [answers[place] for place in places], [grades[place] for place in places]
        return _comparison(prompt, answers, tuple(grades), row)._replace(places=places)


class Labelled(PreferenceFormat):
    """`{"prompt": ..., "completion": ..., "label": true}`: one answer that is good or bad, as KTO takes it.

    Or `{"messages": [...], "label": true}`, whose last turn is the answer.
    """

    columns: ClassVar[tuple[str, ...]] = ("label",)
    optional: ClassVar[tuple[str, ...]] = (*PreferenceFormat.optional, "completion")

    @override
    def __call__(self, row: Mapping[str, Any]) -> Comparison:
        label = row.get("label")
        if isinstance(label, str) and label.strip().lower() in ("true", "false", "1", "0"):
            label = label.strip().lower() in ("true", "1")
        if label not in (True, False):
            raise RowError("label", "true or false", label)
        answer: Answer
        prompt = self._prompt(row)
        if row.get("completion") is not None:
            answer = _answer(row, "completion")
            _check_end("completion", answer)
            if prompt is None:
                raise RowError("prompt", "text or a list of messages", None)
        elif isinstance(prompt, tuple) and prompt[-1].role == "assistant":
            prompt, answer = prompt[:-1], prompt[-1:]
        else:
            for column in ("conversations", "messages"):
                if row.get(column) is not None and isinstance(prompt, tuple):
                    _check_end(column, prompt)
            raise RowError("completion", _ANSWER, row.get("completion"))
        return _comparison(prompt, [answer], (1.0 if label else 0.0,), row)

    @override
    def prompt(self, row: Mapping[str, Any]) -> Conversation | Completion:
        record = super().prompt(row)
        if isinstance(record, Conversation) and record.messages[-1].role == "assistant":
            return record._replace(messages=record.messages[:-1])
        return record


# ---- answers --------------------------------------------------------------------------------------------------------


def _answer(row: Mapping[str, Any], column: str) -> Answer:
    """A column that holds an answer: text, one message, or several; `""` or `()` where its text is empty."""
    value = row.get(column)
    if isinstance(value, str):
        return value if value.strip() else ""
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list | tuple) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise RowError(column, _ANSWER, value)
    last = turns[-1]
    text = last.get("content", last.get("value"))
    if isinstance(text, str) and not text.strip() and not last.get("tool_calls"):
        turns = turns[:-1]
        if not turns:
            return ""
        return (*_turns(column, turns), Message("assistant", ""))
    return _turns(column, turns)


def _turns(column: str, turns: Any) -> tuple[Message, ...]:
    if "from" in turns[0]:
        try:
            return ShareGPT()({"conversations": turns}).messages
        except RowError as error:
            raise RowError(error.column.replace("conversations", column), error.wanted, error.got) from None
    return turns_of({column: turns}, column)


def _check_end(column: str, answer: Answer) -> None:
    """Refuses messages that do not end in an assistant's turn."""
    if not isinstance(answer, str) and answer[-1].role != "assistant":
        raise RowError(column, "messages that end in an answer", [turn.role for turn in answer])


def _comparison(prompt: Prompt, answers: list[Answer], grades: tuple[float, ...], row: Mapping[str, Any]) -> Comparison:
    """Answers with their prompt before each."""
    weight = weight_of(row)
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        if not prompt.strip():
            raise RowError("prompt", "non-empty text", prompt)
        texts = tuple(Completion(prompt, str(answer)) for answer in answers)
        return Comparison(texts, grades, weight=weight)
    given = _with_system((Message("user", prompt),), row) if isinstance(prompt, str) else prompt or ()
    if not given or given[-1].role == "assistant":
        raise RowError("prompt", "messages that end in something to answer", [m.role for m in given])
    tools = tools_of(row)
    whole = []
    for answer in answers:
        turns = (Message("assistant", answer),) if isinstance(answer, str) else answer
        if not turns[-1].content.strip() and not (turns[-1].more or {}).get("tool_calls"):
            turns = ()
        whole.append(Conversation((*given, *turns), tools, given=len(given)))
    return Comparison(tuple(whole), grades, weight=weight)


def _is_history(prompt: Prompt) -> bool:
    """Whether a prompt is what was said before, and the question follows in the answers."""
    return isinstance(prompt, tuple) and prompt[-1].role in ("assistant", "system")


def _from_prompt(prompt: Prompt, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """A conversation with what its prompt has before it; most begin with the whole prompt.

    Raises:
        RowError: If the prompt ends in a user's turn that is not in the conversation.
    """
    if prompt is None:
        return turns
    if isinstance(prompt, str):
        prompt = (Message("user", prompt),)
    said, plain = ([(m.role, m.content.strip()) for m in some if m.role != "system"] for some in (prompt, turns))
    if plain[: len(said)] == said:
        missing = turns[0].role != "system" and prompt[0].role == "system"
        return (prompt[0], *turns) if missing else turns
    if _is_history(prompt):
        again = prompt[0].role == "system" and turns[0].role == "system"
        return (*prompt, *turns[again:])
    raise RowError(
        "prompt",
        "turns that chosen and rejected begin with, or what was said before them (data.columns={prompt: null} leaves "
        "the column out)",
        [m.content for m in prompt],
    )


def _shared_turns(first: tuple[Message, ...], second: tuple[Message, ...]) -> tuple[Prompt, list[Answer]]:
    """What two conversations begin with alike, up to where an assistant's turn follows in both, and what is left.

    Where they part in a user's turn, the assistant's turn before it opens both answers, and is not trained.
    """
    alike = 0
    while alike < min(len(first), len(second)) - 1 and first[alike] == second[alike]:
        alike += 1
    shared = alike
    while shared and not all(turns[shared].role == "assistant" for turns in (first, second)):
        shared -= 1
    if not shared:
        raise RowError("rejected", "a conversation that begins as chosen does", [second[0].content])
    same = tuple(turn._replace(weight=0.0) for turn in first[shared:alike])
    return first[:shared], [(*same, *turns[alike:]) for turns in (first, second)]


def _shared_words(first: str, second: str) -> tuple[str, list[Answer]]:
    """What two texts begin with alike, up to the end of a word, and what is left of each, which is not nothing."""
    shared, most = 0, min(len(first.rstrip()), len(second.rstrip()))
    while shared < most and first[shared] == second[shared]:
        shared += 1
    while shared and (shared == most or not (_word_ends(first, shared) and _word_ends(second, shared))):
        shared -= 1
    while shared and first[shared - 1].isspace():
        shared -= 1
    if not first[:shared].strip():
        raise RowError(
            "prompt",
            "text (in data.columns say which column has it), where chosen and rejected do not begin alike",
            None,
        )
    rest = [text[shared:] for text in (first, second)]
    return first[:shared], [text if text.strip() else "" for text in rest]


def _word_ends(text: str, place: int) -> bool:
    """Whether a word ends before a place; every Chinese, Japanese or Korean character is one."""
    return text[place].isspace() or any(ord(one) >= _FIRST_WIDE for one in text[place - 1 : place + 1])


def _scores(scores: Any, count: int) -> list[float]:
    wanted = f"{count} numbers, one an answer"
    if not isinstance(scores, list | tuple) or len(scores) != count:
        raise RowError("scores", wanted, scores)
    if not all(isinstance(s, int | float) and not isinstance(s, bool) and math.isfinite(s) for s in scores):
        raise RowError("scores", wanted, scores)
    return [float(score) for score in scores]


__all__ = ["Labelled", "Pairs", "PreferenceFormat", "Ranking"]
