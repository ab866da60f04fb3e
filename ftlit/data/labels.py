"""LabelledRow examples: where their labels are kept, and how they get into the micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftlit.batch import Example, PackedBatch, Segments, StepBatch
from ftlit.data.formats import Completion, Conversation, Text
from ftlit.data.formats.classification import LabelledRow, TextPair
from ftlit.data.packing import EvalLoader, Step, StepLoader
from ftlit.data.plain import opening_tokens
from ftlit.data.store import Examples, Joined, Stored, Truncate
from ftlit.data.templating import ChatTemplate

# Stands after the last token of an example, where a target's weight is kept; it never reaches the model.
MARK = 0


Content = Conversation | Completion | Text | TextPair
"""What a classifier can read."""


class LabelTemplate(ChatTemplate):
    """Tokens of labelled rows: those that plain transformers makes of them.

    A text gets the tokenizer's own special tokens, and so do two texts together. A completion ends in the end token,
    where there is one. A conversation is rendered whole, without the white space that the template puts after its last
    token.
    """

    def encode(self, record: Any) -> list[Example]:
        """The example of a record, with a mark at its end; none if it weighs 0.

        Of two texts its value is the number of tokens before the second one; less than 0 where the model is not told
        which of them a token is of.
        """
        assert isinstance(record, LabelledRow)
        if not record.weight:
            return []
        ids = self.tokens(record.content)
        border = self.border(record.content) * (1 if self.has_types else -1)
        return [Example([*ids, MARK], [0.0] * len(ids) + [record.weight], border)]

    @property
    def has_types(self) -> bool:
        """Whether the tokenizer tells a model which of two texts a token is of."""
        return "token_type_ids" in self.tokenizer.model_input_names

    def border(self, content: Content) -> int:
        """The number of tokens before the second of two texts; 0 of anything else."""
        if not isinstance(content, TextPair):
            return 0
        joined = self.tokenizer(content.first, content.second, verbose=False)
        places = joined.sequence_ids(0) if self.tokenizer.is_fast else joined.get("token_type_ids", [])
        return next((place for place, number in enumerate(places) if number == 1), 0)

    def between(self) -> int:
        """The number of tokens that the tokenizer puts between two texts."""
        pair = TextPair("a", "a")
        opening, _ = self.ends()
        return max(0, self.border(pair) - len(opening) - len(self._tokenize(["a"])[0]))

    def tokens(self, content: Content) -> list[int]:
        """The tokens of a conversation, a text, a text with what goes on from it, or two texts.

        Raises:
            DataError: If the template refuses it.
        """
        if isinstance(content, Completion) and self.tokenizer.eos_token_id is not None:
            return list(self._completion(content).input_ids)
        if isinstance(content, TextPair):
            return list(self.tokenizer(content.first, content.second, verbose=False)["input_ids"])
        if not isinstance(content, Conversation):
            text = content.text if isinstance(content, Text) else content.given + content.completion
            return list(self.tokenizer(text, verbose=False)["input_ids"])
        text = self.render(content.messages, tools=content.tools, options=content.template_kwargs)
        return self._tokenize([text.rstrip()])[0]

    def ends(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts before and after every text."""
        bare, full = self._tokenize(["a"])[0], list(self.tokenizer("a", verbose=False)["input_ids"])
        opening = opening_tokens(self.tokenizer)
        return opening, full[len(opening) + len(bare) :]


def cut(
    examples: Examples,
    length: int,
    truncate: Truncate,
    opening: Sequence[int],
    closing: Sequence[int],
    between: int = 0,
) -> tuple[Examples, np.ndarray]:
    """Fits every marked example into `length` tokens and its mark; what the tokenizer puts at the ends stays there.

    Args:
        examples: Examples with a mark at their ends.
        length: Most tokens of an example.
        truncate: Which part of a longer example is cut away; `drop`: all of it.
        opening: Tokens to keep at the start, where an example starts with them.
        closing: Tokens to keep at the end, where an example ends with them.
        between: The number of tokens to keep between two texts.

    Returns:
        The examples, and for each of the old ones whether it lost something.
    """
    over = examples.stops - examples.starts - 1 > length
    if truncate == "drop":
        return examples.take(~over), over
    ids, weights, values = [examples.ids], [examples.weights], examples.values.copy()
    starts, stops = examples.starts.copy(), examples.stops.copy()
    free = len(examples.ids)
    for number in np.nonzero(over)[0]:
        stop = examples.stops[number]
        whole, border = examples.ids[examples.starts[number] : stop - 1].tolist(), int(values[number])
        if border:
            short, place = shortened_pair(whole, abs(border), length, truncate, opening, closing, between)
            values[number] = place if border > 0 else -place
        else:
            short = shortened(whole, length, truncate, opening, closing)
        ids.append(np.array([*short, MARK], np.int32))
        weights.append(np.array([0.0] * len(short) + [examples.weights[stop - 1]], np.float32))
        starts[number], stops[number] = free, free + len(short) + 1
        free += len(short) + 1
    more = (examples.rows, examples.windowed, values)
    return Examples(np.concatenate(ids), np.concatenate(weights), starts, stops, *more), over


def shortened(
    ids: list[int], length: int, truncate: Truncate, opening: Sequence[int], closing: Sequence[int]
) -> list[int]:
    """The first or the last `length` tokens, between what stands at the ends."""
    first = list(opening) if ids[: len(opening)] == list(opening) else []
    last = list(closing) if closing and ids[-len(closing) :] == list(closing) else []
    room = length - len(first) - len(last)
    if room < 1:
        return ids[:length] if truncate == "end" else ids[-length:]
    inner = ids[len(first) : len(ids) - len(last)]
    return first + (inner[:room] if truncate == "end" else inner[-room:]) + last


def shortened_pair(
    ids: list[int],
    border: int,
    length: int,
    truncate: Truncate,
    opening: Sequence[int],
    closing: Sequence[int],
    between: int,
) -> tuple[list[int], int]:
    """Two texts in `length` tokens: the longer one loses its start or its end until both fit, as transformers does it.

    Returns:
        The tokens, and the number of those before the second text.
    """
    head = len(opening) if ids[: len(opening)] == list(opening) else 0
    tail = len(closing) if closing and ids[-len(closing) :] == list(closing) else 0
    parts = [ids[head : border - between], ids[border : len(ids) - tail]]
    sizes = [len(part) for part in parts]
    room = max(0, length - head - between - tail)
    while sum(sizes) > room:
        sizes[sizes[0] <= sizes[1]] -= 1
    first, second = (
        part[:size] if truncate == "end" else part[len(part) - size :] for part, size in zip(parts, sizes, strict=True)
    )
    start = [*ids[:head], *first, *ids[border - between : border]]
    return [*start, *second, *ids[len(ids) - tail :]][:length], min(len(start), length)


class LabelledExamples(Joined):
    """Marked examples and their labels.

    Args:
        parts: The examples of each source.
        labels: For each example the number of its label, int64 `[N]`; or 1 for each label that it has, `[N, L]`; or
            its score, float32 `[N]`.
    """

    def __init__(self, parts: Sequence[Stored], labels: Tensor) -> None:
        super().__init__(parts)
        self.labels = labels
        values = [part.values for part in parts if isinstance(part, Examples)]
        borders = np.concatenate(values).astype(np.int64) if values else np.zeros(0, np.int64)
        self.borders = torch.from_numpy(borders).clamp(min=0)  # how many tokens are of a first text

    def fingerprint(self) -> str:
        """A hash of every token, weight and label, in order."""
        digest = hashlib.blake2b(super().fingerprint().encode(), digest_size=16)
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def label(self, batch: PackedBatch) -> PackedBatch:
        """A micro-batch of marked examples without the marks, and with a target an example: its label."""
        lengths = torch.tensor(batch.segments.lengths)
        keep = torch.ones(batch.num_tokens, dtype=torch.bool)
        keep[lengths.cumsum(0) - 1] = False
        rows = torch.tensor(batch.examples)[batch.target_segments].clamp(min=0)
        return batch.replace(
            input_ids=batch.input_ids[:, keep],
            position_ids=batch.position_ids[:, keep],
            segments=Segments((lengths - 1).tolist()),
            target_positions=torch.zeros_like(batch.target_segments),
            target_ids=self.labels[rows],
            extras={**batch.extras, "borders": self.borders[rows]} if self.borders.any() else batch.extras,
        )


class LabelledStepLoader(StepLoader):
    """The loader of labelled training examples."""

    def load(self, step: Step) -> StepBatch:
        """The micro-batches of a step."""
        loaded = super().load(step)
        assert isinstance(self.examples, LabelledExamples)
        return StepBatch([self.examples.label(batch) for batch in loaded.micro_batches], loaded.totals, loaded.own)


class LabelledEvalLoader(EvalLoader):
    """The loader of labelled examples to measure on."""

    def __iter__(self) -> Iterator[PackedBatch]:
        assert isinstance(self.examples, LabelledExamples)
        yield from map(self.examples.label, super().__iter__())


__all__ = [
    "Content",
    "LabelTemplate",
    "LabelledEvalLoader",
    "LabelledExamples",
    "LabelledStepLoader",
    "cut",
    "shortened",
    "shortened_pair",
]
