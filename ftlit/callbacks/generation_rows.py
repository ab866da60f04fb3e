"""The held-out rows that generation is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ftlit.data.cutting import prefilled
from ftlit.data.datamodules import MAIN
from ftlit.data.formats import Comparison, Completion, Conversation, Message, Record, Text
from ftlit.data.sources import Source
from ftlit.data.templating import ChatTemplate
from ftlit.errors import ConfigError, DataError

# Names of the verifier's own arguments.
_TAKEN = ("prompts", "completions")


class EvalRow(NamedTuple):
    """A question with what is known of its answer.

    Attributes:
        number: Which row of its set, counted from 1.
        messages: The turns before the answer.
        prompt: Their tokens.
        reference: The answer that the row holds, or None.
        columns: The row's own columns.
        plain: Whether the answer goes on from a text without a template.
        prefilled: The text with which the chat template begins it.
        where: File and row.
    """

    number: int
    messages: tuple[Message, ...]
    prompt: list[int]
    reference: str | None
    columns: Mapping[str, Any]
    plain: bool = False
    prefilled: str = ""
    where: str = ""

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The turns as the chat APIs write them."""
        return [message.turn() for message in self.messages]


class EvalRows(NamedTuple):
    """The questions of a set.

    Attributes:
        chosen: Those that are asked.
        available: How many there were to choose from.
        documents: Rows of raw text, which ask nothing.
    """

    chosen: list[EvalRow]
    available: int
    documents: int


def eval_rows(data: Any, rows: str | None, test: bool, num_rows: int | None, seed: int) -> EvalRows:
    """Reads and tokenizes rows to answer: the prompt of each is, token for token, what training puts before its answer.

    Args:
        data: The datamodule, set up.
        rows: A validation set's name, a file, or `sample:NAME`; None: the test rows, else the main validation rows.
        test: Whether the test rows are meant where `rows` is None.
        num_rows: Most rows; more are thinned by a seeded choice.
        seed: Seed of the choice.

    Raises:
        ConfigError: If there are none.
        DataError: If one cannot be read, and `data.on_bad_row` is `error`.
    """
    found = _records(data, rows, test)
    asking = [number for number, (_, _, record) in enumerate(found) if not isinstance(record, Text)]
    if not asking:
        raise ConfigError("GenerationEval has no questions, only raw text; set its own rows to a file that asks.")
    chosen = asking
    if num_rows is not None and num_rows < len(asking):
        order = torch.randperm(len(asking), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        chosen = [asking[place] for place in sorted(order[:num_rows].tolist())]
    out = []
    refused: dict[Source, list[str]] = {}
    for number in chosen:
        source, index, record = found[number]
        try:
            with source.at(index):
                row = _row(data.template, number + 1, record, source.named(index))
                out.append(row._replace(where=source.where(index)))
        except DataError as error:
            if data.on_bad_row == "error":
                raise
            refused.setdefault(source, []).append(str(error))
    for source, sentences in refused.items():
        data.list_skipped(source, sentences)
    if not out:
        raise ConfigError(f"GenerationEval: none of {len(chosen):,} rows can be asked.")
    return EvalRows(out, len(asking), len(found) - len(asking))


def _row(template: ChatTemplate, number: int, record: Record, row: Mapping[str, Any]) -> EvalRow:
    """One question: a record without its last answer; of compared answers the best is the reference."""
    reference, good, plain = None, True, isinstance(record, Completion)
    if isinstance(record, Comparison):
        grades = record.grades
        best = max(range(len(grades)), key=grades.__getitem__)
        record, good = record.answers[best], len(grades) > 1 or grades[best] > 0
        if isinstance(record, Conversation):  # up to the first turn of the answer
            record = record._replace(messages=record.messages[: record.given + 1])
    if isinstance(record, Completion):
        messages: tuple[Message, ...] = (Message("user", record.prompt),)
        reference = record.completion
    else:
        assert isinstance(record, Conversation)
        messages = record.messages
        if messages and messages[-1].role == "assistant":
            calls = (messages[-1].more or {}).get("tool_calls")
            reference = None if calls else messages[-1].content
            messages = messages[:-1]
        if not messages:
            raise DataError("holds no turn to answer.")
        record = record._replace(messages=messages)
    columns = {key: value for key, value in row.items() if key not in _TAKEN}
    prompt = template.prompt_of(record)
    begun = "" if plain else prefilled(str(template.tokenizer.decode(prompt[-16:])))
    return EvalRow(number, messages, prompt, reference if good else None, columns, plain, begun)


def _records(data: Any, rows: str | None, test: bool) -> list[tuple[Source, int, Record]]:
    """The rows as the datamodule reads them, with its system turn and placeholders."""
    if rows is None and test:
        return data.records("test", [data.test_file])
    sets = data.validation
    if rows is None:
        if not sets:
            raise ConfigError("GenerationEval has no rows: set data.validation, or its own rows to a file.")
        rows = MAIN if MAIN in sets else next(iter(sets))
    given = sets.get(rows, rows)
    if isinstance(given, str):
        return data.records("validation", [given])
    return data.held_out(rows)


__all__ = ["EvalRow", "EvalRows", "eval_rows"]
