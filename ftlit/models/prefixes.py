"""What examples of a micro-batch have in common at their start is run once.

Chat templates put the same system prompt before every example, and data sets hold several answers to one prompt. A
stretch that examples share becomes a segment of its own, the parent of what follows; every token still sees exactly
what it saw before, so all scores and gradients are the same. Tokens after the last that predicts a target, which
change nothing, are left out. What has nothing to share becomes one segment: a prompt with one answer, say.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import torch

from ftlit.batch import PackedBatch, Segments

# A segment costs some calls a layer: it must save so many tokens, by having as many or by that share of what shares it.
SHORTEST = 8
LEAST = 1 / 32


def shared(batch: PackedBatch) -> PackedBatch:
    """The same targets, predicted from fewer tokens, but for shared stretches that save less than `SHORTEST`.

    Args:
        batch: A micro-batch on the CPU. A path, from a segment without a parent to one without children, counts as
            an example here.

    Returns:
        The batch to run instead. The targets keep their order; `target_segments` names the last segments of their
        examples in the new row, `examples` of a shared segment is that of the first example in it. It has no pairs.
    """
    paths = _paths(batch)
    row = _Row(batch.input_ids[0].tolist(), [places for _, places in paths])
    row.add(list(range(len(paths))), 0, -1)
    leaves = torch.zeros(len(batch.segments), dtype=torch.int64, device=batch.input_ids.device)
    for (segments, _), leaf in zip(paths, row.leaves, strict=True):
        leaves[segments] = leaf
    old = torch.tensor(row.taken, device=batch.input_ids.device)
    new = torch.tensor(row.places, device=batch.input_ids.device)
    ends = [paths[owner][0][-1] for owner in row.owners]
    return batch.replace(
        input_ids=batch.input_ids[:, old],
        position_ids=batch.position_ids[:, old],
        segments=Segments(row.lengths, row.parents),
        target_positions=new[batch.target_positions],
        target_segments=leaves[batch.target_segments],
        examples=tuple(batch.examples[end] for end in ends),
        sources=tuple(batch.sources[end] for end in ends),
        pairs=(),
    )


def _paths(batch: PackedBatch) -> list[tuple[list[int], list[int]]]:
    """The segments of each example, and where its tokens lie up to the last that predicts a target, one at least."""
    segments = batch.segments
    stops = [0] * len(segments)  # tokens of each segment that are needed
    for place in batch.target_positions.tolist():
        owner = bisect_right(segments.offsets, place) - 1
        stops[owner] = max(stops[owner], place - segments.offsets[owner] + 1)
    inner = set(segments.parents)
    found = []
    for number in range(len(segments)):
        if number in inner:
            continue
        line = [*segments.ancestors(number), number]
        last = max((depth for depth, one in enumerate(line) if stops[one]), default=0)
        places: list[int] = []
        for one in line[: last + 1]:
            stop = max(stops[one], 1) if one == line[last] else segments.lengths[one]
            places += range(segments.offsets[one], segments.offsets[one] + stop)
        found.append((line, places))
    return found


class _Row:
    """The new row while it is laid out.

    Args:
        ids: Tokens of the old row.
        paths: For each example where its tokens lie in the old row.

    Attributes:
        taken: For each place of the new row a place of the old one with the same token.
        places: For each place of the old row that of its token in the new one, or of one of them.
        lengths: Of each new segment.
        parents: Of each new segment.
        owners: The first example in each new segment.
        leaves: The last segment of each example.
    """

    def __init__(self, ids: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        self.paths, self.ids = paths, [[ids[place] for place in path] for path in paths]
        self.taken: list[int] = []
        self.places = [0] * len(ids)
        self.lengths: list[int] = []
        self.parents: list[int] = []
        self.owners: list[int] = []
        self.leaves = [-1] * len(paths)

    def add(self, members: list[int], start: int, parent: int) -> None:
        """Lays out what some examples, equal up to `start`, have from there on."""
        common = self._common(members, start)
        saved = (len(members) - 1) * (common - start)
        among = sum(len(self.ids[member]) - start for member in members)
        worth = common - start >= SHORTEST or saved >= max(SHORTEST, LEAST * among)
        if len(members) == 1 or worth:
            parent = self._segment(members, start, common, parent)
            start = common
        groups: dict[int, list[int]] = {}
        for member in members:
            ids = self.ids[member]
            if len(ids) > common:
                groups.setdefault(ids[common], []).append(member)
            elif len(ids) > start:
                self._segment([member], start, common, parent)
        for group in groups.values():
            self.add(group, start, parent)

    def _common(self, members: list[int], start: int) -> int:
        """Up to where some examples are equal."""
        first, *others = (self.ids[member] for member in members)
        stop = min(len(self.ids[member]) for member in members)
        place = start
        while place < stop and all(other[place] == first[place] for other in others):
            place += 1
        return place

    def _segment(self, members: list[int], start: int, stop: int, parent: int) -> int:
        """Puts a stretch that all members share at the end of the row; returns its number."""
        for member in members:
            self.leaves[member] = len(self.lengths)
            for shift, place in enumerate(self.paths[member][start:stop]):
                self.places[place] = len(self.taken) + shift
        self.taken += self.paths[members[0]][start:stop]
        self.lengths.append(stop - start)
        self.parents.append(parent)
        self.owners.append(members[0])
        return len(self.lengths) - 1
