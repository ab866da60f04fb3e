"""Held-out prompts of PPO: they are answered greedily, and what the answers are worth is logged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftlit.data.datamodules import MAIN
from ftlit.objectives.advantages import sums
from ftlit.rollout.experience import cut

if TYPE_CHECKING:
    from ftlit.stages.ppo import PPO

_KEYS = ("reward", "kl", "length", "ended")


class HeldOut:
    """Answers the prompts of validation and test, and counts what became of them until it is logged.

    Args:
        stage: The stage, whose settings count.
    """

    def __init__(self, stage: PPO) -> None:
        self._stage = (stage,)  # a tuple, so that it is no child
        self._counts: dict[str, Tensor] = {}

    @property
    def stage(self) -> PPO:
        """The stage."""
        return self._stage[0]

    def answer(self, loop: str, numbers: Sequence[int], which: int = 0) -> None:
        """Answers some prompts.

        Args:
            loop: `val` or `test`.
            numbers: Which prompts of the set.
            which: Which set of the loop.
        """
        if not numbers:
            return
        stage, name = self.stage, self._names(loop)[which]
        rollouts, rewards, data = stage.rollouts, stage.rewards, stage.data
        rows = [data.rows["test" if loop == "test" else f"validation:{name}"][number] for number in numbers]
        made = rollouts.rewarded(rows, numbers, rollouts.draw(rows, [0] * len(rows), stage.sampling.greedy))
        found = made.experience
        lengths = [len(prompt) for prompt in found.prompts]
        tokens = rollouts.score(found, cut(found.owners, lengths, found.lengths.tolist(), data.max_tokens))
        apart = sums(tokens["old_logps"] - tokens["reference"], found.token_owners, len(rows))
        raw = rewards.weighted(made.said.scores)[made.said.known]
        each = [raw, apart, found.lengths, made.ended, *(one[~one.isnan()] for one in made.said.scores)]
        counts = torch.tensor([[float(one.double().sum()), len(one)] for one in each], dtype=torch.float64)
        self._counts[name] = self._counts.get(name, torch.zeros_like(counts)) + counts
        if not stage.is_quiet:
            rollouts.keep(name if loop == "val" else loop, made)

    def log(self, loop: str) -> None:
        """Logs `reward`, `kl` (nats an answer), `length` (tokens), `ended`, and every reward where there are several.

        Args:
            loop: `val` or `test`.
        """
        names = self.stage.rewards.names
        keys = [*_KEYS, *(f"rewards/{name}" for name in names)]
        values: dict[str, float] = {}
        for name in self._names(loop):
            none = torch.zeros(len(keys), 2, dtype=torch.float64)
            counts = self.stage.rollouts.total(self._counts.get(name, none)).tolist()
            place = loop if name == MAIN else f"{loop}/{name}"
            for key, (total, count) in zip(keys, counts, strict=True):
                if len(names) > 1 or "/" not in key:
                    values[f"{place}/{key}"] = total / count if count else float("nan")
        self._counts = {}
        self.stage.log_evaluation(loop, values)

    def logged(self, loop: str) -> list[str]:
        """Whole names of what `log` gives.

        Args:
            loop: `val` or `test`.
        """
        each = self.stage.rewards.names
        keys = [*_KEYS, *(f"rewards/{name}" for name in each)] if len(each) > 1 else _KEYS
        places = [loop if name == MAIN else f"{loop}/{name}" for name in self._names(loop)]
        return [f"{place}/{key}" for place in places for key in keys]

    def _names(self, loop: str) -> list[str]:
        return self.stage.data.validation_names if loop == "val" else [MAIN]


__all__ = ["HeldOut"]
