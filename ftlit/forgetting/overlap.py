"""Documents that are measured and trained at once: what they tell is not forgetting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ftlit.batch import Example
from ftlit.data.store import measure


def overlaps(
    held_out: Mapping[str, Sequence[Example]], trained: Mapping[str, Sequence[Example]]
) -> Iterator[tuple[str, str, int]]:
    """Finds documents whose scored tokens are the trained tokens of a row, whatever the prompts.

    Args:
        held_out: Documents that are measured, by what measures them.
        trained: Rows that are trained, by what trains them.

    Yields:
        What measures, what trains, and how many documents of the one are also rows of the other.
    """
    known = {name: _texts(examples) for name, examples in held_out.items()}
    lengths = np.unique([len(text) for texts in known.values() for text in texts]) // _TOKEN.itemsize
    for trainer, rows in trained.items():
        # Only rows with as many tokens as some document can be one.
        places = np.flatnonzero(np.isin(measure(rows).targets, lengths))
        texts = {_text(rows[int(place)]) for place in places}
        for measurer, documents in known.items():
            count = sum(document in texts for document in documents)
            if count:
                yield measurer, trainer, count


_TOKEN = np.dtype(np.int32)


def _texts(examples: Sequence[Example]) -> list[bytes]:
    return [text for text in (_text(examples[place]) for place in range(len(examples))) if text]


def _text(example: Example) -> bytes:
    """The tokens that are predicted and counted."""
    ids, weights = np.asarray(example.input_ids, _TOKEN)[1:], np.asarray(example.weights)[1:]
    return ids[weights != 0].tobytes()


__all__ = ["overlaps"]
