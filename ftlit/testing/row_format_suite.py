"""What every row format must hold. A format outside ftlit gets these tests from a subclass of a few lines."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import pytest

from ftlit.data.formats.base import (
    ROLES,
    Comparison,
    Completion,
    Conversation,
    Message,
    Record,
    RowError,
    RowFormat,
    Text,
)
from ftlit.data.templating import ChatTemplate
from ftlit.testing.tiny import TOOLS_TEMPLATE, tiny_tokenizer


class RowFormatSuite(ABC):
    """Conformance of a row format.

    Example:
        ```python
        class TestQA(RowFormatSuite):
            golden = (({"q": "Hi?", "a": "Yes."}, (("user", "Hi?"), ("assistant", "Yes."))),)
            bad = (({"q": "Hi?"}, "a"),)

            def make(self):
                return QA()
        ```

    Attributes:
        golden: Rows and what they must become: the turns as pairs of role and text, or a whole record.
        bad: Rows that must be refused, and the column at fault.
    """

    golden: tuple[tuple[Mapping[str, Any], tuple[tuple[str, str], ...] | Record], ...] = ()
    bad: tuple[tuple[Mapping[str, Any], str], ...] = ()

    @abstractmethod
    def make(self) -> RowFormat:
        """A new format."""

    def test_there_is_something_to_test(self) -> None:
        """At least one good and one bad row are given."""
        assert self.golden
        assert self.bad

    def test_golden_rows(self) -> None:
        """Rows become exactly these records, leave the row as it was, and survive JSON."""
        for row, wanted in self.golden:
            before = copy.deepcopy(row)
            record = self.make()(row)
            assert row == before, "the format changed its row"
            assert isinstance(record, Conversation | Completion | Text | Comparison)
            assert record == self._record(wanted)
            assert self.make()(json.loads(json.dumps(row))) == record

    @staticmethod
    def _record(wanted: Any) -> Record:
        if isinstance(wanted, Conversation | Completion | Text | Comparison):
            return wanted
        return Conversation(tuple(Message(*turn) for turn in wanted))

    def test_rows_can_be_trained_on(self) -> None:
        """Known roles, an answer at the end, and what is trained comes out of the template whole."""
        template = ChatTemplate(tiny_tokenizer(TOOLS_TEMPLATE))
        for row, _ in self.golden:
            record = self.make()(row)
            if isinstance(record, Comparison):
                record = record.answers[0]
            if isinstance(record, Conversation):
                assert all(message.role in ROLES for message in record.messages)
                assert record.messages[-1].role == "assistant"
                answers = [message.content for message in record.messages if message.role == "assistant"]
            else:
                answers = [record.text[1:] if isinstance(record, Text) else record.completion]
            for example in template.encode(record):
                trained = [int(t) for t, w in zip(example.input_ids, example.weights, strict=True) if w]
                text = template.tokenizer.decode(trained)
                assert any(answer in text for answer in answers)

    def test_the_answer_can_be_left_out(self) -> None:
        """A row to be answered is read up to its last answer, with or without the column that holds it."""
        for row, _ in self.golden:
            read = self.make()
            prompt = read.prompt(row)
            if isinstance(prompt, Conversation):
                assert prompt.messages
                assert prompt.messages[-1].role != "assistant"
            if read.answer is not None:
                assert read.prompt({key: value for key, value in row.items() if key != read.answer}) == prompt

    def test_bad_rows_name_their_column(self) -> None:
        """A bad row raises `RowError` with the column at fault, never anything else."""
        for row, column in self.bad:
            with pytest.raises(RowError) as caught:
                self.make()(row)
            assert caught.value.column.split("[")[0].split(".")[0] == column
            assert column in str(caught.value)

    def test_missing_columns_are_refused(self) -> None:
        """Each column that the format declares is needed."""
        for row, _ in self.golden:
            for column in self.make().columns:
                for value in ({}, {column: None}):
                    with pytest.raises(RowError) as caught:
                        self.make()({**{k: v for k, v in row.items() if k != column}, **value})
                    assert column in str(caught.value)
