"""What a user sees when something cannot work: one sentence with what, where, got what, do what."""

import difflib
from collections.abc import Iterable


class FtlitError(Exception):
    """Base of every error that a user can cause; the command line prints its text without a traceback."""


class ConfigError(FtlitError, ValueError):
    """A setting, a class name or a combination of settings that cannot work."""


class DataError(FtlitError, ValueError):
    """A row, a file or a template that cannot be trained on."""


def nearest(word: str, known: Iterable[str], limit: int = 3) -> str:
    """Says which known names come closest to a misspelt one.

    Args:
        word: What was written.
        known: The names that exist.
        limit: The most names to list when none is close.

    Returns:
        `"did you mean 'rank'?"`, or the known names when none is close.

    Example:
        >>> nearest("rnak", ["rank", "alpha"])
        "did you mean 'rank'?"
    """
    names = sorted(set(known))
    by_fold = {name.casefold(): name for name in names}
    close = difflib.get_close_matches(word.casefold(), by_fold, n=1, cutoff=0.6)
    if close:
        return f"did you mean {by_fold[close[0]]!r}?"
    shown = ", ".join(names[: max(limit, 12)])
    return f"known: {shown}{', ...' if len(names) > max(limit, 12) else ''}."
