"""LabelledRow rows as a data module."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from ftlit.data.datamodules import SFTData, shortened
from ftlit.data.formats.base import RowError, RowFormat, Text, show
from ftlit.data.formats.classification import LabelledRow, TextPair, detect_labelled, known_labelled, name_of
from ftlit.data.labels import LabelledEvalLoader, LabelledExamples, LabelledStepLoader, LabelTemplate, cut
from ftlit.data.packing import EvalLoader, StepLoader
from ftlit.data.sources import Source
from ftlit.data.statistics import LONG, Statistics
from ftlit.data.store import Examples, Joined
from ftlit.data.tokenizing import Tokenized
from ftlit.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SCORE = "score"
"""What the one output of a regression is called."""

# No other digits: int() and str.isdigit() differ on these, and int() refuses very long ones.
_WHOLE = re.compile(r"-?[0-9]{1,18}")
_DECIMAL = re.compile(r"[-+]?[0-9]*\.[0-9]+")


class ClassificationData(SFTData):
    """Rows with labels: `{"text": "...", "label": "spam"}`, or `messages` in place of `text`; or with a `score`.

    Args:
        args: Arguments of `SFTData`; those of answers (`train_on`, `predict`, `epoch_tokens`) have no meaning here.
        labels: The labels in the order of the outputs; left out, those of the training rows, sorted. A row with a list
            of labels makes the task one where a row can have any number of them.
        regression: Whether the labels are scores to be met as numbers, by one output. Left out, they are where a row
            has a `score` in place of a label, or a label that is not a whole number.
        kwargs: Arguments of `SFTData`.

    Raises:
        ConfigError: If a setting is out of range.
    """

    step_loader: ClassVar[type[StepLoader]] = LabelledStepLoader
    eval_loader: ClassVar[type[EvalLoader]] = LabelledEvalLoader

    def __init__(
        self, *args: Any, labels: list[str | int | bool] | None = None, regression: bool | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        for name, is_set in (
            ("train_on", self.train_on != "assistant"),
            ("predict", self.predict_file is not None),
            ("epoch_tokens", self.epoch_tokens is not None),
        ):
            if is_set:
                raise ConfigError(f"data.{name} is about answers, and labelled rows have none; leave it out.")
        given = [name_of("data.labels", label) for label in labels or ()]
        if labels is not None and (len(given) < 2 or len(set(given)) < len(given)):
            raise ConfigError(f"data.labels needs at least two different labels, got {', '.join(given) or 'none'}.")
        if labels is not None and regression:
            raise ConfigError("data.labels names labels, and with data.regression rows have scores; leave one out.")
        self.given_labels = given if labels is not None else None
        self.asked_regression, self.regression = regression, bool(regression)
        self.scores: list[float] = []
        self.labels: list[str] = []
        self.multi_label = False
        self.counts: Counter[str] = Counter()
        self.num_rows = 0

    @override
    def setup(self, stage: str) -> None:
        if not self.labels:
            if not self.files:
                raise ConfigError("data.train is missing: give a file, a folder or a hub id with labelled rows.")
            self._find_labels(self._open("train", self.files))
        super().setup(stage)

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Gives the tokenizer by hand, where there is no trainer."""
        self._template = LabelTemplate(tokenizer, self.chat_template, options=self.chat_template_kwargs)

    # ---- labels ---------------------------------------------------------------------------------------------------

    def _find_labels(self, sources: Sequence[Source]) -> None:
        """Reads the labels of the training rows and decides what they are, and their order."""
        found: list[LabelledRow] = []
        fraction = ""
        for source in sources:
            for row in range(len(source)):
                try:
                    record = self._labelled(source, row)
                except DataError:
                    if self.on_bad_row == "error":
                        raise
                    continue  # counted when the row is tokenized
                found.append(record._replace(content=Text("")))
                if record.is_fraction:
                    fraction = fraction or f"{source.where(row)}: {_no_name(record)}"
        self.num_rows = len(found)
        self.regression = self._are_scores(found)
        if self.regression:
            self.labels = [SCORE]
            self.scores = [record.score for record in found if record.score is not None]
            return
        if fraction:
            raise DataError(fraction)
        self.multi_label = any(record.several for record in found)
        self.counts.update(label for record in found for label in record.labels)
        self._order_labels()

    def _are_scores(self, found: Sequence[LabelledRow]) -> bool:
        """Whether the labels are scores: as was asked, or where one is no whole number, or stands under `score`."""
        if self.asked_regression is not None:
            return self.asked_regression
        if any(record.is_scored for record in found):
            return True
        all_numbers = self.given_labels is None and all(record.score is not None for record in found)
        return all_numbers and any(_is_decimal(record) for record in found)

    def _order_labels(self) -> None:
        found = sorted(self.counts, key=_by_number)
        self.labels = self.given_labels or found
        if unknown := [label for label in found if label not in self.labels]:
            raise DataError(
                f"data.train has the label {unknown[0]!r}, which is not in data.labels ({', '.join(self.labels[:8])}); "
                "name all of them, or leave data.labels out."
            )
        if len(self.labels) < 2 and not self.multi_label:
            raise DataError(f"data.train has one label for all rows ({', '.join(found)}); at least two are needed.")

    @staticmethod
    def _labelled(source: Source, row: int) -> LabelledRow:
        record: Any = source.record(row)
        if not isinstance(record, LabelledRow):
            raise ConfigError(
                f"{source.name}: {type(source.row_format).__name__} reads no labels; give rows with text and label, "
                "such as a .jsonl or .csv file."
            )
        return record

    def _score(self, source: Source, row: int) -> float:
        """The score of a row.

        Raises:
            DataError: If it is no number.
        """
        record = self._labelled(source, row)
        if record.score is None:
            raise DataError(
                f"{source.where(row)}: column 'label' must hold a number, as the scores of other rows are, got "
                f"{show(', '.join(record.labels))}; data.regression=false takes numbers for names."
            )
        return record.score

    def _numbers(self, source: Source, rows: np.ndarray) -> Tensor:
        """The labels of some rows as numbers, `[N]` or `[N, L]`, or their scores, float32 `[N]`."""
        if self.regression:
            return torch.tensor([self._score(source, row) for row in rows.tolist()], dtype=torch.float32)
        numbers = {label: number for number, label in enumerate(self.labels)}
        table = torch.zeros(len(rows), len(self.labels), dtype=torch.int64)
        for place, row in enumerate(rows.tolist()):
            record = self._labelled(source, row)
            if record.several and not self.multi_label:
                raise DataError(
                    f"{source.where(row)}: column 'label' must hold one label, as in the training rows, got "
                    f"{show(list(record.labels))}."
                )
            for label in record.labels:
                if label not in numbers:
                    raise DataError(
                        f"{source.where(row)}: the label {label!r} is not one of the training rows': "
                        f"{nearest(label, self.labels)}"
                    )
                table[place, numbers[label]] = 1
        return table if self.multi_label else table.argmax(1)

    # ---- what SFTData leaves open ---------------------------------------------------------------------------------

    @staticmethod
    @override
    def _choose(columns: Iterable[str], where: str, *, answers: bool = True) -> RowFormat:
        return detect_labelled(columns, where)

    @staticmethod
    @override
    def _known(columns: Iterable[str], row: Mapping[str, Any], *, answers: bool = True) -> Mapping[str, str]:
        return known_labelled(columns)

    @override
    def _changed(self, source: Source, record: Any) -> Any:
        if not isinstance(record, LabelledRow):
            return record
        if isinstance(record.content, TextPair):
            both: Any = [super(ClassificationData, self)._changed(source, Text(text)) for text in record.content]
            return record._replace(content=TextPair(*(one.text for one in both)))
        content: Any = super()._changed(source, record.content)
        return record._replace(content=content)

    @override
    def _fitted(self, key: str, one: Tokenized, taken: np.ndarray, counts: Statistics) -> Examples:
        assert isinstance(self.template, LabelTemplate)
        examples = one.examples.take(taken[one.examples.rows])
        fitted, over = cut(examples, self.max_length, self.truncate, *self.template.ends(), self.template.between())
        if self.truncate == "drop":
            counts.drop(LONG, int(over.sum()))
        else:
            counts.truncated = int(over.sum())
        return fitted

    @override
    def _load(self, key: str, label: str, made: Sequence[Tokenized], *args: Any, **kwargs: Any) -> Joined:
        joined = super()._load(key, label, made, *args, **kwargs)
        numbers = [self._numbers(one.source, part.rows) for one, part in zip(made, joined.parts, strict=True)]
        self.sets[key] = labelled = LabelledExamples(joined.parts, torch.cat(numbers))
        return labelled

    @override
    def describe(self) -> list[str]:
        return [*super().describe(), self._of_labels()]

    @override
    def report(self) -> list[str]:
        return [*super().report(), self._of_labels()]

    def _of_labels(self) -> str:
        """How many rows have each label, or how their scores spread."""
        if self.regression:
            scores = np.asarray(self.scores)
            return (
                f"scores of train: mean {scores.mean():.4g}, standard deviation {scores.std():.4g}, from "
                f"{scores.min():.4g} to {scores.max():.4g}"
            )
        shares = ", ".join(f"{label} {self.counts[label]:,}" for label in self.labels[:12])
        more = f" and {len(self.labels) - 12} more" if len(self.labels) > 12 else ""
        kind = "any number of labels a row" if self.multi_label else "one label a row"
        return f"{len(self.labels)} labels, {kind}, with so many rows of train: {shares}{more}"

    @override
    def rendered(self, index: int = 0, opening: str = "⟦", closing: str = "⟧", most: int | None = None) -> str:
        """A training example as text with its labels behind it."""
        examples = self.sets["train"]
        assert isinstance(examples, LabelledExamples)
        text = shortened(self.template.tokenizer.decode(list(examples[index].input_ids)[:-1]), most)
        chosen = examples.labels[index]
        if self.regression:
            return f"{text}{opening}{float(chosen):g}{closing}"
        numbers = chosen.nonzero()[:, 0].tolist() if self.multi_label else [int(chosen)]
        return f"{text}{opening}{', '.join(self.labels[number] for number in numbers)}{closing}"


def _is_decimal(record: LabelledRow) -> bool:
    """Whether a label is a number that is not whole, or written with a decimal point, as in a CSV file."""
    return record.is_fraction or any(_DECIMAL.fullmatch(label) for label in record.labels)


def _no_name(record: LabelledRow) -> RowError:
    """What is wrong with a number that is not whole, among labels that are names."""
    wanted = "a label: text, a whole number, or true or false; or a number in every row, for a regression"
    return RowError("label", wanted, record.score)


def _by_number(label: str) -> tuple[bool, int, str]:
    """Whole numbers by size, before text."""
    number = _WHOLE.fullmatch(label) is not None
    return not number, int(label) if number else 0, label


__all__ = ["ClassificationData"]
