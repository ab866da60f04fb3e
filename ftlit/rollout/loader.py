"""The loader of rollouts: draws when it must, and yields one `StepBatch` an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ftlit.batch import StepBatch
from ftlit.rollout.experience import Experience
from ftlit.rollout.generate import seed_of


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
    ) -> None:
        self.collect, self.taken, self.length = collect, taken, length
        self.update_epochs, self.seed = update_epochs, seed
        self.experience, self._next = experience, first if experience is None else experience.number + 1

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[StepBatch]:
        """Yields the steps of an epoch."""
        for _ in range(self.length):
            present = self.experience
            if present is None or present.cut or self._place(present) >= self.update_epochs * len(present.steps):
                present = self.experience = self.collect(self._next)
                self._next += 1
            yield self.step(present, self._place(present))

    def _place(self, present: Experience) -> int:
        return self.taken() - present.first_step

    def step(self, present: Experience, place: int) -> StepBatch:
        """One optimizer step of a rollout.

        Args:
            present: The rollout.
            place: Steps of it before this one.
        """
        epoch, number = divmod(place, len(present.steps))
        if epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, present.number, epoch))
            number = int(torch.randperm(len(present.steps), generator=generator)[number])
        return StepBatch([present.pack(micro) for micro in present.steps[number]], present.totals[number])


__all__ = ["RolloutLoader"]
