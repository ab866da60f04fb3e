"""The held-out rows that generation is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ftlit.data.datamodules import MAIN
from ftlit.data.formats import Conversation, Message
from ftlit.data.sources import Source
from ftlit.errors import ConfigError

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
    """

    number: int
    messages: tuple[Message, ...]
    prompt: list[int]
    reference: str | None
    columns: Mapping[str, Any]

    @property
    def turns(self) -> list[dict[str, str]]:
        """The turns as the chat APIs write them."""
        return [message._asdict() for message in self.messages]


def eval_rows(data: Any, rows: str | None, test: bool, num_rows: int | None, seed: int) -> tuple[list[EvalRow], int]:
    """Reads and tokenizes rows to answer.

    Args:
        data: The datamodule, set up.
        rows: A validation set's name, a file, or `sample:NAME`; None: the test rows, else the main validation rows.
        test: Whether the test rows are meant where `rows` is None.
        num_rows: Most rows; more are thinned by a seeded choice.
        seed: Seed of the choice.

    Returns:
        The chosen rows, and how many there were to choose from.

    Raises:
        ConfigError: If there are none.
        DataError: If one cannot be read.
    """
    found = _conversations(data, rows, test)
    chosen = range(len(found))
    if num_rows is not None and num_rows < len(found):
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
        chosen = sorted(order[:num_rows].tolist())  # type: ignore[assignment]
    out = []
    for number in chosen:
        source, index, conversation = found[number]
        messages = conversation.messages
        reference = messages[-1].content if messages[-1].role == "assistant" else None
        if reference is not None:
            messages = messages[:-1]
        with source.at(index):
            prompt = data.template.prompt_ids(messages)
        columns = {key: value for key, value in dict(source.rows[index]).items() if key not in _TAKEN}
        out.append(EvalRow(number + 1, messages, prompt, reference, columns))
    return out, len(found)


def _conversations(data: Any, rows: str | None, test: bool) -> list[tuple[Source, int, Conversation]]:
    """The rows as the datamodule reads them, with its system turn and placeholders."""
    if rows is None and test:
        return data._rows("test", data.test_file)
    sets = data.validation
    if rows is None:
        if not sets:
            raise ConfigError("GenerationEval has no rows: set data.validation, or its own rows to a file.")
        rows = MAIN if MAIN in sets else next(iter(sets))
    given = sets.get(rows, rows)
    if isinstance(given, str):
        return data._rows(rows, given)
    trained_on = [row for file in data.files for row in data._rows("train", file)]
    return data._split(trained_on, float(given))[1]


__all__ = ["EvalRow", "eval_rows"]
