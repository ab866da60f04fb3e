"""LabelledRow rows as a data module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from ftlit.data.datamodules import SFTData, shortened
from ftlit.data.formats.base import RowFormat, show
from ftlit.data.formats.classification import LabelledRow, detect_labelled, name_of
from ftlit.data.labels import LabelledEvalLoader, LabelledExamples, LabelledStepLoader, LabelTemplate, cut
from ftlit.data.packing import EvalLoader, StepLoader
from ftlit.data.sources import Source
from ftlit.data.statistics import LONG, Statistics
from ftlit.data.store import Examples, Joined
from ftlit.data.tokenizing import Tokenized
from ftlit.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ClassificationData(SFTData):
    """Rows with labels: `{"text": "...", "label": "spam"}`, or `messages` in place of `text`.

    Args:
        args: Arguments of `SFTData`; those of answers (`train_on`, `predict`, `epoch_tokens`) have no meaning here.
        labels: The labels in the order of the outputs; left out, those of the training rows, sorted. A row with a list
            of labels makes the task one where a row can have any number of them.
        kwargs: Arguments of `SFTData`.

    Raises:
        ConfigError: If a setting is out of range.
    """

    step_loader: ClassVar[type[StepLoader]] = LabelledStepLoader
    eval_loader: ClassVar[type[EvalLoader]] = LabelledEvalLoader

    def __init__(self, *args: Any, labels: list[str | int | bool] | None = None, **kwargs: Any) -> None:
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
        self.given_labels = given if labels is not None else None
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
        """Reads the labels of the training rows and decides their order."""
        for source in sources:
            for row in range(len(source)):
                try:
                    record = self._labelled(source, row)
                except DataError:
                    if self.on_bad_row == "error":
                        raise
                    continue  # counted when the row is tokenized
                self.multi_label = self.multi_label or record.several
                self.counts.update(record.labels)
                self.num_rows += 1
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

    def _numbers(self, source: Source, rows: np.ndarray) -> Tensor:
        """The labels of some rows as numbers, `[N]` or `[N, L]`."""
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

    @override
    def _changed(self, source: Source, record: Any) -> Any:
        if not isinstance(record, LabelledRow):
            return record
        content: Any = super()._changed(source, record.content)
        return record._replace(content=content)

    @override
    def _fitted(self, key: str, one: Tokenized, taken: np.ndarray, counts: Statistics) -> Examples:
        assert isinstance(self.template, LabelTemplate)
        examples = one.examples.take(taken[one.examples.rows])
        fitted, over = cut(examples, self.max_length, self.truncate, *self.template.ends())
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
        """How many rows have each label."""
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
        numbers = chosen.nonzero()[:, 0].tolist() if self.multi_label else [int(chosen)]
        return f"{text}{opening}{', '.join(self.labels[number] for number in numbers)}{closing}"


def _by_number(label: str) -> tuple[bool, int, str]:
    """Whole numbers by size, before text."""
    number = label.lstrip("-").isdigit()
    return not number, int(label) if number else 0, label


__all__ = ["ClassificationData"]
