"""Tokenized comparisons: answers to one prompt, held in flat arrays and cut to length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np

from ftlit.batch import Answers, Example, PackedBatch, Pair, pack
from ftlit.data.store import Examples, Measures, Stored, Truncate, begins_with
from ftlit.errors import ConfigError

Rankings = Literal["all", "best"]


class Lost(NamedTuple):
    """How many comparisons, or parts of some, are gone, and why.

    Attributes:
        empty: Comparisons whose answers were empty, or whose rankings have fewer than two left.
        identical: Comparisons whose answers are equal, token by token, or equally good.
        long: Longer ones that were dropped.
        cut_away: Comparisons of which a trained answer, or the difference of two, was cut away whole.
        prompts_cut: Kept ones that lost a part of the prompt.
        answers_cut: Kept ones that lost the end of an answer.
        answers_dropped: Answers of kept rankings that were empty or equal to a better one.
    """

    empty: int = 0
    identical: int = 0
    long: int = 0
    cut_away: int = 0
    prompts_cut: int = 0
    answers_cut: int = 0
    answers_dropped: int = 0


class Comparisons(Stored):
    """Comparisons as stretches of flat arrays.

    Args:
        pieces: For each comparison its prompt (its value is the margin), then its answers (their values are grades);
            the pieces of one have one row number.
        rankings: Of more than two answers, whether each better one is paired with each worse one (`all`), or only the
            best with the others.
    """

    def __init__(self, pieces: Examples, rankings: Rankings = "all") -> None:
        self.pieces, self.rankings = pieces, rankings
        opens = np.ones(len(pieces), bool)
        opens[1:] = pieces.rows[1:] != pieces.rows[:-1]
        (self.firsts,) = np.nonzero(opens)
        self.ends = np.append(self.firsts[1:], len(pieces))[: len(self.firsts)]
        self.rows = pieces.rows[self.firsts]
        self._measures: Measures | None = None

    def __len__(self) -> int:
        return len(self.firsts)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        pieces = self.pieces
        ids, weights, lengths = [], [], []
        for place in range(self.firsts[index], self.ends[index]):
            stretch = slice(int(pieces.starts[place]), int(pieces.stops[place]))
            ids.append(pieces.ids[stretch])
            weights.append(pieces.weights[stretch])
            lengths.append(len(ids[-1]))
        answers = Answers(tuple(lengths[1:]), self.pairs(index))
        return Example(np.concatenate(ids), np.concatenate(weights), answers.pairs[0].margin, answers)

    def pairs(self, index: int) -> tuple[Pair, ...]:
        """Which answers of a comparison are preferred to which."""
        pieces, first = self.pieces, int(self.firsts[index])
        grades = pieces.values[first + 1 : self.ends[index]]
        weight, margin = self._weight(index), float(pieces.values[first])
        if len(grades) == 1:
            return (Pair(0, -1, weight, margin) if grades[0] > 0 else Pair(-1, 0, weight, margin),)
        better = range(len(grades)) if self.rankings == "all" else range(1)
        return tuple(
            Pair(i, j, weight, margin) for i in better for j in range(i + 1, len(grades)) if grades[i] > grades[j]
        )

    def _weight(self, index: int) -> float:
        """The weight of the row, which every trained token has."""
        start, stop = (int(array[self.firsts[index] + 1]) for array in (self.pieces.starts, self.pieces.stops))
        return float(self.pieces.weights[start:stop].max())

    @property
    def has_single(self) -> bool:
        """Whether an answer has no partner."""
        return bool((self.ends - self.firsts == 2).any())

    def labelled(self) -> tuple[int, int]:
        """How many answers without a partner are said to be good, and how many bad."""
        grades = self.pieces.values[self.firsts[self.ends - self.firsts == 2] + 1]
        return int((grades > 0).sum()), int((grades <= 0).sum())

    @property
    def has_margins(self) -> bool:
        """Whether a row says by how much its better answer is better."""
        return bool(self.pieces.values[self.firsts].any())

    @property
    def has_weights(self) -> bool:
        """Whether a row counts more or less than another."""
        return any(self._weight(index) != 1 for index in range(len(self)))

    def measures(self) -> Measures:
        """Tokens (the prompt once) and trained tokens of each; its weight is that of its pairs together."""
        if self._measures is None:
            pieces = self.pieces
            trained = np.array(
                [int(np.count_nonzero(pieces.weights[a:b])) for a, b in zip(pieces.starts, pieces.stops, strict=True)],
                np.int64,
            )
            weights = [sum(pair.weight for pair in self.pairs(index)) for index in range(len(self))]
            lengths = _added(pieces.stops - pieces.starts, self.firsts)
            self._measures = Measures(lengths, _added(trained, self.firsts), np.array(weights, np.float64))
        return self._measures

    def hash_into(self, digest: Any) -> None:
        """Adds every token, weight and pair, in order, to a hash."""
        for index in range(len(self)):
            example = self[index]
            digest.update(np.ascontiguousarray(example.input_ids).tobytes())
            digest.update(np.ascontiguousarray(example.weights).tobytes())
            digest.update(repr(example.answers).encode())

    def fit(self, length: int, truncate: Truncate, opening: Sequence[int] = ()) -> tuple[Comparisons, Lost]:
        """Leaves out what cannot be compared, and fits the prompt and each answer together into `length` tokens.

        Args:
            length: Most tokens of a prompt and an answer, at least 2.
            truncate: `start`: the prompt keeps its end, so much of it as the longest answer leaves room for, but at
                least a quarter of `length`; answers that are still too long lose their ends. `end`: prompt and answer
                lose what is beyond `length`. `drop`: longer comparisons go.
            opening: Tokens that every text of the tokenizer begins with; prompts that lose their start keep them.

        Returns:
            The comparisons that are left, and what happened to the others.
        """
        pieces = self.pieces
        starts, stops = pieces.starts.copy(), pieces.stops.copy()
        ids = pieces.ids
        lost = dict.fromkeys(Lost._fields, 0)
        kept: list[int] = []
        for first, end in zip(self.firsts.tolist(), self.ends.tolist(), strict=True):
            reason, answers = self._comparable(range(first + 1, end), starts, stops)
            begin, head = int(starts[first]), len(opening)
            if not reason:
                reason, changes = _cut(first, answers, starts, stops, length, truncate)
            room = begin < starts[first] <= stops[first] - head
            if head and room and begins_with(ids, begin, opening):
                ids = ids.copy() if ids is pieces.ids else ids
                ids[starts[first] : starts[first] + head] = opening
            if not reason and (changes["prompts_cut"] or changes["answers_cut"]):
                gone, left = self._comparable(answers, starts, stops)
                reason = "cut_away" if gone or left != answers or not self._trained(left, starts, stops) else ""
            if reason:
                lost[reason] += 1
                continue
            for name, count in changes.items():
                lost[name] += count
            lost["answers_dropped"] += end - first - 1 - len(answers)
            kept += [first, *answers]
        chosen = np.array(kept, np.int64)
        fitted = Examples(ids, pieces.weights, starts, stops, pieces.rows, pieces.windowed, pieces.values)
        return Comparisons(fitted.take(chosen), self.rankings), Lost(**lost)

    def _comparable(self, answers: Sequence[int], starts: np.ndarray, stops: np.ndarray) -> tuple[str, list[int]]:
        """Why some answers cannot be compared, `""` if they can; and those of them that are neither empty nor equal."""
        some = [place for place in answers if stops[place] > starts[place]]
        if not some or len(some) < min(len(answers), 2):
            return "empty", []
        left: list[int] = []
        for place in some:
            own = self.pieces.ids[starts[place] : stops[place]]
            if not any(np.array_equal(own, self.pieces.ids[starts[other] : stops[other]]) for other in left):
                left.append(place)
        grades = self.pieces.values[left]
        if len(some) > 1 and not (grades[0] > grades).any():
            return "identical", []
        return "", left

    def _trained(self, answers: Sequence[int], starts: np.ndarray, stops: np.ndarray) -> bool:
        return all(self.pieces.weights[starts[place] : stops[place]].any() for place in answers)


class Crossed:
    """Each prompt with answers to another one: those of the next row of the set that has a prompt of its own.

    So what a row is crossed with depends on nothing but the rows.

    Args:
        rows: Comparisons.
        others: Where answers are taken from if all rows have one prompt.
        max_length: Most tokens of a prompt and an answer: what is beyond is cut from the answer.

    Raises:
        ConfigError: If there are no two prompts.
    """

    def __init__(self, rows: Sequence[Example], others: Sequence[Example] | None, max_length: int) -> None:
        self.rows, self.max_length = rows, max_length
        prompts = [_prompt(example).tobytes() for example in rows]
        self._donors: Sequence[Example] = rows
        self._next = _next_other(prompts)
        if self._next is None and others is not None and others is not rows:
            strange = (i for i in range(len(others)) if _prompt(others[i]).tobytes() != prompts[0])
            if (donor := next(strange, None)) is not None:
                self._donors, self._next = others, [donor] * len(rows)
        if self._next is None:
            raise ConfigError("KTO puts answers to one prompt after another: give rows of at least two prompts.")

    def of(self, batch: PackedBatch) -> PackedBatch:
        """The prompts of a micro-batch with answers to others; a filler stays one.

        Args:
            batch: A micro-batch of the rows.
        """
        assert self._next is not None
        roots = [row for row, parent in zip(batch.examples, batch.segments.parents, strict=True) if parent < 0]
        made = []
        for row in roots:
            prompt, other = _prompt(self.rows[max(row, 0)]), self._donors[self._next[max(row, 0)]]
            made.append(_answered(prompt, other, max(1, self.max_length - len(prompt))))
        return pack(made, roots).to(batch.input_ids.device)


def _prompt(example: Example) -> np.ndarray:
    assert example.answers is not None
    return np.asarray(example.input_ids)[: len(example.input_ids) - sum(example.answers.lengths)]


def _next_other(prompts: Sequence[bytes]) -> list[int] | None:
    """For each row the next one, round and round, with another prompt; None where all have the same."""
    count = len(prompts)
    if len(set(prompts)) < 2:
        return None
    found = [0] * count
    following = next(i for i in range(count) if prompts[i] != prompts[-1])
    for row in range(count - 1, -1, -1):
        after = (row + 1) % count
        if prompts[after] != prompts[row]:
            following = after
        found[row] = following
    return found


def _answered(prompt: np.ndarray, other: Example, room: int) -> Example:
    """A prompt with the answers of another example, each cut to so many tokens."""
    assert other.answers is not None
    ids, weights, lengths = [prompt], [np.zeros(len(prompt), np.float32)], list[int]()
    start = len(_prompt(other))
    for length in other.answers.lengths:
        stop = start + min(length, room)
        ids.append(np.asarray(other.input_ids)[start:stop])
        weights.append(np.asarray(other.weights, np.float32)[start:stop])
        lengths.append(stop - start)
        start += length
    return Example(np.concatenate(ids), np.concatenate(weights), 0.0, Answers(tuple(lengths), ()))


def _cut(
    prompt: int, answers: Sequence[int], starts: np.ndarray, stops: np.ndarray, length: int, truncate: Truncate
) -> tuple[str, dict[str, int]]:
    """Cuts a comparison in place; why it must go instead, `""` if it need not, and what was cut."""
    own = int(stops[prompt] - starts[prompt])
    longest = max(int(stops[place] - starts[place]) for place in answers)
    changes = {"prompts_cut": 0, "answers_cut": 0}
    if own + longest <= length:
        return "", changes
    if truncate == "drop":
        return "long", changes
    if truncate == "start":
        left = min(own, max(length - longest, length // 4))
        starts[prompt] = stops[prompt] - left
    else:
        left = min(own, length)
        stops[prompt] = starts[prompt] + left
    changes["prompts_cut"] = int(left < own)
    changes["answers_cut"] = int(longest > length - left)
    for place in answers:
        stops[place] = min(int(stops[place]), int(starts[place]) + length - left)
    return "", changes


def _added(values: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    """The sum of a number of each piece over the pieces of each comparison."""
    return np.add.reduceat(values, firsts) if len(firsts) else np.zeros(0, values.dtype)


__all__ = ["Comparisons", "Crossed", "Lost", "Rankings"]
