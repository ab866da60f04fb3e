"""Rows of raw text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from ftlit.data.formats.base import RowFormat, Text, text_of, weight_of
from ftlit.data.formats.turns import refuse_media


class RawText(RowFormat):
    """`{"text": "..."}`: a document of which every token is trained, without a chat template.

    A document longer than `data.max_length` is cut into windows and not truncated: each further window starts with the
    last token of the one before, so that every token but the first of a document is trained exactly once.
    """

    columns: ClassVar[tuple[str, ...]] = ("text",)
    optional: ClassVar[tuple[str, ...]] = ("weight",)

    @override
    def __call__(self, row: Mapping[str, Any]) -> Text:
        refuse_media(row)
        return Text(text_of(row, "text"), weight_of(row))
