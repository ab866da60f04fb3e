"""Several sources with weights, counted in trained tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ftlit.errors import ConfigError


class Mixture:
    """Which examples an epoch takes from each source, and in which order.

    Each source is an endless stream: one permutation of its examples after another. Every epoch takes the next `n_i`
    examples of stream `i`, the same number in each epoch, and shuffles the union. So over epochs the examples of a
    source come up equally often, and what an epoch holds is a function of the seed and its number alone: no state.

    `n_i` is chosen so that source `i` gives the share `w_i` of the trained tokens of an epoch, with the mean length of
    its examples; single epochs differ from that by what the lengths of the drawn examples do.

    An epoch is as long as it takes to see **every example at least once**: the source that is repeated least is taken
    exactly once, the others more often. `epoch_tokens` sets another length.

    Args:
        targets: For each source the trained tokens of its examples; the examples are numbered through all sources.
        weights: The share of the trained tokens that each source is to give, up to a common factor.
        seed: Seed of all orders.
        shuffle: Whether there is any shuffling; without it streams keep the order of the rows and are interleaved.
        epoch_tokens: Trained tokens of an epoch.

    Raises:
        ConfigError: If a weight is not positive.
    """

    def __init__(
        self,
        targets: Sequence[np.ndarray],
        weights: Sequence[float],
        *,
        seed: int = 0,
        shuffle: bool = True,
        epoch_tokens: int | None = None,
    ) -> None:
        if any(not 0 < weight < float("inf") for weight in weights):
            raise ConfigError(f"the weights in data.train must be positive, got {list(weights)}; leave a source out.")
        self.targets, self.seed, self.shuffle = list(targets), seed, shuffle
        self.asked = [weight / sum(weights) for weight in weights]
        self.sizes = [len(source) for source in targets]
        self._starts = np.cumsum([0, *self.sizes])
        totals = [float(source.sum()) for source in targets]
        tokens = epoch_tokens or max(total / share for total, share in zip(totals, self.asked, strict=True))
        self.counts = [
            max(1, round(tokens * share * size / total))
            for share, size, total in zip(self.asked, self.sizes, totals, strict=True)
        ]

    def __len__(self) -> int:
        """Examples of an epoch."""
        return sum(self.counts)

    def drawn(self, source: int, epoch: int) -> np.ndarray:
        """What an epoch takes from a source: indices within the source, in the order of its stream."""
        count, size = self.counts[source], self.sizes[source]
        start = epoch * count
        first, last = start // size, (start + count - 1) // size
        stream = np.concatenate([self._permutation(source, number) for number in range(first, last + 1)])
        return stream[start - first * size :][:count]

    def order(self, epoch: int) -> list[int]:
        """The examples of an epoch, numbered through all sources."""
        drawn = [self.drawn(source, epoch) + self._starts[source] for source in range(len(self.counts))]
        union = np.concatenate(drawn)
        if self.shuffle:
            return union[self._generator("epoch", epoch).permutation(len(union))].tolist()
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        return union[np.argsort(places, kind="stable")].tolist()

    def shares(self, epoch: int = 0) -> list[float]:
        """The share of the trained tokens that each source gives in an epoch."""
        given = [float(self.targets[i][self.drawn(i, epoch)].sum()) for i in range(len(self.counts))]
        return [tokens / sum(given) for tokens in given]

    def repeats(self) -> list[float]:
        """How often an epoch takes each example of a source, on average."""
        return [count / size for count, size in zip(self.counts, self.sizes, strict=True)]

    def _permutation(self, source: int, number: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.sizes[source])
        return self._generator("source", source, number).permutation(self.sizes[source])

    def _generator(self, *names: object) -> np.random.Generator:
        digest = hashlib.blake2b(repr((self.seed, *names)).encode(), digest_size=16).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))
