"""The one batch type that every stage runs on: examples end to end in one row, no padding anywhere.

Shape legend, used in the whole package:
    T tokens of a micro-batch, S segments (one an example), N targets (trained tokens),
    D width, V vocabulary, H heads, P virtual tokens of a prefix or a prompt.

These are plain classes, not dataclasses or named tuples, on purpose: Lightning's precision plugins walk into those and
would cast the float weights of the targets to the precision of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# One pair of keys and values a layer, each [H_kv, P, head_dim]: what prefix tuning puts before every example.
PrefixKV = dict[int, tuple[Tensor, Tensor]]


class Pair(NamedTuple):
    """One answer that is preferred to another one.

    Attributes:
        better: The better answer: its number among the answers of an example, or its segment in a batch; -1 where an
            answer is only said to be bad.
        worse: The worse answer, likewise; -1 where one is only said to be good.
        weight: How much the pair counts.
        margin: By how much the better answer is better; 0 where nobody said.
    """

    better: int
    worse: int
    weight: float = 1.0
    margin: float = 0.0


class Answers(NamedTuple):
    """Several answers to one prompt, in one example: its tokens are those of the prompt, then those of each answer.

    Every answer goes on from the prompt as if the others were not there.

    Attributes:
        lengths: Tokens of each answer.
        pairs: Which answer is preferred to which.
    """

    lengths: tuple[int, ...]
    pairs: tuple[Pair, ...]


class Example(NamedTuple):
    """One tokenized example.

    Attributes:
        input_ids: Tokens: a list, or a NumPy array of whole numbers.
        weights: One number a token: how much predicting **this** token counts; 0 is not trained. `weights[0]` is 0,
            because nothing predicts the first token. A list, or a NumPy array.
        value: A number that its row gave it, such as the grade of an answer.
        answers: Where the example is several answers to one prompt: what they are.
    """

    input_ids: Sequence[int] | np.ndarray
    weights: Sequence[float] | np.ndarray
    value: float = 0.0
    answers: Answers | None = None

    @property
    def num_targets(self) -> int:
        """Number of trained tokens."""
        return int(np.count_nonzero(self.weights))


class Segments:
    """Which stretch of the row belongs to which example; it travels to every attention layer as a call argument.

    Args:
        lengths: Tokens of each segment, in the order of the row.
        parents: For each segment the index of an earlier segment whose tokens it also sees (a shared prompt), or -1.

    Raises:
        ValueError: If a length is not positive or a parent does not come before its child.
    """

    def __init__(self, lengths: Sequence[int], parents: Sequence[int] | None = None) -> None:
        self.lengths = tuple(lengths)
        self.parents = tuple(parents) if parents is not None else (-1,) * len(self.lengths)
        if any(length < 1 for length in self.lengths):
            raise ValueError(f"a segment needs at least one token, got lengths {self.lengths}")
        if len(self.parents) != len(self.lengths) or any(not -1 <= parent < i for i, parent in enumerate(self.parents)):
            raise ValueError(f"each parent must be an earlier segment or -1, got {self.parents}")
        self.offsets = tuple(accumulate(self.lengths[:-1], initial=0)) if self.lengths else ()
        # Attention masks by (queries, keys before them, window): built once a micro-batch, shared by all layers.
        self.masks: dict[tuple[int, int, int | None], Tensor] = {}
        # Plans of the tiled attention on CPUs, likewise.
        self.plans: dict[tuple[int, int | None, torch.dtype], list[Any]] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"Segments(lengths={self.lengths}, parents={self.parents})"

    def ancestors(self, index: int) -> list[int]:
        """Segments that `index` sees besides itself, the root first."""
        chain: list[int] = []
        while (index := self.parents[index]) >= 0:
            chain.append(index)
        return chain[::-1]

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yields `(first, count)`: neighbours of one length without parents, one attention call."""
        first = 0
        while first < len(self):
            count = 1
            if self.parents[first] < 0:
                while (
                    first + count < len(self)
                    and self.parents[first + count] < 0
                    and self.lengths[first + count] == self.lengths[first]
                ):
                    count += 1
            yield first, count
            first += count


class PackedBatch:
    """A micro-batch.

    Attributes:
        input_ids: Tokens, int64 `[1, T]`.
        position_ids: Position of each token in its example, int64 `[1, T]`; restarts at 0 in every segment (a segment
            with a parent continues the parent's positions).
        segments: Where the examples lie.
        target_positions: Index in the row of the hidden state that predicts each target, int64 `[N]`.
        target_ids: The token to be predicted, int64 `[N]`.
        target_weights: How much each target counts, float32 `[N]`.
        target_segments: The segment each target belongs to, int64 `[N]`.
        examples: For each segment the index of its row in the data set, -1 for a filler that counts nothing.
        pairs: Which segments are answers that are preferred to others; a filler's have weight 0.
        inputs_embeds: Embedded tokens `[1, T, D]` when a strategy adds virtual tokens, else None.
    """

    def __init__(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        segments: Segments,
        target_positions: Tensor,
        target_ids: Tensor,
        target_weights: Tensor,
        target_segments: Tensor,
        examples: tuple[int, ...],
        pairs: tuple[Pair, ...] = (),
        inputs_embeds: Tensor | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.position_ids = position_ids
        self.segments = segments
        self.target_positions = target_positions
        self.target_ids = target_ids
        self.target_weights = target_weights
        self.target_segments = target_segments
        self.examples = examples
        self.pairs = pairs
        self.inputs_embeds = inputs_embeds

    @property
    def num_tokens(self) -> int:
        """T, the tokens of the row."""
        return sum(self.segments.lengths)

    def replace(self, **changes: object) -> PackedBatch:
        """A copy with some fields changed."""
        return PackedBatch(**{**self.__dict__, **changes})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch on another device; Lightning calls this."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in self.__dict__.items()
            if isinstance(value, Tensor)
        }
        return self.replace(**moved, segments=Segments(self.segments.lengths, self.segments.parents))


def pack(examples: Sequence[Example], indices: Sequence[int] | None = None) -> PackedBatch:
    """Lays examples end to end.

    Args:
        examples: At least one.
        indices: Row numbers to remember with the examples; 0, 1, ... when left out. An index below 0 marks a
            filler: its targets keep their place but weigh nothing.

    Returns:
        The micro-batch, on the CPU.

    Raises:
        ValueError: If the first token of an example has a weight.
    """
    numbers = tuple(range(len(examples)) if indices is None else (int(index) for index in indices))
    if len(numbers) != len(examples):
        raise ValueError(f"each example needs an index, got {len(examples)} examples and {len(numbers)} indices")
    if any(example.weights[0] for example in examples):
        raise ValueError("the first token of an example cannot be trained: nothing predicts it")
    layout = _Layout(examples)
    ids = _joined([example.input_ids for example in examples], np.int64)
    weights = _joined([example.weights for example in examples], None)
    if len(weights) != len(ids):
        raise ValueError(f"each token needs a weight, got {len(ids)} tokens and {len(weights)} weights")
    owners = np.repeat(np.arange(len(layout.lengths)), layout.lengths)
    starts = np.cumsum([0, *layout.lengths[:-1]])
    (places,) = np.nonzero(weights)
    before = places - 1  # but the first token of an answer is predicted by the last one of its prompt
    opens = places == starts[owners[places]]
    before[opens] = [starts[p] + layout.lengths[p] - 1 for p in np.asarray(layout.parents)[owners[places[opens]]]]
    shifts = [layout.lengths[parent] if parent >= 0 else 0 for parent in layout.parents]
    numbers = tuple(numbers[example] for example in layout.examples)
    real = np.asarray(numbers) >= 0
    return PackedBatch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(np.arange(len(ids)) - (starts - shifts)[owners])[None],
        segments=Segments(layout.lengths, layout.parents),
        target_positions=torch.from_numpy(before),
        target_ids=torch.from_numpy(ids[places]),
        target_weights=torch.from_numpy((weights[places] * real[owners[places]]).astype(np.float32)),
        target_segments=torch.from_numpy(owners[places]),
        examples=numbers,
        pairs=tuple(
            pair if numbers[max(pair.better, pair.worse)] >= 0 else pair._replace(weight=0.0) for pair in layout.pairs
        ),
    )


class _Layout:
    """The segments of some examples: one an example, or one for the prompt and one for each of its answers.

    Attributes:
        lengths: Tokens of each segment.
        parents: The segment each goes on from, or -1.
        examples: The example each belongs to.
        pairs: The pairs of all examples, by segment.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self.lengths: list[int] = []
        self.parents: list[int] = []
        self.examples: list[int] = []
        self.pairs: list[Pair] = []
        for number, example in enumerate(examples):
            answers = () if example.answers is None else example.answers.lengths
            first = len(self.lengths)
            self.lengths += [len(example.input_ids) - sum(answers), *answers]
            self.parents += [-1, *[first] * len(answers)]
            self.examples += [number] * (1 + len(answers))
            if example.answers is not None:
                self.pairs += [_moved(pair, first + 1) for pair in example.answers.pairs]


def _moved(pair: Pair, by: int) -> Pair:
    """A pair whose numbers begin at another one."""
    better, worse = (place + by if place >= 0 else -1 for place in pair[:2])
    return pair._replace(better=better, worse=worse)


def _joined(parts: Sequence[Any], dtype: Any) -> np.ndarray:
    """Lists or arrays end to end, always as a copy."""
    return np.concatenate([np.asarray(part, dtype=dtype) for part in parts]).astype(dtype, copy=False)


class StepTotals(NamedTuple):
    """What one optimizer step holds over all micro-batches and ranks; planned ahead, the same on every rank.

    Attributes:
        weight: Sum of the target weights: the gradient of the step is the sum over its targets divided by this.
        targets: Trained tokens.
        tokens: All tokens.
        examples: Examples.
    """

    weight: float
    targets: int
    tokens: int
    examples: int


class StepBatch:
    """All micro-batches of one optimizer step on one rank: what the training loader yields.

    So one batch of Lightning is one optimizer step; `max_steps`, checkpoints and callbacks keep their plain meaning.

    Attributes:
        micro_batches: At least one; every rank has the same number.
        totals: What the step holds over all ranks.
    """

    def __init__(self, micro_batches: Sequence[PackedBatch], totals: StepTotals) -> None:
        self.micro_batches = list(micro_batches)
        self.totals = totals

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StepBatch:
        """The step on another device; Lightning calls this."""
        return StepBatch([batch.to(device, non_blocking) for batch in self.micro_batches], self.totals)
