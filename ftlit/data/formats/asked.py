"""What the rows with answers ask: one prompt, in however many columns and whole answers it is written."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ftlit.data.formats.base import Message, RowError, likeliest, text_of
from ftlit.data.formats.turns import turns_of
from ftlit.data.formats.written import parsed

Turns = tuple[Message, ...]
Prompt = Turns | str | None
Answer = Turns | str

LISTS = ("conversations", "messages")
QUESTIONS = ("question", "query", "input", "context")
"""What a user asks, where no other column says it."""

PROMPTS = (*LISTS, "instruction", "prompt", *QUESTIONS)
"""Columns that hold a prompt; the first one that a row has is read, and the others must say the same."""

SYSTEMS = ("system", "system_prompt")
BEFORE = ("input", "history", *SYSTEMS)
"""What goes with a prompt."""

_LIKELY = (
    *(
        "context",
        "post",
        "dialogue",
        "dialog",
        "conversation",
        "passage",
        "problem",
        "user",
        "human",
        "request",
        "task",
    ),
    *("inputs", "article", "document", "src", "source_text", "title", "frage", "问题", "指令"),
)
ANSWER = "text, a message, or a list of messages"
_TURN_KEYS = (("role", "content"), ("from", "value"))
_WRITTEN = re.compile(r"\s*(?:\[\s*)?\{\s*['\"](?:role|from|content|value)['\"]\s*:")
# A speaker's mark, or one of a chat template, after which an answer begins.
_MARK = re.compile(
    r"(?:(?:^|(?<=\s))(?:assistant|chatgpt|gpt|bot)[ \t]*:"
    r"|^[ \t]*(?:#+[ \t]*|\*\*)?(?:assistant|ai|model|answer|response|output|reply|a|tl;dr|antwort|助手|回答|答)"
    r"(?:\*\*)?[ \t]*[:：](?:\*\*)?"
    r"|(?<=[。？！])答[:：]"
    r"|<\|(?:im_start|start)\|>assistant(?:<\|message\|>)?|<\|start_header_id\|>assistant<\|end_header_id\|>"
    r"|<start_of_turn>model|<\|(?:assistant|bot)\|>|<(?:assistant|ASSISTANT)>|\[/INST\])"
    r"(?:[ \t]*\n)*",
    re.IGNORECASE | re.MULTILINE,
)
_MARKUP = re.compile(r"<\|[^|]+\|>|\[/?INST\]|<(?:start|end)_of_turn>|^\s*#+\s|^[ \t]*[A-Za-z]+:", re.MULTILINE)


# ---- columns --------------------------------------------------------------------------------------------------------


def told(row: Mapping[str, Any], column: str) -> Any:
    """What a column holds; messages where it holds their JSON or Python text, as the cells of a table do.

    Raises:
        RowError: If the text of a list of messages cannot be read.
    """
    value = row.get(column)
    if not isinstance(value, str) or not _WRITTEN.match(value):
        return value
    with warnings.catch_warnings(action="ignore"):
        found = parsed(value)
    if not isinstance(found, str):
        turns = [found] if isinstance(found, dict) else found
        return found if all(_is_turn(turn) for turn in turns) else value
    if value.lstrip().startswith("{"):
        return value
    raise RowError(column, "the JSON or Python text of a list of messages (write the table with json.dumps)", value)


def _is_turn(turn: Any) -> bool:
    """Whether an object is a message and nothing else."""
    return isinstance(turn, dict) and any({name, text} <= set(turn) for name, text in _TURN_KEYS)


def has(row: Mapping[str, Any], column: str) -> bool:
    """Whether a row has something in a column; an empty list or a cell of white space is nothing."""
    value = row.get(column)
    return bool(value.strip() if isinstance(value, str) else value)


def turns_in(row: Mapping[str, Any], column: str, turns: Any) -> Turns:
    """Turns of a row, which may say in its `tools` what their calls mean.

    Raises:
        RowError: If there are none.
    """
    return turns_of({column: turns, "tools": row.get("tools")}, column)


def answer_of(row: Mapping[str, Any], column: str) -> Answer:
    """A column that holds an answer: text, one message, or several; `""` or an empty last turn where it is empty.

    Raises:
        RowError: If it does not, or its messages do not end in an answer.
    """
    value = told(row, column)
    if isinstance(value, str):
        return value if value.strip() else ""
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list | tuple) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise RowError(column, ANSWER, value)
    last = turns[-1]
    text = last.get("content", last.get("value"))
    empty = isinstance(text, str) and not text.strip() and not last.get("tool_calls")
    if empty and len(turns) == 1:
        return ""
    answer = turns_in(row, column, turns[:-1] if empty else turns)
    if empty:
        return (*answer, Message("assistant", ""))
    if answer[-1].role != "assistant":
        raise RowError(column, "messages that end in an answer", [turn.role for turn in answer])
    return answer


def history_of(row: Mapping[str, Any]) -> Turns:
    """The `history` of a row: what was said before, as pairs of texts or as messages; nothing where it has none.

    Raises:
        RowError: If it holds something else.
    """
    history = told(row, "history")
    if not history or (isinstance(history, str) and not prompts_of(row)):  # such a text is what is asked
        return ()
    wanted = "a list of pairs of texts, or of messages"
    if not isinstance(history, list | tuple):
        raise RowError("history", wanted, history)
    if all(isinstance(turn, Mapping) for turn in history):
        return turns_in(row, "history", history)
    turns: list[Message] = []
    for number, pair in enumerate(history):
        texts = pair if isinstance(pair, list | tuple) else ()
        if len(texts) != 2 or not all(isinstance(text, str) and text.strip() for text in texts):
            raise RowError(f"history[{number}]", "a pair of texts", pair)
        turns += [Message("user", texts[0]), Message("assistant", texts[1])]
    return tuple(turns)


def system_of(row: Mapping[str, Any]) -> str:
    """The system turn that a row has in a column of its own; `""` where it has none."""
    return next((text for column in SYSTEMS if (text := text_of(row, column, required=False)).strip()), "")


def is_chat(row: Mapping[str, Any]) -> bool:
    """Whether texts of a row are turns: where the file has a column of system turns, or the row a history."""
    return any(column in row for column in SYSTEMS) or bool(history_of(row))


def with_own_system(turns: Turns, row: Mapping[str, Any]) -> Turns:
    """Turns with the system turn of the row before them.

    Raises:
        RowError: If they begin with another one.
    """
    if not (system := system_of(row)):
        return turns
    if not turns or turns[0].role != "system":
        return (Message("system", system), *turns)
    if turns[0].content.strip() != system.strip():
        raise RowError(next(c for c in SYSTEMS if has(row, c)), "the system turn that the messages begin with", system)
    return turns


def prompts_of(row: Mapping[str, Any]) -> dict[str, Turns | str]:
    """What a row has in its columns of prompts, by column, the one that is read first."""
    found: dict[str, Turns | str] = {}
    for column in LISTS:
        if has(row, column):
            found[column] = turns_in(row, column, told(row, column))
    if has(row, "instruction"):
        more = text_of(row, "input", required=False)
        found["instruction"] = (Message("user", text_of(row, "instruction") + (f"\n{more}" if more else "")),)
    prompt = told(row, "prompt")
    if isinstance(prompt, list | tuple | Mapping):
        found["prompt"] = turns_in(row, "prompt", [prompt] if isinstance(prompt, Mapping) else prompt)
    elif prompt is not None and (has(row, "prompt") or not found):
        found["prompt"] = text_of(row, "prompt")
    for column in QUESTIONS:
        if has(row, column) and not (column == "input" and "instruction" in found):
            asked = told(row, column)
            if column == "context" and not isinstance(asked, list | tuple):
                continue  # a text beside a prompt, most often
            is_list = isinstance(asked, list | tuple)
            found[column] = turns_in(row, column, asked) if is_list else (Message("user", text_of(row, column)),)
    return found


# ---- whether two say the same ---------------------------------------------------------------------------------------


def plain(turns: Turns) -> list[tuple[str, str]]:
    """Roles and texts, less white space around them and system turns."""
    return [(turn.role, turn.content.strip()) for turn in turns if turn.role != "system"]


def system_turns(turns: Turns) -> Turns:
    """The system turns that some turns begin with."""
    count = next((number for number, turn in enumerate(turns) if turn.role != "system"), len(turns))
    return turns[:count]


def renders(text: str, turns: Turns) -> bool:
    """Whether a text is what a chat template, or a hand with speaker marks, makes of some turns."""
    place, rest = 0, []
    for _, content in plain(turns):
        found = text.find(content, place)
        if found < 0:
            return False
        rest.append(text[place:found])
        place = found + len(content)
    left = "\n".join([*rest, text[place:]])
    return not left.strip() or bool(_MARKUP.search(left))


def says(full: Turns | str, part: Turns | str) -> bool:
    """Whether everything that one prompt says is in another one."""
    texts = [full.strip()] if isinstance(full, str) else [text for _, text in plain(full)]
    asked = [part.strip()] if isinstance(part, str) else [text for _, text in plain(part)]
    if any(texts[start : start + len(asked)] == asked for start in range(len(texts))):
        return True
    if len(asked) == 1 and any(asked[0] in text for text in texts):
        return True
    return isinstance(part, str) and not isinstance(full, str) and renders(part, full)


def one_prompt(found: Mapping[str, Turns | str], row: Mapping[str, Any]) -> Prompt:
    """The prompt that several columns say.

    Raises:
        RowError: If one says something else.
    """
    if not found:
        return None
    (main, prompt), *others = found.items()
    for column, other in others:
        if not says(prompt, other):
            if not says(other, prompt):
                wanted = f"what {main!r} says (data.columns={{{column}: null}} leaves the column out)"
                raise RowError(column, wanted, row[column])
            main, prompt, other = column, other, prompt
        if not isinstance(other, str) and not isinstance(prompt, str) and not system_turns(prompt):
            prompt = (*system_turns(other), *prompt)
    return prompt


# ---- a prompt and its answers ---------------------------------------------------------------------------------------


def ends_in_mark(prompt: str) -> bool:
    """Whether a text ends where a speaker or a chat template lets an answer begin."""
    return any(not prompt[found.end() :].strip() for found in _MARK.finditer(prompt))


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row by its columns alone: text, turns with system turn and history, or None."""
    return _in_full(one_prompt(_asked(row), row), row)


def asked_and_answered(row: Mapping[str, Any], answers: Mapping[str, Answer]) -> tuple[Prompt, list[Answer]]:
    """The prompt of a row, and its answers without what they repeat of it.

    Args:
        row: The row.
        answers: Its answers, by column.

    Raises:
        RowError: If the columns do not say what the answers begin with, or not the same.
    """
    wholes = {name: one for name, one in answers.items() if not isinstance(one, str) and _is_whole(one)}
    if wholes and len(wholes) < len(answers):
        odd = next(name for name in answers if (name in wholes) != (next(iter(answers)) in wholes))
        raise RowError(odd, f"an answer of the same shape as {next(iter(answers))}", row.get(odd))
    if wholes:
        return _of_wholes(row, wholes)
    found = {column: _without_answer(prompt, answers) for column, prompt in _asked(row).items()}
    prompt = _in_full(one_prompt(found, row), row)
    texts = {name: one for name, one in answers.items() if isinstance(one, str)}
    if isinstance(prompt, str) and len(texts) == len(answers):
        return _without_prompt(prompt, texts)
    if prompt is None:
        if len(texts) < len(answers) or len(texts) < 2:
            raise no_prompt(row)
        prompt, rest = shared_text(*texts.values())
        if column := _likely(row, prompt):
            raise no_prompt(row, column)
        return prompt, rest
    return prompt, list(answers.values())


def no_prompt(row: Mapping[str, Any], column: str = "") -> RowError:
    """The error of a row without a prompt; it names a column that looks like one."""
    column = column or _likely(row)
    advice = f" (is it {column!r}? data.columns={{prompt: {column}}}; {{{column}: null}} leaves that column out)"
    return RowError("prompt", "text or a list of messages" + (advice if column else ""), None)


def _likely(row: Mapping[str, Any], known: str = "") -> str:
    """A column that looks like a prompt and says what is not known; `""` where there is none."""
    texts = [name for name, value in row.items() if isinstance(value, str | list) and has(row, name)]
    column = likeliest(_LIKELY, [name for name in texts if not re.match("chosen|rejected|answer|completion", name)])
    value = row.get(column)
    return "" if isinstance(value, str) and known and says(known, value) else column


def _is_whole(answer: Turns) -> bool:
    return answer[0].role in ("system", "user")


def _asked(row: Mapping[str, Any]) -> dict[str, Turns | str]:
    """The prompts of a row; a text that is called `history` is what was asked where nothing else is."""
    found = prompts_of(row)
    if not found and isinstance(told(row, "history"), str) and has(row, "history"):
        return {"history": (Message("user", row["history"]),)}
    return found


def _in_full(prompt: Prompt, row: Mapping[str, Any]) -> Prompt:
    """A prompt with the history and the system turn that stand in columns of their own."""
    if prompt is None:
        return None
    if isinstance(prompt, str):
        if not is_chat(row):
            return prompt
        prompt = (Message("user", prompt),)
    before = history_of(row)
    own = system_turns(prompt)
    if before and plain(prompt)[: len(plain(before))] != plain(before):
        prompt = (*(own or system_turns(before)), *before[len(system_turns(before)) :], *prompt[len(own) :])
    return with_own_system(prompt, row)


def _without_answer(prompt: Turns | str, answers: Mapping[str, Answer]) -> Turns | str:
    """A conversation that ends in one of the answers, up to where that begins."""
    if isinstance(prompt, str) or prompt[-1].role != "assistant":
        return prompt
    for answer in answers.values():
        turns = (Message("assistant", answer),) if isinstance(answer, str) else answer
        if len(turns) < len(prompt) and plain(prompt)[-len(turns) :] == plain(turns):
            return prompt[: -len(turns)]
    return prompt


def _without_prompt(prompt: str, answers: Mapping[str, str]) -> tuple[str, list[Answer]]:
    """A text and its answers, which do not begin with all of it again.

    Raises:
        RowError: If it cannot be told whether they repeat it or only begin alike.
    """
    again, texts = prompt.strip(), list(answers.values())
    if not again or not all(text.lstrip().startswith(again) for text in texts if text):
        return prompt, [*texts]
    rest = [text.lstrip()[len(again) :] for text in texts]
    marks = [_MARK.match(text.lstrip()) for text in rest]
    if marks[0] and all(mark and mark[0] == marks[0][0] for mark in marks):
        return shared_text(*texts)
    if not _MARK.search(again):
        if len(again.split()) < 3 and len(again) < 24:
            return prompt, [*texts]  # "Hi" and "Hi there": an answer that begins so by itself
        raise RowError(
            next(iter(answers)),
            "an answer without its prompt, which all answers of the row begin with (if they are whole texts, "
            "data.columns={prompt: null} takes what they share as the prompt)",
            texts[0],
        )
    return prompt.rstrip(), [text if text.strip() else "" for text in rest]


# ---- whole conversations --------------------------------------------------------------------------------------------


def _of_wholes(row: Mapping[str, Any], answers: Mapping[str, Turns]) -> tuple[Prompt, list[Answer]]:
    """What whole conversations begin with alike, after what the columns say was before them."""
    wholes = list(answers.values())
    for column, prompt in _asked(row).items():
        wholes = _from_prompt(column, prompt, wholes, list(answers), row)
    before = history_of(row)
    if before and any(plain(turns)[: len(plain(before))] != plain(before) for turns in wholes):
        wholes = [(*before, *turns) for turns in wholes]
    return shared_turns([with_own_system(turns, row) for turns in wholes], list(answers))


def _from_prompt(
    column: str, prompt: Turns | str, wholes: Sequence[Turns], names: Sequence[str], row: Mapping[str, Any]
) -> list[Turns]:
    """Conversations with what a column has before them; most begin with it, or are in it.

    Raises:
        RowError: If the column holds turns that are not in the conversations and do not come before them.
    """
    listed = " and ".join(names)
    again = [len(plain(turns)) for turns in wholes]
    if isinstance(prompt, str):
        begins = [[turn for turn in turns if turn.role == "user"] for turns in wholes]
        shared = [turn for turn in begins[0] if all(turn in one for one in begins)]
        if any(_same_text(prompt, turn.content) for turn in shared):
            return list(wholes)
        if shared and any(renders(prompt, wholes[0][:end]) for end in range(1, len(wholes[0]))):
            return list(wholes)
    else:
        own, said = system_turns(prompt), plain(prompt)
        begin_alike = all(plain(turns)[: len(said)] == said for turns in wholes)
        is_copy = any(plain(turns) == said for turns in wholes)
        is_question = len(said) == 1 and all(said[0] in plain(turns)[:-1] for turns in wholes)
        if begin_alike or is_copy or is_question:
            return [turns if system_turns(turns) else (*own, *turns) for turns in wholes]
        ends = not said or prompt[-1].role == "assistant"
        apart = not any(plain(turns)[:1] == said[:1] or _within(said, plain(turns)) for turns in wholes)
        if ends and apart and min(again):
            return [(*prompt, *(turns[len(system_turns(turns)) :] if own else turns)) for turns in wholes]
    raise RowError(
        column,
        f"turns that {listed} begin with, or what was said before them (data.columns={{{column}: null}} leaves "
        "the column out)",
        prompt if isinstance(prompt, str) else [turn.content for turn in prompt],
    )


def _same_text(first: str, second: str) -> bool:
    return first.strip() == second.strip()


def _within(part: list[tuple[str, str]], whole: list[tuple[str, str]]) -> bool:
    return any(whole[start : start + len(part)] == part for start in range(len(whole)))


def shared_turns(wholes: Sequence[Turns], names: Sequence[str]) -> tuple[Prompt, list[Answer]]:
    """What conversations begin with alike, up to where an assistant's turn follows in all, and what is left.

    Where they part in a user's turn, the assistant's turn before it opens all answers, and is not trained. Of a single
    one the last turns of the assistant are the answer.
    """
    first, most = wholes[0], min(len(turns) for turns in wholes) - 1
    alike = 0
    while alike < most and all(turns[alike] == first[alike] for turns in wholes):
        alike += 1
    shared = alike
    while shared and not all(turns[shared].role == "assistant" for turns in wholes):
        shared -= 1
    while len(wholes) == 1 and shared and first[shared - 1].role in ("assistant", "tool"):
        shared -= 1
    if not shared:
        raise RowError(names[-1], f"a conversation that begins as {names[0]} does", [wholes[-1][0].content])
    if len(wholes) == 1:
        return first[:shared], [first[shared:]]
    same = tuple(turn._replace(weight=0.0) for turn in first[shared:alike])
    return first[:shared], [(*same, *turns[alike:]) for turns in wholes]


# ---- whole texts ----------------------------------------------------------------------------------------------------

_FIRST_WIDE = 0x2E80  # the first of the characters that are written without spaces between words


def shared_text(*texts: str) -> tuple[str, list[Answer]]:
    """What texts begin with alike, up to the last mark of an answer, or the end of a word where there are no marks.

    Raises:
        RowError: If they begin with nothing alike.
    """
    first, most = texts[0], min(len(text.rstrip()) for text in texts)
    shared = 0
    while shared < most and all(text[shared] == first[shared] for text in texts):
        shared += 1
    marks = [(found[0].strip(), found.end()) for found in _MARK.finditer(first[:shared])]
    of_speakers = [end for mark, end in marks if mark == marks[0][0]]  # another kind may be part of an answer
    shared = of_speakers[-1] if of_speakers else _whole_words(texts, shared, most)
    if not first[:shared].strip():
        raise RowError(
            "prompt",
            "text (in data.columns say which column has it), where chosen and rejected do not begin alike",
            None,
        )
    rest = [text[shared:] for text in texts]
    return first[:shared], [text if text.strip() else "" for text in rest]


def _whole_words(texts: Sequence[str], shared: int, most: int) -> int:
    """The last place up to `shared` where a word ends in all texts, less the white space before it."""
    while shared and (shared == most or not all(_word_ends(text, shared) for text in texts)):
        shared -= 1
    while shared and texts[0][shared - 1].isspace():
        shared -= 1
    return shared


def _word_ends(text: str, place: int) -> bool:
    """Whether a word ends before a place; every Chinese, Japanese or Korean character is one."""
    return text[place].isspace() or any(ord(one) >= _FIRST_WIDE for one in text[place - 1 : place + 1])


__all__ = [
    "ANSWER",
    "BEFORE",
    "LISTS",
    "PROMPTS",
    "SYSTEMS",
    "Answer",
    "Prompt",
    "Turns",
    "answer_of",
    "asked_and_answered",
    "ends_in_mark",
    "history_of",
    "is_chat",
    "prompt_of",
    "shared_text",
    "shared_turns",
    "told",
    "turns_in",
    "with_own_system",
]
