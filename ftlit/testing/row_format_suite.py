"""What every row format must hold. A format outside ftlit gets these tests from a subclass of a few lines."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import pytest

from ftlit.data.formats.base import ROLES, Conversation, Message, RowError, RowFormat
from ftlit.data.templating import ChatTemplate
from ftlit.testing.tiny import tiny_tokenizer


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
        golden: Rows and the turns they must become.
        bad: Rows that must be refused, and the column at fault.
    """

    golden: tuple[tuple[Mapping[str, Any], tuple[tuple[str, str], ...]], ...] = ()
    bad: tuple[tuple[Mapping[str, Any], str], ...] = ()

    @abstractmethod
    def make(self) -> RowFormat:
        """A new format."""

    def test_there_is_something_to_test(self) -> None:
        """At least one good and one bad row are given."""
        assert self.golden
        assert self.bad

    def test_golden_rows(self) -> None:
        """Rows become exactly these turns, leave the row as it was, and survive JSON."""
        for row, turns in self.golden:
            before = copy.deepcopy(row)
            conversation = self.make()(row)
            assert row == before, "the format changed its row"
            assert isinstance(conversation, Conversation)
            assert conversation.messages == tuple(Message(*turn) for turn in turns)
            assert self.make()(json.loads(json.dumps(row))) == conversation

    def test_turns_can_be_trained_on(self) -> None:
        """Known roles, an answer at the end, and every answer comes out of the template whole."""
        template = ChatTemplate(tiny_tokenizer())
        for row, _ in self.golden:
            conversation = self.make()(row)
            assert all(role in ROLES for role, _ in conversation.messages)
            assert conversation.messages[-1].role == "assistant"
            answers = [content for role, content in conversation.messages if role == "assistant"]
            for example in template.encode(conversation):
                trained = [t for t, w in zip(example.input_ids, example.weights, strict=True) if w]
                text = template.tokenizer.decode(trained)
                assert any(answer in text for answer in answers)

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
