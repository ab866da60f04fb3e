"""What public data sets call the columns that the formats read, and which of theirs have one meaning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ftlit.data.formats.alpaca import is_references
from ftlit.data.formats.transcripts import turns_in_text
from ftlit.data.formats.written import parsed

# Names of a question and of its answer, in small letters. Of several answers the one that comes first here is taken: a
# worked solution, say, before its bare result.
_QUESTIONS = ("instruction", "question", "prompt", "query", "problem", "inputs_pretokenized", "inputs")
_ANSWERS = (
    *("output", "response", "completion", "canonical_solution", "generated_solution", "solution"),
    *("targets_pretokenized", "target", "targets", "answer", "expected_answer", "answers"),
)
# Those of them that may hold several reference answers.
_REFERENCES = ("answer", "answers")
# Where nothing is trained on an answer, the bare result is what rewards compare with.
_RESULTS = ("output", "completion", "response", "answer", "expected_answer", *_ANSWERS)
# A text and what is made of it.
_DOCUMENTS, _SUMMARIES = ("article", "document", "dialogue"), ("summary", "highlights")
_CONTEXTS = ("context", "input")
_SYSTEMS = ("system_prompt", "system_message")
_LISTS = ("conversation", "dialog", "dialogue", "chat", "turns", "items")
_TEXTS = ("content", "raw_content", "raw_text")
# What the columns of a chosen and a rejected answer add to that.
_KINDS = ("messages", "conversation", "conversations", "response", "answer", "completion", "output", "text")
_CALLS = ("answers", "calls", "tool_calls", "function_calls")


def known_columns(columns: Iterable[str], row: Mapping[str, Any], *, answers: bool = True) -> dict[str, str]:
    """The `data.columns` of rows whose columns have one meaning, though other names than the formats'.

    Args:
        columns: Their columns.
        row: One of the rows, to tell texts from lists.
        answers: Whether the rows must have an answer.

    Returns:
        The format's name to the file's; empty where nothing is to be renamed, or it is not clear what.
    """
    names = _Names(columns, row)
    if names.have({"messages"}) or names.have({"conversations"}) or names.have({"text"}):
        return {}
    if names.have({"prompt", "completion"}):
        return {}
    if not names.have({"instruction", "output"}) and (found := names.first(_LISTS, names.is_dialogue)):
        return {"messages": found}
    made = names.calls() or names.question_and_answer(answers)
    if not made:
        found = names.first(_TEXTS, names.is_text)
        return {"text": found} if found and not names.any((*_QUESTIONS, *_ANSWERS)) else {}
    return {name: column for name, column in made.items() if name != column}


def known_pairs(columns: Iterable[str]) -> dict[str, str]:
    """The `data.columns` of pairs whose columns say by both their names what they are: `chosen_messages`, say.

    Args:
        columns: Their columns.

    Returns:
        The format's name to the file's; empty where there is nothing to rename, or more than one such pair.
    """
    have = set(columns)
    if have & {"chosen", "rejected"}:
        return {}
    made = [
        {side: name.format(side=side, kind=kind) for side in ("chosen", "rejected")}
        for name in ("{side}_{kind}", "{kind}_{side}")
        for kind in _KINDS
    ]
    found = [pair for pair in made if set(pair.values()) <= have]
    return found[0] if len(found) == 1 else {}


class _Names:
    """Columns by their names in small letters, and whether they hold texts."""

    def __init__(self, columns: Iterable[str], row: Mapping[str, Any]) -> None:
        self.row = row
        self.columns = {column.casefold(): column for column in columns}

    def have(self, wanted: set[str]) -> bool:
        """Whether there are such columns, under just these names."""
        return wanted <= set(self.columns.values())

    def any(self, words: Sequence[str]) -> bool:
        """Whether one of some columns is there."""
        return any(word in self.columns for word in words)

    def is_text(self, column: str) -> bool:
        """Whether a column holds text (or nothing) in the row that is looked at."""
        value = self.row.get(column)
        return value is None or isinstance(value, str)

    def is_list(self, column: str) -> bool:
        """Whether a column holds a list of turns, or its text."""
        turns = parsed(self.row.get(column))
        return isinstance(turns, list) and bool(turns) and all(isinstance(turn, Mapping | str) for turn in turns)

    def is_dialogue(self, column: str) -> bool:
        """Whether a column holds a list of turns, or the text of a conversation with marks of its speakers."""
        return self.is_list(column) or turns_in_text(self.row.get(column)) is not None

    def is_answer(self, column: str) -> bool:
        """Whether a column holds an answer: a text, or reference answers where such a column may.

        Several answers beside scores or ranks of theirs are a ranking: the first one may be the worst.
        """
        if self.is_text(column):
            return True
        is_ranking = any(name in self.columns for name in ("scores", "ranks", "ratings", "rewards"))
        return column.casefold() in _REFERENCES and is_references(self.row.get(column)) and not is_ranking

    def first(self, words: Sequence[str], fits: Any) -> str:
        """The first of some columns that is there and fits."""
        found = (self.columns[word] for word in words if word in self.columns)
        return next((column for column in found if fits(column)), "")

    def calls(self) -> dict[str, str]:
        """A question whose answer are calls of tools; empty where there are no tools."""
        question, calls = self.first(_QUESTIONS, self.is_text), self.first(_CALLS, self.is_list)
        return {"query": question, "answers": calls} if question and calls and "tools" in self.columns else {}

    def question_and_answer(self, answers: bool) -> dict[str, str]:
        """A question and its answer as `Alpaca` reads them; empty where it is not clear which they are."""
        asked = [self.columns[word] for word in _QUESTIONS if word in self.columns]
        if "inputs_pretokenized" in self.columns:
            asked = [self.columns["inputs_pretokenized"]]
        answer = self.first(_ANSWERS if answers else _RESULTS, self.is_answer)
        if not asked and answer and "input" in self.columns:
            asked = [self.columns["input"]]
        if not asked and (summary := self.first(_SUMMARIES, self.is_text)):
            asked, answer = [self.columns[word] for word in _DOCUMENTS if word in self.columns], summary
        if len(asked) != 1 or not self.is_text(asked[0]) or (answers and not answer):
            return {}
        if not answers and asked == ["prompt"]:
            return {}  # a text to go on from, as PromptCompletion reads it
        made = {"instruction": asked[0], "output": answer} if answer else {"instruction": asked[0]}
        for name, words in (("input", _CONTEXTS), ("system", ("system", *_SYSTEMS))):
            if (found := self.first(words, self.is_text)) and found not in made.values():
                made[name] = found
        return made


__all__ = ["known_columns", "known_pairs"]
