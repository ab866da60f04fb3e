"""Rows that a control adds to the training steps: which of them go with which optimizer step, counted in tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ftlit.batch import Example
from ftlit.data.store import measure
from ftlit.errors import ConfigError


class AddedRows:
    """An endless stream of examples, taken in proportion to the trained tokens of the run.

    Each pass over the examples has an order of its own. An example goes with the step in which `ratio` times the
    trained tokens of the run so far passes its middle. So after every step the tokens given differ from those asked
    for by at most half an example, however small the ratio, and what a step gets is a function of the seed and of the
    number of trained tokens before and after it: no state.

    Args:
        name: What it is called in the log.
        examples: At least one with a trained token.
        ratio: Trained tokens to add for each trained token of the run's own rows.
        seed: Seed of the orders.

    Raises:
        ConfigError: If the ratio is not positive, or nothing is trained in any example.
    """

    def __init__(self, name: str, examples: Sequence[Example], ratio: float, seed: int = 0) -> None:
        if not 0 < ratio < float("inf"):
            raise ConfigError(f"{name}: the ratio of added tokens must be positive, got {ratio}.")
        self.name, self.examples, self.ratio, self.seed = name, examples, ratio, seed
        self.lengths, self.targets, self.weights = measure(examples)
        self.pass_tokens = int(self.targets.sum())
        self._kept: tuple[int, np.ndarray, np.ndarray] | None = None
        if not self.pass_tokens:
            raise ConfigError(f"{name}: its {len(examples)} rows hold no trained token.")

    def between(self, before: float, after: float) -> list[int]:
        """The examples of a step, in the order of the stream.

        Args:
            before: Trained tokens of the run's own rows before the step.
            after: The same after it.
        """
        low, high = self.ratio * before, self.ratio * after
        chosen: list[int] = []
        for number in range(int(low // self.pass_tokens), int(high // self.pass_tokens) + 1):
            order, middles = self._pass(number)
            first, last = np.searchsorted(middles, (low - number * self.pass_tokens, high - number * self.pass_tokens))
            chosen += order[first:last].tolist()
        return chosen

    def _pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of a pass, and where the middle of each example lies in it, tokens; the last pass is kept."""
        kept = self._kept
        if kept is None or kept[0] != number:
            order = self._order(number)
            targets = self.targets[order]
            self._kept = kept = (number, order, np.cumsum(targets) - targets / 2)
        return kept[1:]

    def _order(self, number: int) -> np.ndarray:
        digest = hashlib.blake2b(repr((self.seed, self.name, number)).encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
        order = generator.permutation(len(self.targets))
        return order[self.targets[order] > 0]


__all__ = ["AddedRows"]
