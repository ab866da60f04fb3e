"""The loader of rollouts: draws when it must, and yields one `StepBatch` an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ftlit.batch import PackedBatch, StepBatch, pack
from ftlit.data.added import AddedRows
from ftlit.data.packing import FILLER, StepPlanner
from ftlit.rollout.experience import Experience
from ftlit.rollout.generate import seed_of


class Resumed(NamedTuple):
    """Where a run goes on.

    Attributes:
        experience: The rollout that it is in; None: between two.
        first: Number of the rollout that it draws then.
        trained: Tokens trained before that.
    """

    experience: Experience | None = None
    first: int = 0
    trained: int = 0


class RolloutLoader:
    """Yields as many steps as an epoch has, from wherever the run is.

    It has a length, so that Lightning asks for one step at a time and a rollout is drawn by the policy of that very
    step. Its place follows from the optimizer steps taken and the rollout it is in; it counts nothing itself. A rollout
    that is cut short is followed by the next at once: an epoch always has the same number of optimizer steps.

    Args:
        collect: Draws a rollout of a given number.
        taken: Says how many optimizer steps the run has taken.
        length: Optimizer steps of an epoch.
        update_epochs: How often a rollout is gone through.
        seed: Seed of the order of the minibatches from the second time on.
        experience: The rollout that a run goes on in; None at its beginning.
        first: Number of the first rollout to draw.
        before: Tokens that the run has trained before it.
        added: Cuts the rows that controls add into micro-batches.

    Attributes:
        next: Number of the next rollout to draw.
    """

    def __init__(
        self,
        collect: Callable[[int], Experience],
        taken: Callable[[], int],
        length: int,
        update_epochs: int,
        seed: int = 0,
        experience: Experience | None = None,
        first: int = 0,
        before: int = 0,
        added: Added | None = None,
    ) -> None:
        self.collect, self.taken, self.length = collect, taken, length
        self.update_epochs, self.seed, self.added = update_epochs, seed, added
        self.experience, self.next = experience, first if experience is None else experience.number + 1
        self._before = before

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[StepBatch]:
        """Yields the steps of an epoch."""
        for _ in range(self.length):
            present = self.experience
            if present is None or present.cut or self._place(present) >= self.update_epochs * len(present.steps):
                trained = self.trained
                present = self.experience = self.collect(self.next)
                present.trained = trained
                self.next += 1
            yield self.step(present, self._place(present))

    def state_dict(self) -> dict[str, int]:
        """Which rollout the run is in; the rollout itself, which every rank has its own of, is kept by the stage."""
        return {"rollout": self.next - 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing: the stage hands over the rollout to go on in."""

    @property
    def trained(self) -> int:
        """Tokens that the run has trained so far, on all ranks."""
        present = self.experience
        return self._before if present is None else self._trained(present, self._place(present))

    def _place(self, present: Experience) -> int:
        return self.taken() - present.first_step

    def step(self, present: Experience, place: int) -> StepBatch:
        """One optimizer step of a rollout.

        Args:
            present: The rollout.
            place: Steps of it before this one.
        """
        number = self._minibatch(present, place)
        own = [present.pack(micro) for micro in present.steps[number]]
        more: list[PackedBatch] = []
        if self.added is not None:
            before = self._trained(present, place)
            more = self.added(before, before + present.totals[number].targets, present.tokens)
        return StepBatch([*own, *more], present.totals[number], len(own))

    def _minibatch(self, present: Experience, place: int) -> int:
        epoch, number = divmod(place, len(present.steps))
        if not epoch:
            return number
        generator = torch.Generator("cpu").manual_seed(seed_of(self.seed, present.number, epoch))
        return int(torch.randperm(len(present.steps), generator=generator, device="cpu")[number])

    def _trained(self, present: Experience, place: int) -> int:
        """Tokens trained in the run before a step."""
        return present.trained + sum(present.totals[self._minibatch(present, step)].targets for step in range(place))


class Added:
    """The rows that controls add to the steps, in micro-batches of their own; as many on every rank.

    Args:
        rows: What controls add; the i-th is source i + 1.
        max_tokens: Most tokens of a micro-batch.
        rank: Whose micro-batches.
        world: Number of ranks.
    """

    def __init__(self, rows: Sequence[AddedRows], max_tokens: int | None, rank: int = 0, world: int = 1) -> None:
        self.rows, self.max_tokens, self.rank, self.world = list(rows), max_tokens, rank, world

    def __call__(self, before: int, after: int, like: Mapping[str, Tensor]) -> list[PackedBatch]:
        """What goes with one step.

        Args:
            before: Trained tokens of the run's own rows before it.
            after: The same after it.
            like: The stage's tensors of tokens; these rows have none, but zeros of that type.
        """
        out = []
        for source, rows in enumerate(self.rows, start=1):
            chosen = rows.between(before, after)
            if not chosen:
                continue
            planner = StepPlanner(
                rows.examples, batch_size=len(chosen), world=self.world, max_tokens=self.max_tokens, shuffle=False
            )
            for part in planner.step(chosen).ranks[self.rank]:
                numbers = part or (chosen[0],)
                indices = part or (FILLER,)
                batch = pack([rows.examples[i] for i in numbers], indices, sources=(source,) * len(numbers))
                count = len(batch.target_ids)
                out.append(batch.replace(extras={name: values.new_zeros(count) for name, values in like.items()}))
        return out


__all__ = ["Added", "Resumed", "RolloutLoader"]
