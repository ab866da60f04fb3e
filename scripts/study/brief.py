"""A reward that can be checked: an answer names what it was asked about, in few words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WORDS = 12


def brief(prompts: Sequence[Any], completions: Sequence[str], *, keyword: Sequence[str], **columns: Any) -> list[float]:
    """1 for an answer of at most 12 words that holds the keyword, `12 / words` for a longer one, 0 without the keyword.

    Args:
        prompts: The turns before each answer.
        completions: The answers.
        keyword: What each answer must name.
        columns: Other columns of the rows.
    """
    return [
        min(1.0, WORDS / max(len(answer.split()), 1)) * (word in answer.casefold())
        for answer, word in zip(completions, keyword, strict=True)
    ]


__all__ = ["WORDS", "brief"]
