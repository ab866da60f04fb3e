"""The one batch type that every stage runs on: examples end to end in one row, no padding anywhere.

Shape legend, used in the whole package:
    T tokens of a micro-batch, S segments (one an example), N targets (trained tokens),
    D width, V vocabulary, H heads, P virtual tokens of a prefix or a prompt.

These are plain classes, not dataclasses or named tuples, on purpose: Lightning's precision plugins walk into those and
would cast the float weights of the targets to the precision of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
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

    @property
    def longest(self) -> int:
        """Most tokens that any example has: of a segment, its ancestors and itself."""
        return max(
            length + sum(self.lengths[parent] for parent in self.ancestors(number))
            for number, length in enumerate(self.lengths)
        )

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
        sources: For each segment where its row comes from: 0 are the rows of the stage, 1 and more those that controls
            added (see `ftlit.data.added`).
        inputs_embeds: Embedded tokens `[1, T, D]` when a strategy adds virtual tokens, else None.
        extras: What a stage knows of each target besides, by name, each `[N]`.
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
        sources: tuple[int, ...] = (),
        inputs_embeds: Tensor | None = None,
        extras: Mapping[str, Tensor] | None = None,
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
        self.sources = sources or (0,) * len(segments)
        self.inputs_embeds = inputs_embeds
        self.extras = dict(extras or {})

    @property
    def num_tokens(self) -> int:
        """T, the tokens of the row."""
        return sum(self.segments.lengths)

    def replace(self, **changes: object) -> PackedBatch:
        """A copy with some fields changed."""
        return PackedBatch(**{**self.__dict__, **changes})

    @property
    def target_sources(self) -> Tensor:
        """Where the row of each target comes from, int64 `[N]`."""
        return torch.tensor(self.sources, device=self.target_segments.device)[self.target_segments]

    def select(self, chosen: Tensor) -> PackedBatch:
        """The same row with only some of its targets.

        Args:
            chosen: Which, bool `[N]`.
        """
        names = ("target_positions", "target_ids", "target_weights", "target_segments")
        extras = {name: value[chosen] for name, value in self.extras.items()}
        return self.replace(**{name: getattr(self, name)[chosen] for name in names}, extras=extras)

    def only(self, sources: Collection[int]) -> PackedBatch:
        """The segments that come from some sources, with their targets.

        Args:
            sources: Which; the batch itself is returned where it has no others.

        Raises:
            ValueError: If none is left, or one has a parent that is not.
        """
        keep = [number for number, source in enumerate(self.sources) if source in sources]
        if len(keep) == len(self.segments):
            return self
        if not keep:
            raise ValueError(f"the batch has no segment of the sources {sorted(sources)}")
        new = {old: number for number, old in enumerate(keep)}
        segments, device = self.segments, self.input_ids.device
        parents = [segments.parents[old] for old in keep]
        if any(parent >= 0 and parent not in new for parent in parents):
            raise ValueError("a segment of these sources has a parent of another source")
        ends = [(segments.offsets[old], segments.offsets[old] + segments.lengths[old]) for old in keep]
        taken = torch.cat([torch.arange(start, stop, device="cpu") for start, stop in ends]).to(device)  # one transfer
        place = torch.zeros(self.num_tokens, dtype=torch.int64, device=device)
        place[taken] = torch.arange(len(taken), device=device)
        renumber = torch.tensor([new.get(old, -1) for old in range(len(segments))], device=device)
        left = self.select(renumber[self.target_segments] >= 0)
        return left.replace(
            input_ids=self.input_ids[:, taken],
            position_ids=self.position_ids[:, taken],
            segments=Segments([segments.lengths[old] for old in keep], [new.get(parent, -1) for parent in parents]),
            target_positions=place[left.target_positions],
            target_segments=renumber[left.target_segments],
            examples=tuple(self.examples[old] for old in keep),
            sources=tuple(self.sources[old] for old in keep),
            pairs=tuple(
                pair._replace(better=new.get(pair.better, -1), worse=new.get(pair.worse, -1))
                for pair in self.pairs
                if max(pair.better, pair.worse) in new
            ),
            inputs_embeds=None if self.inputs_embeds is None else self.inputs_embeds[:, taken],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch on another device; Lightning calls this."""
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in self.__dict__.items()
            if isinstance(value, Tensor)
        }
        extras = {name: value.to(device, non_blocking=non_blocking) for name, value in self.extras.items()}
        return self.replace(**moved, extras=extras, segments=Segments(self.segments.lengths, self.segments.parents))


def pack(examples: Sequence[Example], indices: Sequence[int] | None = None, sources: Sequence[int] = ()) -> PackedBatch:
    """Lays examples end to end.

    Args:
        examples: At least one.
        indices: Row numbers to remember with the examples; 0, 1, ... when left out. An index below 0 marks a
            filler: its targets keep their place but weigh nothing.
        sources: Where each comes from; the stage's own rows (0) when left out.

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
        sources=tuple(sources[example] for example in layout.examples) if sources else (),
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

    All of them count the stage's own rows, not those that a control added.
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
        own: How many of the micro-batches hold rows of the stage itself; the others only those that controls added.
            The same on every rank.
    """

    def __init__(self, micro_batches: Sequence[PackedBatch], totals: StepTotals, own: int | None = None) -> None:
        self.micro_batches = list(micro_batches)
        self.totals = totals
        self.own = len(self.micro_batches) if own is None else own

    def only(self, sources: Collection[int]) -> StepBatch:
        """The step without the rows of other sources; what is left is cut and ordered as if they had never been there.

        Args:
            sources: Which to keep; 0, the stage's own, is always kept.
        """
        keep = {0, *sources}
        left = [
            micro.only(keep)
            for number, micro in enumerate(self.micro_batches)
            if number < self.own or keep & set(micro.sources)
        ]
        return StepBatch(left, self.totals, self.own)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StepBatch:
        """The step on another device; Lightning calls this."""
        return StepBatch([batch.to(device, non_blocking) for batch in self.micro_batches], self.totals, self.own)
