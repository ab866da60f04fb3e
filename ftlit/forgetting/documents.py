"""Held-out documents that forgetting is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ftlit.batch import Example
from ftlit.data.formats import Record
from ftlit.data.sources import Source, fill, refuse_placeholders, with_system
from ftlit.data.store import Examples, measure
from ftlit.data.templating import ChatTemplate
from ftlit.data.tokenizing import tokenize
from ftlit.errors import DataError

FEW = 10
"""Below so many documents, the windows of long ones are taken as documents: an interval needs more than a handful."""


class Documents(NamedTuple):
    """Tokenized documents.

    Attributes:
        examples: Their stretches; a document that is longer than the model is fed has several.
        owners: The document of each stretch, int64 `[examples]`; None: each is a document of its own.
    """

    examples: Sequence[Example]
    owners: np.ndarray | None = None

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return len(self.examples) if self.owners is None else len(np.unique(self.owners))

    @property
    def token_owners(self) -> np.ndarray:
        """The document of each scored token, int64 `[tokens]`."""
        owners = np.arange(len(self.examples)) if self.owners is None else self.owners
        _, numbers = np.unique(owners, return_inverse=True)
        return np.repeat(numbers, measure(self.examples).targets)

    def first(self, most: int) -> Documents:
        """The first documents.

        Args:
            most: How many.
        """
        return self._of(lambda number: number < most)

    def halves(self) -> tuple[Documents, Documents]:
        """Every other document in each."""
        return self._of(lambda number: number % 2 == 0), self._of(lambda number: number % 2 == 1)

    def _of(self, chosen: Callable[[int], bool]) -> Documents:
        """The documents whose numbers are chosen, in the order in which they appear."""
        owners = range(len(self.examples)) if self.owners is None else self.owners.tolist()
        number = {owner: place for place, owner in enumerate(dict.fromkeys(owners))}
        places = [place for place, owner in enumerate(owners) if chosen(number[owner])]
        return Documents([self.examples[i] for i in places], None if self.owners is None else self.owners[places])

    def fingerprint(self) -> str:
        """A hash of every token and of which are scored."""
        digest = hashlib.blake2b(digest_size=16)
        for example in self.examples:
            digest.update(np.asarray(example.input_ids, np.int32).tobytes() + b"|")
            digest.update((np.asarray(example.weights) != 0).tobytes() + b"|")
        return digest.hexdigest()


def read_documents(
    data: Any, rows: str, *, max_tokens: int, max_length: int, seed: int, quiet: bool = False
) -> tuple[Documents, str]:
    """Reads rows as documents: of a conversation the answers are scored, of raw text every token.

    Args:
        data: The datamodule of the run: its chat template, its system turn and its placeholders are used; the format is
            chosen from the columns of these rows.
        rows: A file, a folder, a hub id, or `sample:NAME`.
        max_tokens: Most tokens, prompts included; of more, whole documents are chosen at random.
        max_length: Most tokens of an example; raw text goes on in a further one, other rows lose their end.
        seed: Seed of the choice.
        quiet: Whether to show no progress.

    Returns:
        The documents, and what was taken, in words.

    Raises:
        DataError: If a row cannot be read, or nothing is left to score.
    """
    source = Source(rows, prefer="validation")
    template: ChatTemplate = data.template

    def change(record: Record) -> Record:
        record = fill(with_system(record, getattr(data, "system", None)), getattr(data, "fill", None) or {})
        if source.is_sample:
            refuse_placeholders(record)
        return record

    made = tokenize(source, template, change, cache=getattr(data, "cache", True), quiet=quiet)
    cut, over = made.examples.cut(max_length)
    found = cut.take(cut.measures().targets > 0)
    if not len(found):
        raise DataError(f"{rows}: none of {len(source)} rows has a token to score within {max_length} tokens.")
    return _chosen(found, max_tokens, seed, int(over.sum()), len(source))


def _chosen(found: Examples, max_tokens: int, seed: int, cut: int, rows: int) -> tuple[Documents, str]:
    """A random choice of documents, the same each time, and words for it."""
    documents, owners = np.unique(found.rows, return_inverse=True)
    windows = len(documents) < FEW and len(found) > len(documents)
    if windows:
        owners = np.arange(len(found))
    order = np.random.default_rng(seed).permutation(owners.max() + 1)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    sequence = np.argsort(place[owners], kind="stable")
    upto = np.cumsum(found.measures().lengths[sequence])
    taken = np.sort(sequence[: max(1, int(np.searchsorted(upto, max_tokens, side="right")))])
    chosen = found.take(taken)
    count, tokens = len(np.unique(owners[taken])), int(chosen.measures().targets.sum())
    words = f"{count:,} of {owners.max() + 1:,} documents, {tokens:,} scored tokens"
    if windows:
        words += f" (few long rows: their windows of {chosen.measures().lengths.max():,} tokens are the documents)"
    if cut:
        words += f"; {cut:,} rows lose their end"
    if (empty := rows - len(documents)) > 0:
        words += f"; {empty:,} rows have nothing to score"
    return Documents(chosen, owners[taken]), words


__all__ = ["FEW", "Documents", "read_documents"]
