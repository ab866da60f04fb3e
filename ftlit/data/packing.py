"""Which examples form a micro-batch and an optimizer step, planned from the known lengths, and the loader of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ftlit.batch import Example, PackedBatch, StepBatch, StepTotals, pack
from ftlit.data.added import AddedRows
from ftlit.data.mixing import Mixture
from ftlit.data.store import measure

FILLER = -1


class Step(NamedTuple):
    """The plan of one optimizer step.

    Attributes:
        ranks: For each rank its micro-batches, each a tuple of example indices; every rank has the same number. An
            empty tuple is filled when loaded, with an example that counts nothing.
        totals: What the step holds over all ranks, without what was added.
        added: For each rank and micro-batch the examples that controls added, as pairs of source and index.
        only_added: The source of each further micro-batch, which holds nothing but examples of that source.
    """

    ranks: tuple[tuple[tuple[int, ...], ...], ...]
    totals: StepTotals
    added: tuple[tuple[tuple[tuple[int, int], ...], ...], ...] = ()
    only_added: tuple[int, ...] = ()


class StepPlanner:
    """Plans optimizer steps.

    A step takes the next `batch_size x accumulate x world` examples of the epoch's order, whatever `max_tokens` is; the
    token cap only cuts them into more micro-batches. So the examples of each step, and with them its gradient, depend
    on the product alone. The last step of an epoch may be short; nothing is dropped.

    Args:
        examples: The tokenized examples.
        batch_size: Most examples in a micro-batch.
        accumulate: Micro-batches a step and rank, if the token cap allows.
        world: Number of ranks.
        max_tokens: Most tokens in a micro-batch; a longer example gets one of its own. None: no cap.
        shuffle: Whether each epoch has an order of its own.
        seed: The order is a function of this and the epoch, and of nothing else.
        mixture: What an epoch takes from each of several sources, in which order; it replaces `shuffle` and `seed`.
        added_rows: What controls add; the i-th is source i + 1. The micro-batches of the own examples are the same
            with and without: what is added goes where `max_tokens` leaves room, else into micro-batches of its own.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        accumulate: int = 1,
        world: int = 1,
        max_tokens: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        mixture: Mixture | None = None,
        added_rows: Sequence[AddedRows] = (),
    ) -> None:
        self.lengths, self.targets, self.weights = (array.tolist() for array in measure(examples))
        self.added_rows = tuple(added_rows)
        self._epoch_targets: list[int] = []
        self.batch_size, self.accumulate, self.world = batch_size, accumulate, world
        self.max_tokens, self.shuffle, self.seed, self.mixture = max_tokens, shuffle, seed, mixture
        self.examples_per_step = batch_size * accumulate * world

    def __len__(self) -> int:
        """Optimizer steps an epoch."""
        size = len(self.lengths) if self.mixture is None else len(self.mixture)
        return -(-size // self.examples_per_step)

    def order(self, epoch: int) -> list[int]:
        """The order of the examples in an epoch."""
        if self.mixture is not None:
            return self.mixture.order(epoch)
        if not self.shuffle:
            return list(range(len(self.lengths)))
        generator = torch.Generator("cpu").manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
        return torch.randperm(len(self.lengths), generator=generator, device="cpu").tolist()

    def plan(self, epoch: int) -> list[Step]:
        """All steps of an epoch."""
        return list(self.steps(epoch))

    def steps(self, epoch: int, first: int = 0) -> Iterator[Step]:
        """The steps of an epoch, one by one.

        Args:
            epoch: Which.
            first: The step of the epoch to begin with.
        """
        order, size = self.order(epoch), self.examples_per_step
        before = 0
        if self.added_rows:
            before = self._targets_before(epoch) + sum(self.targets[i] for i in order[: first * size])
        for start in range(first * size, len(order), size):
            chosen = order[start : start + size]
            after = before + sum(self.targets[i] for i in chosen)
            yield self.step(chosen, [rows.between(before, after) for rows in self.added_rows])
            before = after

    def _targets_before(self, epoch: int) -> int:
        """Trained tokens of the epochs before this one."""
        if self.mixture is None:
            return epoch * sum(self.targets)
        while len(self._epoch_targets) < epoch:
            self._epoch_targets.append(sum(self.targets[i] for i in self.order(len(self._epoch_targets))))
        return sum(self._epoch_targets[:epoch])

    def step(self, chosen: Sequence[int], added: Sequence[Sequence[int]] = ()) -> Step:
        """Cuts the examples of one step into micro-batches for every rank.

        Args:
            chosen: The run's own examples.
            added: For each of `added_rows` its examples.
        """
        ranks = self._spread(chosen, self.world, -(-len(chosen) // self.world))
        bins = [self._cut(rank) for rank in ranks]
        most = max(len(rank) for rank in bins)
        even = tuple(tuple(rank) + ((),) * (most - len(rank)) for rank in bins)
        totals = StepTotals(
            weight=sum(self.weights[i] for i in chosen),
            targets=sum(self.targets[i] for i in chosen),
            tokens=sum(self.lengths[i] for i in chosen),
            examples=len(chosen),
        )
        if not any(added):
            return Step(even, totals)
        return Step(even, totals, *self._add(even, added))

    def _add(
        self, own: tuple[tuple[tuple[int, ...], ...], ...], added: Sequence[Sequence[int]]
    ) -> tuple[tuple[tuple[tuple[tuple[int, int], ...], ...], ...], tuple[int, ...]]:
        """Puts added examples where there is room; `Step.added` and `Step.only_added`."""
        filler = min(self.lengths)
        loads = [[sum(self.lengths[i] for i in part) or filler for part in rank] for rank in own]
        parts: list[list[list[tuple[int, int]]]] = [[[] for _ in rank] for rank in own]
        only_added: list[int] = []
        for source, (rows, chosen) in enumerate(zip(self.added_rows, added, strict=True), start=1):
            first = [len(rank) for rank in parts]  # new micro-batches hold one source: a source can be left out whole
            heavy = [0] * self.world
            for index in sorted(chosen, key=lambda i: (-rows.lengths[i], i)):
                length = int(rows.lengths[index])
                rank = min(range(self.world), key=lambda r: (heavy[r], r))
                heavy[rank] += length
                open_parts = [*range(len(own[rank])), *range(first[rank], len(parts[rank]))]
                fits = [p for p in open_parts if self.max_tokens is None or loads[rank][p] + length <= self.max_tokens]
                if fits:
                    part = min(fits, key=lambda p: (loads[rank][p], p))
                else:
                    part = len(parts[rank])
                    parts[rank].append([])
                    loads[rank].append(0)
                parts[rank][part].append((source, index))
                loads[rank][part] += length
            most = max(len(rank) for rank in parts)
            for rank_parts, rank_loads in zip(parts, loads, strict=True):
                rank_loads += [0] * (most - len(rank_parts))
                rank_parts += [[] for _ in range(most - len(rank_parts))]
            only_added += [source] * (most - first[0])
        return tuple(tuple(tuple(part) for part in rank) for rank in parts), tuple(only_added)

    def _cut(self, chosen: Sequence[int]) -> list[tuple[int, ...]]:
        """As few micro-batches as `batch_size` and `max_tokens` allow, of even size."""
        bins = max(1, -(-len(chosen) // self.batch_size))
        while True:
            parts = self._spread(chosen, bins, self.batch_size)
            if self.max_tokens is None or bins >= len(chosen):
                return parts
            if all(len(part) < 2 or sum(self.lengths[i] for i in part) <= self.max_tokens for part in parts):
                return parts
            bins += 1

    def _spread(self, chosen: Sequence[int], parts: int, most: int) -> list[tuple[int, ...]]:
        """Longest first, each into the part with the fewest tokens that still has room.

        Within a part, examples lie by length: neighbours of one length share an attention call.
        """
        loads = [0] * parts
        filled: list[list[int]] = [[] for _ in range(parts)]
        for index in sorted(chosen, key=lambda i: (-self.lengths[i], i)):
            part = min((p for p in range(parts) if len(filled[p]) < most), key=lambda p: (loads[p], p))
            filled[part].append(index)
            loads[part] += self.lengths[index]
        return [tuple(part) for part in filled]


def _pack(examples: Sequence[Example], indices: Sequence[int]) -> PackedBatch:
    """Packs some examples; none at all becomes the shortest example as a filler, so that every rank runs the model."""
    if indices:
        return pack([examples[i] for i in indices], indices)
    return pack([_shortest(examples)], [FILLER])


def _shortest(examples: Sequence[Example]) -> Example:
    return examples[int(np.argmin(measure(examples).lengths))]


class StepLoader:
    """Yields one `StepBatch` an optimizer step, and resumes at the exact step.

    Its position is the number of steps taken since training began: one number, the same on every rank, no generator
    state. Epochs follow from it, so it does not matter when Lightning announces them.

    Args:
        examples: The tokenized examples.
        planner: The plan.
        rank: Whose micro-batches to load.
    """

    def __init__(self, examples: Sequence[Example], planner: StepPlanner, rank: int = 0) -> None:
        self.examples, self.planner, self.rank = examples, planner, rank
        self.taken = 0
        self.repeat = False

    def __len__(self) -> int:
        return len(self.planner)

    def __iter__(self) -> Iterator[StepBatch]:
        """Yields as many steps as an epoch has, from the present position on (with `repeat`, from the first)."""
        if self.repeat:
            self.taken = 0
        known, steps = -1, iter(list[Step]())
        for _ in range(len(self)):
            epoch, number = divmod(self.taken, len(self))
            if epoch != known:
                known, steps = epoch, self.planner.steps(epoch, number)
            self.taken += 1
            yield self.load(next(steps))

    def load(self, step: Step) -> StepBatch:
        """The micro-batches of a step."""
        own = step.ranks[self.rank]
        if not step.added:
            return StepBatch([_pack(self.examples, part) for part in own], step.totals)
        added = step.added[self.rank]
        micro_batches = [self._joined(part, more, 0) for part, more in zip(own, added, strict=False)]
        rest = zip(added[len(own) :], step.only_added, strict=True)
        micro_batches += [self._joined((), more, source) for more, source in rest]
        return StepBatch(micro_batches, step.totals, len(own))

    def _joined(self, own: Sequence[int], added: Sequence[tuple[int, int]], source: int) -> PackedBatch:
        """A micro-batch with added examples; where nothing of its source is in it, a filler of that source is."""
        rows = [(self.examples[i], i, 0) for i in own]
        if not rows and not (source and added):
            rows = [(_shortest(self.examples), FILLER, source)]
        rows += [(self.planner.added_rows[number - 1].examples[i], i, number) for number, i in added]
        examples, indices, sources = zip(*rows, strict=True)
        return pack(examples, indices, sources)

    def state_dict(self) -> dict[str, Any]:
        """Where the run is; Lightning saves this."""
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.taken = int(state["taken"])


class EvalLoader:
    """Yields every example once, in packed micro-batches; the same number on every rank.

    Args:
        examples: The tokenized examples.
        batch_size: Most examples in a micro-batch.
        max_tokens: Most tokens in a micro-batch.
        rank: Whose micro-batches to load.
        world: Number of ranks.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        max_tokens: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.examples, self.rank = examples, rank
        planner = StepPlanner(examples, batch_size=batch_size, world=world, max_tokens=max_tokens, shuffle=False)
        self.parts = [part for step in planner.plan(0) for part in step.ranks[rank]]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[PackedBatch]:
        for part in self.parts:
            yield _pack(self.examples, part)
