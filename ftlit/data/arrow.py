"""Rows of Arrow tables as whoever wrote them had them: what the types of Arrow hide is undone.

Arrow has one type a column. Objects inside lists are filled up with nulls to have the same keys, values of mixed types
are kept as JSON (the `Json` feature of `datasets`), objects with free keys as pairs, names as numbers (`ClassLabel`),
and texts that look like dates become times.
"""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Decoder = Callable[[Any], Any]


class ArrowRows(Sequence[Mapping[str, Any]]):
    """Rows of an Arrow table, a block at a time.

    Args:
        table: The table. The features that `datasets` writes into its metadata are followed.
        indices: Which rows of it, in their order; all when left out.
    """

    BLOCK = 512

    def __init__(self, table: Any, indices: Any = None) -> None:
        self._table, self._indices = table, indices
        self._block, self._rows = -1, list[dict[str, Any]]()
        features = _features(table.schema)
        self._decoders = {field.name: _decoder(field.type, features.get(field.name)) for field in table.schema}

    def __len__(self) -> int:
        return len(self._indices) if self._indices is not None else int(self._table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        block, place = divmod(index, self.BLOCK)
        if block != self._block:
            self._rows = [self._decoded(row) for row in self._slice(block * self.BLOCK).to_pylist()]
            self._block = block
        return self._rows[place]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self[index] for index in range(len(self)))

    def _slice(self, start: int) -> Any:
        if self._indices is None:
            return self._table.slice(start, self.BLOCK)
        return self._table.take(self._indices.slice(start, self.BLOCK))

    def _decoded(self, row: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value if value is None or (decode := self._decoders[name]) is None else decode(value)
            for name, value in row.items()
        }


def notes_of(schema: Any, name: str) -> list[str]:
    """What the types of a table leave open of its rows, a sentence each.

    Args:
        schema: Its schema.
        name: What to call it.
    """
    notes = []
    found = [kind for field in schema for kind in _inner_types(field.name, field.type)]
    if any(name == "arguments" and _is_struct(kind) and kind.num_fields > 1 for name, kind in found):
        notes.append(f"{name}: arguments of calls that are null are read as not given; Arrow fills calls up with them")
    times = sorted({name for name, kind in found if _is_time(kind)})
    if times:
        shown = ", ".join(times[:3]) + (", ..." if len(times) > 3 else "")
        notes.append(f"{name}: times inside of lists are read as texts ({shown}), such as 2024-05-31")
    return notes


def _inner_types(name: str, kind: Any) -> Iterator[tuple[str, Any]]:
    """The names and types inside of a type, at any depth."""
    if _is_struct(kind):
        for field in kind:
            yield field.name, field.type
            yield from _inner_types(field.name, field.type)
    elif _is_list(kind):
        yield from _inner_types(name, kind.value_type)
    elif _is_map(kind):
        yield name, kind.item_type
        yield from _inner_types(name, kind.item_type)


# ---- types ----------------------------------------------------------------------------------------------------------


def _is_struct(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_struct(kind))


def _is_list(kind: Any) -> bool:
    return hasattr(kind, "value_type") and hasattr(kind, "value_field")


def _is_map(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_map(kind))


def _is_time(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_temporal(kind)) and not pyarrow.types.is_duration(kind)


# ---- features -------------------------------------------------------------------------------------------------------


def _features(schema: Any) -> dict[str, Any]:
    """The features that `datasets` wrote into the metadata of a schema; none where it did not write it."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _kind_of(feature: Any) -> str:
    """What `datasets` calls a feature; empty for an object of features, and where nothing is known."""
    kind = feature.get("_type") if isinstance(feature, dict) else None
    return kind if isinstance(kind, str) else ""


def _of_items(feature: Any) -> Any:
    """The feature of the items of a list."""
    if isinstance(feature, list):  # as old versions write it
        return feature[0] if feature else None
    return feature.get("feature") if _kind_of(feature) else None


def _of_field(feature: Any, name: str) -> Any:
    """The feature of a field of an object."""
    if not isinstance(feature, dict):
        return None
    if not _kind_of(feature):
        return feature.get(name)
    inner = feature.get("feature")  # a sequence of objects is kept as an object of lists
    return [inner.get(name)] if isinstance(inner, dict) else None


# ---- values ---------------------------------------------------------------------------------------------------------


def _decoder(kind: Any, feature: Any, depth: int = 0) -> Decoder | None:
    """What makes a value of a type what it was; None where it is that already. It is never handed a null."""
    if getattr(kind, "extension_name", "") == "arrow.json" or _kind_of(feature) == "Json":
        return _from_json
    if _is_struct(kind):
        return _of_struct(
            {field.name: _decoder(field.type, _of_field(feature, field.name), depth + 1) for field in kind}
        )
    if _is_map(kind):
        return _of_map(_decoder(kind.item_type, None, depth + 1))
    if _is_list(kind):
        return _of_list(_decoder(kind.value_type, _of_items(feature), depth + 1))
    return _of_scalar(kind, feature) if depth else None


def _of_scalar(kind: Any, feature: Any) -> Decoder | None:
    """What JSON would have, for a single value inside of a list or an object."""
    import pyarrow

    names = feature.get("names") if _kind_of(feature) == "ClassLabel" else None
    if isinstance(names, list):
        return lambda value: names[value] if isinstance(value, int) and 0 <= value < len(names) else None
    if _is_time(kind):
        return _time_as_text
    return _plain_number if pyarrow.types.is_decimal(kind) else None


def _of_struct(fields: Mapping[str, Decoder | None]) -> Decoder:
    """Objects without the nulls that they are filled up with."""

    def decode(value: Any) -> Any:
        return {
            name: inner if (own := fields.get(name)) is None else own(inner)
            for name, inner in value.items()
            if inner is not None
        }

    return decode


def _of_list(item: Decoder | None) -> Decoder | None:
    if item is None:
        return None
    return lambda value: [None if inner is None else item(inner) for inner in value]


def _of_map(item: Decoder | None) -> Decoder:
    """Pairs as an object: its nulls were meant, because a map holds only the keys that were given."""

    def decode(value: Any) -> Any:
        pairs = [(key, inner if inner is None or item is None else item(inner)) for key, inner in value]
        keys = {key for key, _ in pairs if isinstance(key, str)}
        return dict(pairs) if len(keys) == len(pairs) else [list(pair) for pair in pairs]

    return decode


def _from_json(value: Any) -> Any:
    if not isinstance(value, str | bytes):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _time_as_text(value: Any) -> Any:
    """A time as the text that it was: a date where nothing but the date is said."""
    if isinstance(value, datetime.datetime) and value.time() == datetime.time() and value.tzinfo is None:
        return value.date().isoformat()
    return value.isoformat() if hasattr(value, "isoformat") else value


def _plain_number(value: Any) -> Any:
    if not isinstance(value, decimal.Decimal):
        return value
    return int(value) if value == value.to_integral_value() else float(value)


__all__ = ["ArrowRows", "notes_of"]
