"""Which examples form a micro-batch and an optimizer step, planned from the known lengths, and the loader of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ftlit.batch import Example, PackedBatch, StepBatch, StepTotals, pack
from ftlit.data.mixing import Mixture
from ftlit.data.store import measure

FILLER = -1


class Step(NamedTuple):
    """The plan of one optimizer step.

    Attributes:
        ranks: For each rank its micro-batches, each a tuple of example indices; every rank has the same number. An
            empty tuple is filled when loaded, with an example that counts nothing.
        totals: What the step holds over all ranks.
    """

    ranks: tuple[tuple[tuple[int, ...], ...], ...]
    totals: StepTotals


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
    ) -> None:
        self.lengths, self.targets, self.weights = (array.tolist() for array in measure(examples))
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
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (1 << 63))
        return torch.randperm(len(self.lengths), generator=generator).tolist()

    def plan(self, epoch: int) -> list[Step]:
        """All steps of an epoch."""
        order = self.order(epoch)
        size = self.examples_per_step
        return [self.step(order[start : start + size]) for start in range(0, len(order), size)]

    def step(self, chosen: Sequence[int]) -> Step:
        """Cuts the examples of one step into micro-batches for every rank."""
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
        return Step(even, totals)

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
    return pack([examples[int(np.argmin(measure(examples).lengths))]], [FILLER])


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
        known, order = -1, list[int]()
        for _ in range(len(self)):
            epoch, number = divmod(self.taken, len(self))
            if epoch != known:
                known, order = epoch, self.planner.order(epoch)
            self.taken += 1
            size = self.planner.examples_per_step
            step = self.planner.step(order[number * size : (number + 1) * size])
            yield StepBatch([_pack(self.examples, part) for part in step.ranks[self.rank]], step.totals)

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
