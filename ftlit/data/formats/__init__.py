"""Row formats, one a file, and how one is chosen from the columns."""

from collections.abc import Iterable, Mapping

from ftlit.data.formats.aliases import known_columns, known_pairs
from ftlit.data.formats.alpaca import Alpaca
from ftlit.data.formats.base import (
    Comparison,
    Completion,
    Conversation,
    Message,
    Record,
    RowError,
    RowFormat,
    Text,
    likeliest,
    unanswered,
)
from ftlit.data.formats.function_calls import FunctionCalls
from ftlit.data.formats.judged import Judged
from ftlit.data.formats.messages import Messages
from ftlit.data.formats.preference import Labelled, Pairs, PreferenceFormat, Ranking
from ftlit.data.formats.prompt_completion import PromptCompletion
from ftlit.data.formats.raw_text import RawText
from ftlit.data.formats.segments import Segments
from ftlit.data.formats.sharegpt import ShareGPT
from ftlit.errors import DataError

BUILT_IN: tuple[type[RowFormat], ...] = (
    *(Messages, ShareGPT, Alpaca, PromptCompletion, FunctionCalls),
    *(Segments, RawText),
)
PREFERENCES: tuple[type[PreferenceFormat], ...] = (Pairs, Ranking, Judged, Labelled)

# What files call the columns of a question and its answer, likeliest first; only ever used to suggest.
_QUESTIONS = ("question", "prompt", "query", "instruction", "problem", "input", "user", "frage", "问题", "指令")
_ANSWERS = (
    *("answer", "output", "response", "completion", "solution", "target", "reply", "assistant", "label", "chosen"),
    *("antwort", "回答", "答案", "输出"),
)
_MORE = {"input": ("context", "input", "passage"), "system": ("system_prompt", "system_message", "system")}
_LISTS = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue", "turns")
_BETTER = ("better", "preferred", "accepted", "winner", "win", "positive", "chosen_response", "response_chosen")
_WORSE = ("worse", "dispreferred", "unpreferred", "loser", "lose", "negative", "rejected_response")
_RANKED = ("responses", "completions", "candidates", "generations", "outputs", "ranking")
_FLAGS = ("kto_tag", "labels", "desirable", "is_good", "thumbs_up", "upvote", "feedback", "liked", "good")
_TEXTS = ("text", "content", "document", "body", "article", "passage", "story", "code")


def detect(columns: Iterable[str], where: str, *, answers: bool = True) -> RowFormat:
    """The format that fits the columns.

    Args:
        columns: The columns of the rows.
        where: The file, for the error.
        answers: Whether the rows must have the column of the answer.

    Raises:
        DataError: If none fits; it names the `data.columns` that likely would.
    """
    have = list(columns)
    if {"text", "role"} <= set(have) and {"parent_id", "message_tree_id"} & set(have):
        raise DataError(
            f"{where}: columns {', '.join(sorted(have))} hold one turn a row, of trees of turns; write each "
            "conversation as one row of messages."
        )
    for kind in BUILT_IN:
        needed = [name for name in kind.columns if answers or name not in (kind.answer, "completion")]
        if set(needed) <= set(have):
            return kind()
    known = "; ".join(f"{kind.__name__} needs {', '.join(kind.columns)}" for kind in BUILT_IN)
    suggested = suggest(have)
    listed = ", ".join(f"{name}: {column}" for name, column in suggested.items())
    advice = f"Say which is which, such as data.columns: {{{listed}}}" if listed else "Say which is which: data.columns"
    if listed and (left := sorted(set(have) - {*suggested, *suggested.values()})):
        advice += f" ({', '.join(left)} would not be read)"
    raise DataError(
        f"{where}: columns {', '.join(sorted(have)) or '(none)'} fit no known row format ({known}). "
        f"{advice}, or give data.format a class of your own."
    )


def _named(words: Iterable[str], have: Iterable[str]) -> str:
    """The column that is called by one of some words, whatever its capitals; empty where none is."""
    by_fold = {column.casefold(): column for column in have}
    return next((by_fold[word] for word in words if word in by_fold), "")


def detect_preference(columns: Iterable[str], where: str, *, answers: bool = True) -> RowFormat:
    """The preference format that fits the columns.

    Args:
        columns: The columns of the rows.
        where: The file, for the error.
        answers: Whether the rows must have answers; rows that are only to be answered may be of any format.

    Raises:
        DataError: If none fits.
    """
    have = list(dict.fromkeys(columns))
    for kind in PREFERENCES:
        try:
            if (made := kind.of(have)) is not None:
                return made
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
    if not answers:
        return detect(have, where, answers=False)
    listed = ", ".join(f"{name}: {column}" for name, column in _suggest_preference(sorted(have)).items())
    raise DataError(
        f"{where}: columns {', '.join(sorted(have)) or '(none)'} fit no preference format (Pairs needs chosen, "
        "rejected; Ranking needs answers; Judged needs two answers and winner; Labelled needs label). "
        "Say which is which, such as data.columns: "
        f"{{{listed}}}, or give data.format a class of your own."
        + (" A score for each answer by itself is learnt with --config classification." if "score" in have else "")
    )


def _suggest_preference(have: list[str]) -> Mapping[str, str]:
    """The `data.columns` that likely make preference rows of some columns, or an example."""

    def first(*words: str) -> str:
        return next((word for word in words if word in have), "")

    better, worse = first("chosen", *_BETTER), first("rejected", *_WORSE)
    if better or worse:
        pairs = {"chosen": better or "BETTER", "rejected": worse or "WORSE"}
        return {name: column for name, column in pairs.items() if name != column}
    if found := first(*_RANKED):
        return {"answers": found}
    if found := first(*_FLAGS):
        return {"label": found}
    return {"chosen": "better", "rejected": "worse"}


def suggest(columns: Iterable[str]) -> Mapping[str, str]:
    """The `data.columns` that likely fit some columns: format's name to file's name; empty where nothing is near."""
    have = list(columns)
    if found := likeliest(_LISTS, have):
        return {"messages": found}
    question = likeliest(_QUESTIONS, have)
    answer = likeliest(_ANSWERS, [column for column in have if column != question])
    if question and answer:
        more = {name: _named(words, have) for name, words in _MORE.items()}
        more = {name: column for name, column in more.items() if column and column not in (name, question, answer)}
        return {"instruction": question, "output": answer, **more}
    if found := likeliest(_TEXTS, have):
        return {"text": found}
    if len(have) == 2:
        return {"instruction": have[0], "output": have[1]}
    return {}


__all__ = [
    "BUILT_IN",
    "PREFERENCES",
    "Alpaca",
    "Comparison",
    "Completion",
    "Conversation",
    "FunctionCalls",
    "Judged",
    "Labelled",
    "Message",
    "Messages",
    "Pairs",
    "PreferenceFormat",
    "PromptCompletion",
    "Ranking",
    "RawText",
    "Record",
    "RowError",
    "RowFormat",
    "Segments",
    "ShareGPT",
    "Text",
    "detect",
    "detect_preference",
    "known_columns",
    "known_pairs",
    "suggest",
    "unanswered",
]
