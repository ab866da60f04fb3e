"""Counts of the rows that a run trains and measures on, as one line and as a page."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from ftlit.data.store import Measures

CUT, EMPTY, LONG = "nothing left to train on after cutting", "nothing to train on", "longer than max_length"
# Width of the longest bar, and examples from which a histogram says more than its first line.
_BAR, _FEW = 40, 10


class Statistics:
    """Counts of one set of rows: nothing is lost and nothing skipped without being counted here.

    Args:
        name: What the set is called.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows = 0
        self.refused = 0
        self.examples = 0
        self.split_rows = 0
        self.windowed_rows = 0
        self.windows = 0
        self.truncated = 0
        self.drops: dict[str, int] = {}
        self.noted: dict[str, int] = {}
        self.tokens = 0
        self.targets = 0
        self.longest = 0
        self.duplicates = 0
        self.in_train = 0
        self.read_as: list[str] = []
        self.unread: list[str] = []
        self.lengths = np.zeros(0, np.int64)

    @property
    def dropped(self) -> int:
        """Examples that are not trained on."""
        return sum(self.drops.values())

    def drop(self, reason: str, count: int) -> None:
        """Counts examples that are left out."""
        if count:
            self.drops[reason] = self.drops.get(reason, 0) + count

    def note(self, text: str, count: int) -> None:
        """Counts what else happened to examples that are kept."""
        if count:
            self.noted[text] = self.noted.get(text, 0) + count

    def measure(self, measures: Measures) -> None:
        """Counts the examples that are left."""
        self.examples = len(measures.lengths)
        self.tokens, self.targets = int(measures.lengths.sum()), int(measures.targets.sum())
        self.longest = int(measures.lengths.max(initial=0))
        self.lengths = measures.lengths

    def add(self, other: Statistics) -> None:
        """Counts another set in; duplicates are the set's own."""
        for name in ("rows", "refused", "examples", "split_rows", "windowed_rows", "windows", "truncated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.tokens, self.targets = self.tokens + other.tokens, self.targets + other.targets
        self.longest = max(self.longest, other.longest)
        for reason, count in other.drops.items():
            self.drop(reason, count)
        for text, count in other.noted.items():
            self.note(text, count)
        self.lengths = np.concatenate([self.lengths, other.lengths])

    def notes(self) -> list[str]:
        """What happened to rows, one note a thing."""
        found = []
        if self.refused:
            found.append(f"{self.refused:,} skipped (cannot be read)")
        if self.split_rows:
            found.append(f"{self.split_rows:,} of them split by answer")
        if self.windowed_rows:
            found.append(f"{self.windowed_rows:,} of them cut into {self.windows:,} windows")
        found += [f"{count:,} dropped ({reason})" for reason, count in self.drops.items()]
        if self.truncated:
            found.append(f"{self.truncated:,} cut to max_length")
        found += [f"{count:,} {text}" for text, count in self.noted.items()]
        if self.duplicates:
            found.append(f"{self.duplicates:,} duplicate" + ("s" if self.duplicates > 1 else ""))
        if self.in_train:
            found.append(f"{self.in_train:,} of them also in train (!)")
        return found

    def line(self) -> str:
        """The counts in one line."""
        share = self.targets / max(1, self.tokens)
        return (
            f"{self.name}: {', '.join([f'{self.rows:,} rows', *self.notes()])}; {self.tokens:,} tokens, "
            f"{self.targets:,} trained ({share:.0%}), longest {self.longest:,}"
        )

    def histogram(self, bins: int = 10) -> list[str]:
        """The lengths of the examples: quantiles in a line, then a bar for each range."""
        if not len(self.lengths):
            return []
        low, middle, most, nearly, high = (
            int(value) for value in np.quantile(self.lengths, [0, 0.5, 0.9, 0.99, 1], method="nearest")
        )
        lines = [f"lengths  {low:,} to {high:,} tokens; median {middle:,}, 90% up to {most:,}, 99% up to {nearly:,}"]
        if low == high or len(self.lengths) < _FEW:
            return lines
        width = _round_up((high - low + 1) / bins)
        first = low // width
        counts = np.bincount(self.lengths // width - first)
        digits, places = len(f"{high:,}"), len(f"{int(counts.max()):,}")
        for number, count in enumerate(counts.tolist()):
            begin = (first + number) * width
            bar = "█" * round(_BAR * count / int(counts.max())) or ("▏" if count else "")
            end = min(begin + width - 1, high)
            lines.append(f"  {begin:>{digits},}-{end:<{digits},} {count:>{places},} {bar}".rstrip())
        return lines


def _round_up(value: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    size = 1
    while True:
        for factor in (1, 2, 5):
            if size * factor >= value:
                return size * factor
        size *= 10


def duplicates(digests: np.ndarray) -> int:
    """How many rows are equal to an earlier one."""
    return len(digests) - len(np.unique(_as_one(digests)))


def also_in(digests: np.ndarray, others: np.ndarray) -> int:
    """How many rows are equal to one of the others."""
    return int(np.isin(_as_one(digests), _as_one(others)).sum())


def _as_one(digests: np.ndarray) -> np.ndarray:
    """Hashes of 16 bytes as one value each; half of it is enough to sort by, and both halves are compared."""
    return np.ascontiguousarray(digests).view([("high", np.uint64), ("low", np.uint64)]).ravel()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of an aligned table: the first column to the left, the others to the right."""
    widths = [max(_wide(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [row[0] + " " * (widths[0] - _wide(row[0]))]
        cells += [" " * (width - _wide(cell)) + cell for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _wide(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


__all__ = ["CUT", "EMPTY", "LONG", "Statistics", "also_in", "duplicates", "table"]
