"""Which modules a list of name endings, a regular expression or a pattern means: the PEFT library's rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

Names = list[str] | str


def select(wanted: Names, names: Iterable[str]) -> dict[str, list[str]]:
    """What each wish selects.

    Args:
        wanted: Name endings (whole components), or one regular expression that whole names must match.
        names: Names of modules.

    Returns:
        The selected names by wish, in the order of `names`.
    """
    names = list(names)
    if isinstance(wanted, str):
        return {wanted: [name for name in names if re.fullmatch(wanted, name)]}
    return {ending: [n for n in names if n == ending or n.endswith("." + ending)] for ending in wanted}


def layer_of(name: str) -> int | None:
    """The number of the layer that a module belongs to: the first number in its name."""
    found = re.match(r".*?\.(\d+)(\.|$)", name)
    return int(found[1]) if found else None


def is_in(name: str, modules: Iterable[str]) -> bool:
    """Whether a module is one of `modules` or inside one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def pattern_key(pattern: Mapping[str, T], name: str) -> str | None:
    """The first key of a `rank_pattern` or `alpha_pattern` that matches the end of a name, whole components."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", name)), None)


def endings(names: Iterable[str]) -> list[str]:
    """Names of modules in a few words: without what comes before the number of a layer, each once."""
    return list(dict.fromkeys(re.sub(r".*\.\d+\.", "", name) for name in names))


def shortest(names: Iterable[str], every: Iterable[str]) -> list[str]:
    """The shortest list of name endings that selects exactly `names` among `every`."""
    names = set(names)
    last = {name.rsplit(".", 1)[-1] for name in names}
    return sorted(last if {n for n in every if n.rsplit(".", 1)[-1] in last} == names else names)


__all__ = ["Names", "endings", "is_in", "layer_of", "pattern_key", "select", "shortest"]
