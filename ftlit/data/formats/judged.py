"""Rows with two answers and a verdict: a column that says which of them is better."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, NamedTuple, Self

from typing_extensions import override

from ftlit.data.formats.asked import Answer, answer_of, asked_and_answered, ends_in_mark
from ftlit.data.formats.base import Comparison, Completion, Conversation, Message, RowError, number_of
from ftlit.data.formats.preference import PreferenceFormat, ranked
from ftlit.data.formats.written import parsed
from ftlit.errors import DataError

_ANSWER = re.compile(
    r"(response|answer|output|completion|conversation|human_ref|candidate|generation|reply|summary)_?([0-9a-z])", re.I
)
_BROTHERS = (("0", "1"), ("1", "2"), ("a", "b"))
_VERDICTS = (
    *("winner", "better_response_id", "safer_response_id", "preference", "preferred", "preferred_id", "better_id"),
    *("choice", "preferred_response", "better_response", "overall_preference", "preference_strength"),
)
# Columns with a number below 0 where the first answer is better, above 0 where the second one is.
_SIGNED = ("overall_preference", "preference_strength")
_TIES = ("tie", "tie (bothbad)", "bothbad", "both", "both bad", "equal", "same", "neither", "draw")
_FLAGS = "winner_model_{}"
_SCORE = ("score", "rating", "reward")


class _Pair(NamedTuple):
    """Two columns of answers, and what the ends of their names are."""

    columns: tuple[str, str]
    ends: tuple[str, str]


class Judged(PreferenceFormat):
    """`{"prompt": ..., "response_0": "...", "response_1": "...", "winner": 1}`: two answers and which one is better.

    The verdict is the end of the better answer's name (`1`, `b`, `model_b`), or a word such as `tie`; rows without a
    better answer are dropped and counted. It stands in `winner` or a column that is known (`better_response_id`,
    `labels` beside `human_ref_A`, `preference_strength` with a sign, the flags `winner_model_a` and `winner_model_b`),
    or the better answer is the one with the higher `score_...`. A `prompt` that is text is a user's turn, unless it
    ends in a mark such as `Assistant:`. A `margin` column says by how much the better answer is better.

    Args:
        first: Column of one answer.
        second: Column of the other.
        verdict: Column that says which is better: `winner`, or one of the columns above.
        first_wins: What the verdict is where the first is better, where that is not the end of its name.
        second_wins: What it is where the second is better.
    """

    columns: ClassVar[tuple[str, ...]] = ("winner",)
    optional: ClassVar[tuple[str, ...]] = (*PreferenceFormat.optional, "margin", "winner_tie")

    def __init__(
        self,
        first: str = "response_0",
        second: str = "response_1",
        verdict: str = "winner",
        first_wins: str | None = None,
        second_wins: str | None = None,
    ) -> None:
        self.first, self.second, self.verdict = first, second, verdict
        self.first_wins, self.second_wins = first_wins, second_wins
        self.first_score = self.second_score = self.first_flag = self.second_flag = ""

    @classmethod
    @override
    def of(cls, columns: Collection[str]) -> Self | None:
        if (pair := _pair(columns)) is None:
            return None
        made = cls(*pair.columns)
        known = [column for column in _VERDICTS if column in columns]
        if "winner" in known:
            return made
        if len(known) > 1:
            ways = " or ".join(f"data.columns={{winner: {column}}}" for column in known)
            raise DataError(f"several columns say which answer is better; choose one: {ways}.")
        if known:
            return cls(*pair.columns, verdict=known[0])
        if "labels" in columns and pair.columns[0].startswith("human_ref"):
            return cls(*pair.columns, "labels", "1", "0")
        flags = [_FLAGS.format(end) for end in pair.ends]
        scores = next(([f"{s}_{end}" for end in pair.ends] for s in _SCORE if _both(s, pair, columns)), None)
        if set(flags) <= set(columns):
            made.first_flag, made.second_flag = flags
        elif scores is not None:
            made.first_score, made.second_score = (_named(score, columns) for score in scores)
        else:
            return None
        return made

    @override
    def answers(self, row: Mapping[str, Any]) -> dict[str, Answer]:
        return {column: answer_of(row, column) for column in (self.first, self.second)}

    @override
    def __call__(self, row: Mapping[str, Any]) -> Comparison:
        row = self._turn_by_turn(row)
        prompt, answers = asked_and_answered(row, self.answers(row))
        if isinstance(prompt, str) and not ends_in_mark(prompt):
            prompt = (Message("user", prompt),)
        margin = number_of(row, "margin", 0.0)
        return ranked(prompt, answers, self._grades(row), row)._replace(margin=margin)

    @override
    def prompt(self, row: Mapping[str, Any]) -> Conversation | Completion:
        return super().prompt(self._turn_by_turn(row))

    def _turn_by_turn(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row whose prompt and answers are lists of texts, one a turn, with whole conversations as its answers.

        Raises:
            RowError: If the lists are not of one length, or hold anything but texts.
        """
        columns = ("prompt", self.first, self.second)
        lists = [parsed(row.get(column)) for column in columns]
        if not all(isinstance(one, list | tuple) and not any(isinstance(t, Mapping) for t in one) for one in lists):
            return row
        for column, one in zip(columns, lists, strict=True):
            if len(one) != len(lists[0]) or not one or not all(isinstance(text, str) and text.strip() for text in one):
                raise RowError(column, "as many texts as prompt and answers have turns", row[column])
        asked, *answers = lists
        whole = {
            column: [
                {"role": role, "content": text}
                for pair in zip(asked, answer, strict=True)
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
            for column, answer in zip(columns[1:], answers, strict=True)
        }
        return {key: value for key, value in {**row, **whole}.items() if key != "prompt"}

    def _grades(self, row: Mapping[str, Any]) -> tuple[float, float]:
        """1 for the better answer and 0 for the other; 0 for both where none is better."""
        if self.first_score:
            scores = [_number(row, column) for column in (self.first_score, self.second_score)]
            return float(scores[0] > scores[1]), float(scores[1] > scores[0])
        if self.first_flag:
            won = [_number(row, column) for column in (self.first_flag, self.second_flag)]
            if sorted(won) not in ([0, 0], [0, 1]):
                raise RowError(self.second_flag, "0 or 1, and not 1 where the other one is", row[self.second_flag])
            return won[0], won[1]
        if self.verdict in _SIGNED:
            number = _number(row, self.verdict)
            return float(number < 0), float(number > 0)
        return self._by_name(row)

    def _by_name(self, row: Mapping[str, Any]) -> tuple[float, float]:
        value = row.get(self.verdict)
        said = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip(" []").casefold()
        if said in _TIES:
            return 0.0, 0.0
        if self.first_wins is not None and self.second_wins is not None:
            names = [[self.first_wins.casefold()], [self.second_wins.casefold()]]
        else:
            names = [[column.casefold(), _end(column)] for column in (self.first, self.second)]
            said = said if said in names[0] + names[1] else re.split(r"[\s_]", said)[-1]
        wins = [said in some and not isinstance(value, bool) for some in names]
        if wins[0] == wins[1]:
            wanted = f"{names[0][-1]} or {names[1][-1]}, the better answer, or tie"
            if self.first_wins is None:
                wanted += " (Judged's first_wins and second_wins say what else it can be)"
            raise RowError(self.verdict, wanted, value)
        return float(wins[0]), float(wins[1])


def one_verdict(columns: Collection[str]) -> list[str]:
    """The columns with one verdict, for whom it does not matter which."""
    first = next((column for column in _VERDICTS if column in columns), None)
    return [column for column in columns if column == first or column not in _VERDICTS]


def _pair(columns: Collection[str]) -> _Pair | None:
    """The only two columns of answers that are called alike but for their ends."""
    by_stem: dict[str, dict[str, str]] = {}
    for column in columns:
        if found := _ANSWER.fullmatch(column):
            by_stem.setdefault(found[1].casefold(), {})[found[2].casefold()] = column
    pairs = [
        _Pair((ends[first], ends[second]), (first, second))
        for ends in by_stem.values()
        for first, second in _BROTHERS
        if set(ends) == {first, second}
    ]
    return pairs[0] if len(pairs) == 1 else None


def _end(column: str) -> str:
    return re.split(r"_|(?<=[a-z])(?=[0-9])", column)[-1].casefold()


def _named(name: str, columns: Collection[str]) -> str:
    """A column by its name in any case; `""` where there is none."""
    return next((column for column in columns if column.casefold() == name.casefold()), "")


def _both(stem: str, pair: _Pair, columns: Collection[str]) -> bool:
    return all(_named(f"{stem}_{end}", columns) for end in pair.ends)


def _number(row: Mapping[str, Any], column: str) -> float:
    try:
        number = float(row.get(column))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(column, "a number", row.get(column))
    return number


__all__ = ["Judged", "one_verdict"]
