"""What examples of a micro-batch have in common at their start is run once.

Chat templates put the same system prompt before every example, and data sets hold several answers to one prompt. A
stretch that examples share becomes a segment of its own, the parent of what follows; every token still sees exactly
what it saw before, so all scores and gradients are the same. Tokens after the last that predicts a target, which
change nothing, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ftlit.batch import PackedBatch, Segments

# A segment costs some calls a layer: not worth it for fewer tokens than this.
SHORTEST = 8


def shared(batch: PackedBatch) -> PackedBatch:
    """The same targets, predicted from fewer tokens.

    Args:
        batch: A micro-batch on the CPU; returned as it is where its segments have parents.

    Returns:
        The batch to run instead. The targets keep their order; `target_segments` names their segments in the new row,
        `examples` of a shared segment is that of the first example in it.
    """
    segments = batch.segments
    if any(parent >= 0 for parent in segments.parents):
        return batch
    row = _Row(_needed(batch), segments.offsets, batch.num_tokens)
    row.add(list(range(len(segments))), 0, -1)
    old = torch.tensor(row.taken)
    new = torch.tensor(row.places)
    return batch.replace(
        input_ids=batch.input_ids[:, old],
        position_ids=batch.position_ids[:, old],
        segments=Segments(row.lengths, row.parents),
        target_positions=new[batch.target_positions],
        target_segments=torch.tensor(row.leaves)[batch.target_segments],
        examples=tuple(batch.examples[owner] for owner in row.owners),
        sources=tuple(batch.sources[owner] for owner in row.owners),
    )


def _needed(batch: PackedBatch) -> list[list[int]]:
    """The tokens of each example up to the last that predicts a target, but one at least."""
    segments = batch.segments
    stops = [1] * len(segments)
    for place, owner in zip(batch.target_positions.tolist(), batch.target_segments.tolist(), strict=True):
        stops[owner] = max(stops[owner], place - segments.offsets[owner] + 1)
    ids = batch.input_ids[0].tolist()
    return [ids[offset : offset + stop] for offset, stop in zip(segments.offsets, stops, strict=True)]


class _Row:
    """The new row while it is laid out.

    Args:
        ids: Tokens of each example.
        offsets: Where each example lies in the old row.
        num_tokens: Length of the old row.

    Attributes:
        taken: For each place of the new row a place of the old one with the same token.
        places: For each place of the old row that of its token in the new one.
        lengths: Of each new segment.
        parents: Of each new segment.
        owners: The first example in each new segment.
        leaves: The last segment of each example.
    """

    def __init__(self, ids: Sequence[Sequence[int]], offsets: Sequence[int], num_tokens: int) -> None:
        self.ids, self.offsets = ids, offsets
        self.taken: list[int] = []
        self.places = [0] * num_tokens
        self.lengths: list[int] = []
        self.parents: list[int] = []
        self.owners: list[int] = []
        self.leaves = [-1] * len(ids)

    def add(self, members: list[int], start: int, parent: int) -> None:
        """Lays out what some examples, equal up to `start`, have from there on."""
        common = self._common(members, start)
        if len(members) == 1 or common - start >= SHORTEST:
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
            offset = self.offsets[member]
            self.places[offset + start : offset + stop] = range(len(self.taken), len(self.taken) + stop - start)
        offset = self.offsets[members[0]]
        self.taken += range(offset + start, offset + stop)
        self.lengths.append(stop - start)
        self.parents.append(parent)
        self.owners.append(members[0])
        return len(self.lengths) - 1
