"""Rows of preferences: answers to one prompt that are compared with each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from typing_extensions import override

from ftlit.batch import Example, Pair
from ftlit.data.comparisons import Comparisons, Lost, Rankings
from ftlit.data.datamodules import SFTData, shortened
from ftlit.data.formats import RowFormat, detect_preference, known_columns, known_pairs
from ftlit.data.plain import opening_tokens
from ftlit.data.statistics import LONG, Statistics
from ftlit.data.store import Stored, Truncate
from ftlit.data.templating import mark
from ftlit.data.tokenizing import Tokenized
from ftlit.errors import ConfigError, DataError

_DROPS = {
    "empty": "an empty answer",
    "identical": "answers equal, or equally good",
    "long": LONG,
    "cut_away": "an answer, or all that differs, cut away by max_length",
}
_NOTES = {
    "prompts_cut": "prompts cut to max_length",
    "answers_cut": "with an answer cut to max_length",
    "answers_dropped": "answers of rankings dropped (empty, or equal to a better one)",
}


class PreferenceData(SFTData):
    """Rows of answers to one prompt: pairs, rankings, or answers that are said to be good or bad.

    A row is computed as one prompt with several answers, so the prompt is run once. Formats are `Pairs` (`chosen` and
    `rejected`, with a `prompt` or as whole conversations), `Ranking` (`answers`, the best first) and `Labelled`
    (`label`), chosen from the columns. The trained tokens of an answer are those of its assistant turns, each with its
    end token.

    Args:
        args: Arguments of `SFTData`.
        truncate: What is cut from a prompt and an answer that are longer than `max_length` together: the `start` of the
            prompt (a quarter of `max_length` is left to it; answers that are still too long lose their ends), their
            `end`, or the whole row (`drop`).
        rankings: Of more than two answers, whether each better one is compared with each worse one (`all`), or the
            best one with all others (`best`).
        kwargs: Arguments of `SFTData`; `batch_size` counts rows.

    Raises:
        ConfigError: If a setting is out of range.
    """

    def __init__(self, *args: Any, truncate: Truncate = "start", rankings: Rankings = "all", **kwargs: Any) -> None:
        super().__init__(*args, train_on="assistant", truncate=truncate, **kwargs)  # type: ignore[misc]
        if rankings not in ("all", "best"):
            raise ConfigError(f"data.rankings must be all or best, got {rankings!r}.")
        self.rankings: Rankings = rankings

    @staticmethod
    @override
    def _choose(columns: Iterable[str], where: str, *, answers: bool = True) -> RowFormat:
        return detect_preference(columns, where, answers=answers)

    @staticmethod
    @override
    def _known(columns: Iterable[str], row: Mapping[str, Any], *, answers: bool = True) -> Mapping[str, str]:
        columns = list(columns)
        return known_pairs(columns) or ({} if answers else known_columns(columns, row, answers=False))

    @override
    def _cap(self) -> int | None:
        stage = None if self.trainer is None else self.trainer.lightning_module
        if not getattr(stage, "couples", False):
            return self.max_tokens
        if self.max_tokens is not None:
            self._say(
                f"the loss couples the rows of a micro-batch, so these have {self.batch_size} rows each, whatever "
                "data.max_tokens is."
            )
        return None

    @override
    def _fitted(self, key: str, one: Tokenized, taken: np.ndarray, counts: Statistics) -> Stored:
        if key.startswith("added:"):
            return super()._fitted(key, one, taken, counts)
        if not one.compares and not one.refused:
            raise DataError(f"{one.source.name} holds no answers to be compared; train on it with SFT and SFTData.")
        pieces = one.examples.take(taken[one.examples.rows])
        comparisons, lost = Comparisons(pieces, self.rankings).fit(
            self.max_length, self.truncate, opening_tokens(self.template.tokenizer)
        )
        for name, count in zip(Lost._fields, lost, strict=True):
            if name in _DROPS:
                counts.drop(_DROPS[name], count)
            else:
                counts.note(_NOTES[name], count)
        good, bad = comparisons.labelled()
        counts.note("labelled good", good)
        counts.note("labelled bad", bad)
        return comparisons

    @override
    def _refuse_nothing(self, counts: Statistics, made: Any) -> None:
        if not counts.examples and counts.drops:
            raise DataError(f"{counts.name}: none of {counts.rows} rows can be compared: {', '.join(counts.notes())}.")
        super()._refuse_nothing(counts, made)

    @override
    def rendered(self, index: int = 0, opening: str = "⟦", closing: str = "⟧", most: int | None = None) -> str:
        example = self.sets["train"][index]
        assert example.answers is not None
        tokenizer = self.template.tokenizer
        stops = np.cumsum([len(example.input_ids) - sum(example.answers.lengths), *example.answers.lengths])
        share = None if most is None else most // len(stops)
        lines = [shortened(tokenizer.decode(example.input_ids[: stops[0]]), share)]
        for number, (start, stop) in enumerate(pairwise(stops.tolist())):
            answer = Example(example.input_ids[start:stop], example.weights[start:stop])
            lines.append(f"--- {_name_of(number, example.answers.pairs)}")
            lines.append(shortened(mark(tokenizer, answer, opening, closing), share))
        return "\n".join(lines)


def _name_of(number: int, pairs: tuple[Pair, ...]) -> str:
    """What an answer is called where it is shown."""
    if len(pairs) > 1:
        return f"answer {number + 1}, the best first"
    return "chosen" if pairs[0].better == number else "rejected"
