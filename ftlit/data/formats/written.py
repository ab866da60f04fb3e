"""Lists and objects that are given as text: JSON, or what Python and NumPy print of them."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from typing import Any

# Where NumPy may have printed an array: two elements without a comma between them, which Python would join if they are
# strings, or the name of one.
_ARRAYS = re.compile(r"""['"]\s+['"]|[}\]]\s+[{\[]|\barray\(""")
_LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT}


def parsed(value: Any) -> Any:
    """A list or an object that is given as text: its JSON, or what Python prints of it, as CSV files of pandas have it.

    Anything else, also text that is neither, comes back as it is.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        text = value.strip()
        return ast.literal_eval(_with_commas(text) if _ARRAYS.search(text) else text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
        return value


def _with_commas(text: str) -> str:
    """What Python prints, with the arrays of NumPy in it as lists."""
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in _LAYOUT]
    parts: list[str] = []
    brackets: list[str] = []
    place = 0
    while place < len(tokens):
        token = tokens[place]
        if token.string == "array" and tokens[place + 1 : place + 2] and tokens[place + 1].string == "(":
            brackets.append("array")
            place += 2
            continue
        if token.string in ("[", "{", "("):
            brackets.append(token.string)
        elif token.string in ("]", "}", ")") and brackets and brackets.pop() == "array":
            place += 1
            continue
        elif brackets and brackets[-1] == "array" and token.string == ",":  # its dtype follows
            while place < len(tokens) and tokens[place].string != ")":
                place += 1
            continue
        if parts and _ends(parts[-1]) and _begins(token):
            parts.append(",")
        parts.append(token.string)
        place += 1
    return " ".join(parts)


def _ends(part: str) -> bool:
    """Whether an element ends with a part."""
    return part[-1] in "]}'\""


def _begins(token: tokenize.TokenInfo) -> bool:
    """Whether an element begins with a token."""
    return token.type == tokenize.STRING or token.string in ("[", "{", "array")
