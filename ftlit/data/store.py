"""Tokenized examples held in flat arrays: eight bytes a token, in memory or mapped from a file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np

from ftlit.batch import Example
from ftlit.errors import ConfigError
from ftlit.files import checksum, clean

Truncate = Literal["end", "start", "drop"]
_ARRAYS = ("ids", "weights", "starts", "stops", "rows", "windowed", "values")
_BLOCK = 1 << 16


class Measures(NamedTuple):
    """One number an example.

    Attributes:
        lengths: Tokens, int64.
        targets: Trained tokens, int64.
        weights: Sum of the weights, float64.
    """

    lengths: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


class Stored(Sequence[Example], ABC):
    """Tokenized examples of one source.

    Attributes:
        rows: The row of the source that each example is from, int64.
    """

    rows: np.ndarray

    @abstractmethod
    def measures(self) -> Measures:
        """Lengths, trained tokens and weights; counted once."""

    @abstractmethod
    def hash_into(self, digest: Any) -> None:
        """Adds everything that training sees of the examples, in order, to a hash."""

    def reweighted(self, factors: np.ndarray) -> Stored:
        """The same examples with other weights.

        Args:
            factors: One for each trained token, example after example; 0: it is not trained any more.

        Raises:
            ConfigError: If the weights of single tokens mean nothing in these rows.
        """
        raise ConfigError(f"{type(self).__name__} cannot be weighted token by token; leave that control out.")


class Examples(Stored):
    """Examples as stretches of flat arrays; cutting and choosing make views, not copies.

    Args:
        ids: Tokens end to end, int32.
        weights: Their weights, float32.
        starts: Where each example begins, int64.
        stops: Where it ends.
        rows: The row of its source, int64.
        windowed: Whether a longer one is cut into windows (raw text), bool.
        values: A number that its row gave it, float32.
    """

    def __init__(
        self,
        ids: np.ndarray,
        weights: np.ndarray,
        starts: np.ndarray,
        stops: np.ndarray,
        rows: np.ndarray,
        windowed: np.ndarray,
        values: np.ndarray,
    ) -> None:
        self.ids, self.weights = ids, weights
        self.starts, self.stops, self.rows, self.windowed, self.values = starts, stops, rows, windowed, values
        self._measures: Measures | None = None

    @classmethod
    def of(cls, examples: Sequence[Example], rows: Sequence[int], windowed: Sequence[bool]) -> Examples:
        """Examples from lists."""
        lengths = np.array([len(example.input_ids) for example in examples], np.int64)
        stops = np.cumsum(lengths)
        empty: list[Any] = [[]]
        return cls(
            np.concatenate([np.asarray(e.input_ids, np.int32) for e in examples] or empty).astype(np.int32),
            np.concatenate([np.asarray(e.weights, np.float32) for e in examples] or empty).astype(np.float32),
            stops - lengths,
            stops,
            np.asarray(rows, np.int64),
            np.asarray(windowed, bool),
            np.array([example.value for example in examples], np.float32),
        )

    @classmethod
    def joined(cls, parts: Sequence[Examples]) -> Examples:
        """Blocks of freshly made examples end to end; a part's rows are taken as they are."""
        if not parts:
            return cls.of([], [], [])
        offsets = np.cumsum([0, *(len(part.ids) for part in parts)])
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.weights for part in parts]),
            np.concatenate([part.starts + offset for part, offset in zip(parts, offsets, strict=False)]),
            np.concatenate([part.stops + offset for part, offset in zip(parts, offsets, strict=False)]),
            np.concatenate([part.rows for part in parts]),
            np.concatenate([part.windowed for part in parts]),
            np.concatenate([part.values for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, stop = int(self.starts[index]), int(self.stops[index])
        weights = self.weights[start:stop]
        if len(weights) and weights[0]:  # a window or a cut begins inside: nothing predicts its first token
            weights = weights.copy()
            weights[0] = 0
        return Example(self.ids[start:stop], weights, float(self.values[index]))

    def take(self, chosen: np.ndarray) -> Examples:
        """Some of the examples, by index or mask."""
        arrays = (self.starts, self.stops, self.rows, self.windowed, self.values)
        return Examples(self.ids, self.weights, *(array[chosen] for array in arrays))

    def measures(self) -> Measures:
        """Lengths, trained tokens and weights; counted once."""
        if self._measures is None:
            targets, weights = np.zeros(len(self), np.int64), np.zeros(len(self))
            for first in range(0, len(self), _BLOCK):
                part = slice(first, first + _BLOCK)
                targets[part], weights[part] = self._counted(self.starts[part], self.stops[part])
            self._measures = Measures(self.stops - self.starts, targets, weights)
        return self._measures

    def _counted(self, starts: np.ndarray, stops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = int(starts.min()), int(stops.max())
        block = np.zeros(high - low + 1)
        block[:-1] = self.weights[low:high]
        # Without each example's first token, which nothing predicts; an empty stretch would give its own first number.
        inner = np.minimum(starts + 1, stops) - low
        bounds = np.stack([inner, stops - low], axis=1).ravel()
        some = inner < stops - low
        sums = np.where(some, np.add.reduceat(block, bounds)[::2], 0.0)
        counts = np.where(some, np.add.reduceat((block != 0).astype(np.int64), bounds)[::2], 0)
        return counts, sums

    def flat(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and weights of some neighbouring examples end to end, as copies."""
        starts, lengths = self.starts[first:last], (self.stops - self.starts)[first:last]
        begins = np.cumsum(lengths) - lengths
        places = np.arange(lengths.sum()) + np.repeat(starts - begins, lengths)
        weights = self.weights[places]
        weights[begins[lengths > 0]] = 0
        return self.ids[places], weights

    def reweighted(self, factors: np.ndarray) -> Examples:
        """The same examples with other weights.

        Args:
            factors: One for each trained token, example after example; 0: it is not trained any more.
        """
        ids, weights = self.flat(0, len(self))
        (places,) = np.nonzero(weights)
        weights[places] = weights[places] * factors
        lengths = self.stops - self.starts
        stops = np.cumsum(lengths)
        return Examples(ids, weights, stops - lengths, stops, self.rows, self.windowed, self.values)

    def cut(self, length: int, truncate: Truncate = "end", opening: Sequence[int] = ()) -> tuple[Examples, np.ndarray]:
        """Fits every example into `length` tokens.

        Raw text is cut into windows, each further one starting with the last token of the one before; so every token
        but the first of a document is trained exactly once. Other examples lose their end, their start, or go.

        Args:
            length: Most tokens of an example, at least 2.
            truncate: Which part of a longer example is cut away; `drop`: all of it.
            opening: Tokens that every text of the tokenizer begins with; examples that lose their start keep them.

        Returns:
            The examples, and for each of the old ones whether it lost something.
        """
        lengths = self.stops - self.starts
        over = (lengths > length) & ~self.windowed
        windows = np.where(self.windowed, np.maximum(1, -(-(lengths - 1) // (length - 1))), 1)
        if truncate == "drop":
            windows = np.where(over, 0, windows)
        origin = np.repeat(np.arange(len(self)), windows)
        first = np.repeat(np.cumsum(windows) - windows, windows)
        number = np.arange(len(origin)) - first
        starts = self.starts[origin] + number * (length - 1)
        stops = self.stops[origin]
        if truncate == "start":
            starts = np.where(over[origin], stops - length, starts)
        stops = np.minimum(stops, starts + length)
        ids, weights = self.ids, self.weights
        if truncate == "start" and 0 < len(opening) < length and over.any():
            ids, weights, size = ids.copy(), weights.copy(), len(opening)
            for old, start in zip(self.starts[origin][over[origin]], starts[over[origin]], strict=True):
                if begins_with(self.ids, old, opening):
                    # What follows the opening now did not follow it in the text: it is not trained either.
                    ids[start : start + size], weights[start : start + size + 1] = opening, 0.0
        more = (array[origin] for array in (self.rows, self.windowed, self.values))
        return Examples(ids, weights, starts, stops, *more), over

    def hash_into(self, digest: Any) -> None:
        """Adds every token and weight, in order, to a hash."""
        digest.update((self.stops - self.starts).tobytes())
        for first in range(0, len(self), _BLOCK):
            ids, weights = self.flat(first, first + _BLOCK)
            digest.update(ids.tobytes())
            digest.update(weights.tobytes())

    # ---- files ----------------------------------------------------------------------------------------------------

    def save(self, folder: Path, **more: Any) -> None:
        """Writes the arrays to a folder, at once: it is made beside, and then renamed."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        clean(folder.parent, ".making-*")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".making-{os.getpid()}-") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            for name in _ARRAYS:
                with (new / f"{name}.npy").open("wb") as file:
                    np.save(file, np.ascontiguousarray(getattr(self, name)))
                    file.flush()
                    os.fsync(file.fileno())
            files = {name: new / f"{name}.npy" for name in _ARRAYS}
            sizes = {name: file.stat().st_size for name, file in files.items()}
            content = {"sizes": sizes, "sums": {name: checksum(file) for name, file in files.items()}, **more}
            with (new / "index.json").open("w", encoding="utf-8") as index:
                json.dump({**content, "sum": _sum_of(content)}, index)
                index.flush()
                os.fsync(index.fileno())
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(new, folder)

    @classmethod
    def load(cls, folder: Path) -> tuple[Examples, dict[str, Any]]:
        """Maps the arrays of a folder.

        Returns:
            The examples, and what was saved with them.

        Raises:
            ValueError: If the folder is torn.
        """
        try:
            index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            if index.pop("sum") != _sum_of(index):
                raise ValueError("index.json is damaged")
            sizes, sums = index.pop("sizes"), index.pop("sums")
            for name in _ARRAYS:
                file = folder / f"{name}.npy"
                if file.stat().st_size != sizes[name] or checksum(file) != sums[name]:
                    raise ValueError(f"{file.name} is damaged")
            arrays = [np.load(folder / f"{name}.npy", mmap_mode="r" if sizes[name] > 200 else None) for name in _ARRAYS]
            lengths = {len(array) for array in arrays[2:]}
            if len(lengths) != 1 or len(arrays[0]) != len(arrays[1]):
                raise ValueError("its arrays do not fit each other")
        except (OSError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise ValueError(str(error)) from None
        return cls(*arrays), index


def _sum_of(content: dict[str, Any]) -> int:
    """A checksum of what an index says."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


class Joined(Sequence[Example]):
    """The examples of several sources, one after the other.

    Args:
        parts: The examples of each.
    """

    def __init__(self, parts: Sequence[Stored]) -> None:
        self.parts = list(parts)
        self._starts = [0]
        for part in self.parts:
            self._starts.append(self._starts[-1] + len(part))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part, place = self.find(index)
        return self.parts[part][place]

    def find(self, index: int) -> tuple[int, int]:
        """The part an example lies in, and its index there.

        Raises:
            IndexError: If there is no such example.
        """
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} examples, asked for number {index}")
        part = bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]

    def measures(self) -> Measures:
        """Lengths, trained tokens and weights of all."""
        measured = [part.measures() for part in self.parts] or [Examples.of([], [], []).measures()]
        return Measures(*(np.concatenate(arrays) for arrays in zip(*measured, strict=True)))

    def reweighted(self, factors: np.ndarray) -> Joined:
        """The same examples with other weights; see `Examples.reweighted`.

        Raises:
            TypeError: If a part holds anything but examples of single texts.
        """
        stops = np.cumsum([int(part.measures().targets.sum()) for part in self.parts])
        made = []
        for part, some in zip(self.parts, np.split(factors, stops[:-1]), strict=True):
            if not isinstance(part, Examples):
                raise TypeError(f"{type(part).__name__} cannot be weighted token by token")
            made.append(part.reweighted(some))
        return Joined(made)

    def fingerprint(self) -> str:
        """A hash of every token and weight, in order."""
        digest = hashlib.blake2b(digest_size=16)
        for part in self.parts:
            part.hash_into(digest)
        return digest.hexdigest()


def measure(examples: Sequence[Example]) -> Measures:
    """Lengths, trained tokens and weights of examples of any kind."""
    if isinstance(examples, Stored | Joined):
        return examples.measures()
    return Measures(
        np.array([len(example.input_ids) for example in examples], np.int64),
        np.array([example.num_targets for example in examples], np.int64),
        np.array([float(sum(example.weights)) for example in examples]),
    )


def begins_with(ids: np.ndarray, start: int, opening: Sequence[int]) -> bool:
    """Whether some tokens are those from a place on."""
    return [*ids[start : start + len(opening)]] == [*opening]


def check_truncate(value: str) -> None:
    """Refuses what is no way to truncate.

    Raises:
        ConfigError: If it is none.
    """
    if value not in ("end", "start", "drop"):
        raise ConfigError(f"data.truncate must be end, start or drop, got {value!r}.")


__all__ = ["Examples", "Joined", "Measures", "Stored", "Truncate", "begins_with", "check_truncate", "measure"]
