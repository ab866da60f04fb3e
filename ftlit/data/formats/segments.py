"""Rows of stretches of text, each with whether it is trained, as axolotl's `input_output` has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override

from ftlit.data.formats.base import Completion, RowError, RowFormat, weight_of
from ftlit.data.formats.written import parsed


class Segments(RowFormat):
    """`{"segments": [{"text": "2+2=", "label": false}, {"text": "4", "label": true}]}`: no chat template, no guess.

    The stretches stand one behind the other as they are written; those with a true label are trained, and the end token
    follows the last of these. What stands behind it is not trained and left out.
    """

    columns: ClassVar[tuple[str, ...]] = ("segments",)
    optional: ClassVar[tuple[str, ...]] = ("weight",)

    @override
    def __call__(self, row: Mapping[str, Any]) -> Completion:
        stretches = self._stretches(row)
        last = max((number for number, (_, is_trained) in enumerate(stretches) if is_trained), default=None)
        if last is None:
            raise RowError("segments", "a stretch whose label is true", row["segments"])
        given, prompt = list(stretches[:last]), ""
        if given and not given[-1][1]:
            prompt = given.pop()[0]
        return Completion(prompt, stretches[last][0], weight_of(row), tuple(given))

    @override
    def prompt(self, row: Mapping[str, Any]) -> Completion:
        stretches = self._stretches(row)
        while stretches and stretches[-1][1]:
            stretches.pop()
        return Completion("".join(text for text, _ in stretches), "")

    @staticmethod
    def _stretches(row: Mapping[str, Any]) -> list[tuple[str, bool]]:
        segments = parsed(row.get("segments"))
        if not isinstance(segments, list | tuple) or not segments:
            raise RowError("segments", "a list of objects with text and label", row.get("segments"))
        stretches = []
        for number, segment in enumerate(segments):
            place = f"segments[{number}]"
            if not isinstance(segment, Mapping):
                raise RowError(place, "an object with text and label", segment)
            text, label = segment.get("text"), segment.get("label")
            if not isinstance(text, str):
                raise RowError(f"{place}.text", "text", text)
            if label not in (True, False):
                raise RowError(f"{place}.label", "true or false", label)
            if text:
                stretches.append((text, bool(label)))
        return stretches
