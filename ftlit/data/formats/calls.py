"""Tools, and calls of them, in the shape that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ftlit.data.formats.base import RowError, note
from ftlit.data.formats.written import parsed

_TOOLS = "a list of tools, or its JSON text"
_CALL = "a call with name and arguments, or its JSON text"
# What the arguments are called: by OpenAI, Llama, Anthropic, LangChain.
_ARGUMENTS = ("arguments", "parameters", "input", "args")
_OUTER = ("id", "type", "index")
# Keys of a JSON schema that hold schemas by name.
_MAPS = ("properties", "patternProperties", "$defs", "definitions")

# ---- tools ----------------------------------------------------------------------------------------------------------


def tools_of(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    """The `tools` column: a list of JSON schemas, or the JSON text of one; None where there are none.

    A schema without `function` around it gets one, as every API hands tools to a model. `functions` is the old name of
    the column.

    Raises:
        RowError: If it holds something else.
    """
    tools = tools_in(row.get("tools"), "tools")
    if row.get("functions") is None:
        return tools
    old = tools_in(row["functions"], "functions")
    if tools and old and tools != old:
        raise RowError("functions", "the tools of the column tools, or nothing", row["functions"])
    return tools or old


def tools_in(value: Any, place: str) -> tuple[Mapping[str, Any], ...] | None:
    """The tools that a value holds; None where there are none.

    Args:
        value: A list of JSON schemas, a single one, or the text of either.
        place: What to call it in an error.

    Raises:
        RowError: If it holds something else.
    """
    tools = parsed(value)
    if _is_nothing(tools):
        return None
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, list | tuple):
        raise RowError(place, _TOOLS, value)
    tools = [parsed(tool) for tool in tools]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(place, _TOOLS, value)
    return tuple(_tool(tool) for tool in tools)


def _is_nothing(value: Any) -> bool:
    """Whether a value is empty, or the text of one that is."""
    return value in (None, [], (), {}) or (isinstance(value, str) and value.strip() in ("", "null", "None"))


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as `{"type": "function", "function": {...}}`; one of another kind as it is, less its nulls."""
    function = parsed(tool.get("function"))
    if isinstance(function, Mapping):
        outer = {key: value for key, value in tool.items() if value is not None}
        return {**({} if "type" in outer else {"type": "function"}), **outer, "function": _function(function)}
    if isinstance(tool.get("name"), str) and tool.get("type") in (None, "function"):
        return {"type": "function", "function": _function({k: v for k, v in tool.items() if k != "type"})}
    return dict(_tidy_schema(tool))


def _function(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """A function's schema, with its parameters as an object and under that name."""
    if function.get("parameters") is None and isinstance(parsed(function.get("input_schema")), Mapping):
        function = {"parameters" if key == "input_schema" else key: v for key, v in function.items() if v is not None}
    tidy: Mapping[str, Any] = _tidy_schema(function)
    return tidy


def _tidy_schema(schema: Any, is_map: bool = False) -> Any:
    """A JSON schema without the nulls that a table filled its objects up with, and without schemas as text in it.

    No key of a schema can be null but `default` and `const`, which are left where nothing else in the object is null.

    Args:
        schema: The schema.
        is_map: Whether its keys are names of parameters and not of the schema.
    """
    if isinstance(schema, list | tuple):
        return [_tidy_schema(inner) for inner in schema]
    if not isinstance(schema, Mapping):
        return schema
    null = {key for key, value in schema.items() if value is None}
    kept = null if not is_map and null <= {"default", "const"} else set[str]()
    tidy = {}
    for key, value in schema.items():
        if value is None and key not in kept:
            continue
        if not is_map and key in ("default", "const", "enum", "examples"):
            tidy[key] = value
        else:
            if is_map or key in _MAPS or key in ("parameters", "items"):
                value = parsed(value)
            tidy[key] = _tidy_schema(value, not is_map and key in _MAPS)
    return tidy


# ---- calls ----------------------------------------------------------------------------------------------------------


def calls_of(turn: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    """The calls of a turn: its `tool_calls`, or the `function_call` of older rows.

    Args:
        turn: The turn.
        place: What to call it in an error.

    Raises:
        RowError: If either holds no call, or they contradict each other.
    """
    calls = calls_in(turn.get("tool_calls"), f"{place}.tool_calls")
    old = parsed(turn.get("function_call"))
    if not old or (isinstance(old, Mapping) and all(value is None for value in old.values())):
        return calls
    (call,) = calls_in(old, f"{place}.function_call")[:1]
    if calls and [one["function"] for one in calls] != [call["function"]]:
        raise RowError(f"{place}.function_call", "the call of tool_calls, or nothing", turn["function_call"])
    return calls or [call]


def calls_in(value: Any, place: str) -> list[dict[str, Any]]:
    """The calls that a value holds: a list of them, a single one, or the text of either; none where it is empty.

    Raises:
        RowError: If it holds something else.
    """
    calls = parsed(value)
    if _is_nothing(calls):
        return []
    if isinstance(calls, Mapping):
        return [_call(calls, place)]
    if not isinstance(calls, list | tuple):
        raise RowError(place, "a list of calls", value)
    return [_call(parsed(call), f"{place}[{number}]") for number, call in enumerate(calls)]


def _call(call: Any, place: str) -> dict[str, Any]:
    """A call as `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, with its id if it has one."""
    if not isinstance(call, Mapping):
        raise RowError(place, _CALL, call)
    inner = parsed(call.get("function"))
    if isinstance(inner, Mapping):
        outer = {key: value for key, value in call.items() if key != "function" and value is not None}
    else:
        outer = {key: call[key] for key in _OUTER if call.get(key) is not None}
        outer.pop("type", None)
        inner = {key: value for key, value in call.items() if key not in _OUTER and value is not None}
    name = inner.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RowError(place, _CALL, call)
    under = next((key for key in _ARGUMENTS if inner.get(key) is not None), "arguments")
    function = {"name": name, "arguments": _arguments(inner.get(under), f"{place}.{under}")}
    more = {key: value for key, value in inner.items() if key not in ("name", "arguments", under) and value is not None}
    return {**({} if "type" in outer else {"type": "function"}), **outer, "function": {**function, **more}}


def _arguments(value: Any, place: str) -> dict[str, Any]:
    """The arguments of a call as an object: they may be its JSON text, or pairs of name and value."""
    found = value
    for _ in range(2):  # text of text
        if isinstance(found, str) and found.strip()[:1] == '"':
            try:
                found = json.loads(found)
            except ValueError:
                break
    found = parsed(found)
    if _is_nothing(found):
        return {}
    if isinstance(found, Mapping):
        return dict(found)
    if isinstance(found, list | tuple) and (pairs := _pairs(found)) is not None:
        return pairs
    raise RowError(place, "an object, or its JSON text", value)


def _pairs(value: Iterable[Any]) -> dict[str, Any] | None:
    """An object that is given as pairs of name and value, as Arrow writes a map; None where it is not."""
    pairs: dict[str, Any] = {}
    for pair in value:
        if isinstance(pair, Mapping) and set(pair) == {"key", "value"}:
            key, inner = pair["key"], pair["value"]
        elif isinstance(pair, list | tuple) and len(pair) == 2:
            key, inner = pair
        else:
            return None
        if not isinstance(key, str) or key in pairs:
            return None
        pairs[key] = inner
    return pairs


# ---- nulls ----------------------------------------------------------------------------------------------------------


def has_nulls(calls: Iterable[Mapping[str, Any]]) -> bool:
    """Whether an argument of some calls is null."""
    return any(_has_null(call["function"]["arguments"]) for call in calls)


def _has_null(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(inner is None or _has_null(inner) for inner in value.values())
    return isinstance(value, list | tuple) and any(_has_null(inner) for inner in value)


def without_filled(
    calls: Iterable[Mapping[str, Any]], tools: Iterable[Mapping[str, Any]], is_filled: bool
) -> list[dict[str, Any]]:
    """Calls without the nulls that a table filled their arguments up with.

    A null stays where the tool needs the argument or lets it be null, and goes where the tool has no such argument.
    Where neither is known it is noted: it stays, or goes where the row shows that its objects were filled up.

    Args:
        calls: The calls.
        tools: The tools of the row.
        is_filled: Whether the row shows it elsewhere.
    """
    schemas = {
        tool["function"].get("name"): tool["function"].get("parameters") or {}
        for tool in tools
        if isinstance(tool.get("function"), Mapping)
    }
    made = []
    for call in calls:
        function = call["function"]
        arguments = _tidy_arguments(function["arguments"], schemas.get(function["name"]), is_filled)
        made.append({**call, "function": {**function, "arguments": arguments}})
    return made


def _tidy_arguments(arguments: Mapping[str, Any], schema: Any, is_filled: bool) -> dict[str, Any]:
    known = schema.get("properties") if isinstance(schema, Mapping) else None
    properties: Mapping[str, Any] | None = known if isinstance(known, Mapping) else None
    if properties is not None:
        is_filled = is_filled or any(value is None and key not in properties for key, value in arguments.items())
    tidy: dict[str, Any] = {}
    for key, value in arguments.items():
        own = properties.get(key) if properties is not None else None
        if isinstance(value, Mapping):
            tidy[key] = _tidy_arguments(value, own, is_filled)
        elif isinstance(value, list | tuple):
            items = own.get("items") if isinstance(own, Mapping) else None
            tidy[key] = [_tidy_arguments(v, items, is_filled) if isinstance(v, Mapping) else v for v in value]
        elif value is not None or _stays(key, properties, schema, is_filled):
            tidy[key] = value
    return tidy


def _stays(key: str, properties: Mapping[str, Any] | None, schema: Any, is_filled: bool) -> bool:
    """Whether an argument that is null was meant to be."""
    if properties is not None:
        if key not in properties:
            return False
        if key in (schema.get("required") or ()) or _is_nullable(properties[key]):
            return True
    if is_filled:
        note("calls have arguments that are null, as tables fill objects up: they are read as not given")
    else:
        note("calls have arguments that are null: they are kept")
    return not is_filled


def _is_nullable(schema: Any) -> bool:
    """Whether a JSON schema lets a value be null."""
    if not isinstance(schema, Mapping):
        return False
    kinds = schema.get("type")
    if kinds == "null" or (isinstance(kinds, list | tuple) and "null" in kinds) or schema.get("nullable") is True:
        return True
    if None in (schema.get("enum") or ()) or ("const" in schema and schema["const"] is None):
        return True
    return any(_is_nullable(inner) for kind in ("anyOf", "oneOf") for inner in schema.get(kind) or ())
