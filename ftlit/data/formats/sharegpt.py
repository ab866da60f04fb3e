"""Rows with conversations of `from` and `value`, as ShareGPT has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from ftlit.data.formats.base import Conversation, RowError, RowFormat
from ftlit.data.formats.turns import check_roles, conversation_of, turns_of

_PREFERENCE = (
    "a conversation that ends in an answer (to train on the chosen ones: "
    "data.format={class_path: ShareGPT, init_args: {answer_column: chosen}})"
)


class ShareGPT(RowFormat):
    """`{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}`.

    Turns may have `role` and `content` instead, and everything else that `Messages` reads: a `system` column, a `tools`
    column for the chat template, a `weight` column, and marks of how much a turn is trained. A `function_call` turn
    holds the JSON of a call (`name`, `arguments`) and becomes an assistant turn with `tool_calls`; `observation` is the
    tool's answer.

    Args:
        answer_column: A column with one more turn, such as `chosen` of preference rows.
        roles: Further names of roles, such as `{narrator: user, hero: assistant}`.
    """

    columns: ClassVar[tuple[str, ...]] = ("conversations",)
    optional: ClassVar[tuple[str, ...]] = ("system", "tools", "functions", "weight")

    def __init__(self, answer_column: str | None = None, roles: dict[str, str] | None = None) -> None:
        self.answer_column, self.roles = answer_column, check_roles(roles)

    @override
    def __call__(self, row: Mapping[str, Any]) -> Conversation:
        given = conversation_of(row, "conversations", self.roles)
        if self.answer_column is not None:
            return given._replace(messages=(*given.messages, *self._answer(row, self.answer_column)))
        if given.messages[-1].role == "user" and row.get("chosen") is not None:
            raise RowError("conversations", _PREFERENCE, row["conversations"])
        return given

    def _answer(self, row: Mapping[str, Any], column: str) -> Any:
        """The further turn of a row."""
        if not isinstance(row.get(column), Mapping):
            raise RowError(column, "an object with from and value", row.get(column))
        try:
            return turns_of({**row, column: [row[column]]}, column, self.roles)
        except RowError as error:
            raise RowError(error.column.replace("[0]", "", 1), error.wanted, error.got) from None

    @override
    def prompt(self, row: Mapping[str, Any]) -> Conversation:
        given = conversation_of(row, "conversations", self.roles)
        if self.answer_column is None and given.messages[-1].role == "assistant":
            given = given._replace(messages=given.messages[:-1])
        return given._replace(weight=1.0)
