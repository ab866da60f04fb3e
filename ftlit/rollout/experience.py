"""The answers of a rollout with all that is known of each token, and how they are cut into optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ftlit.batch import PackedBatch, Segments, StepTotals

Micro = tuple[int, ...]
"""Numbers of the answers of a micro-batch; an empty one is filled with something that counts nothing."""


class Experience:
    """What one rank drew in one rollout.

    Answers are numbered prompt by prompt. Tensors of tokens are flat, `[N]`, answer by answer.

    Args:
        prompts: Tokens of each prompt.
        rows: Number of each prompt's row in the data set.
        answers: Tokens of each answer, its end token included.
        owners: The prompt of each answer.
        number: Which rollout of the run, 0 is the first.
        first_step: Optimizer steps taken before its first.
        trained: Tokens trained in the run before its first step, on all ranks.
        steps: For each minibatch of the rollout its micro-batches on this rank; as many on every rank.
        totals: For each minibatch what it holds on all ranks.
        tokens: Tensors of tokens by name, each `[N]`, on the CPU: `old_logps`, `reference`, `advantages`, ...
        cut: Whether the rest of it is passed over.
        masked: Numbers of the answers that are not trained.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        answers: Sequence[Sequence[int]],
        owners: Sequence[int],
        *,
        number: int = 0,
        first_step: int = 0,
        trained: int = 0,
        steps: Sequence[Sequence[Micro]] = (),
        totals: Sequence[StepTotals] = (),
        tokens: Mapping[str, Tensor] | None = None,
        cut: bool = False,
        masked: Sequence[int] = (),
    ) -> None:
        self.number, self.first_step, self.trained, self.cut = number, first_step, trained, cut
        self.prompts, self.rows = [list(prompt) for prompt in prompts], list(rows)
        self.answers, self.owners = [list(answer) for answer in answers], list(owners)
        self.steps = [[tuple(micro) for micro in step] for step in steps]
        self.totals = [StepTotals(*total) for total in totals]
        self.tokens, self.masked = dict(tokens or {}), frozenset(masked)
        self._starts = list(accumulate((len(answer) for answer in self.answers), initial=0))

    @property
    def lengths(self) -> Tensor:
        """Tokens of each answer, int64 `[S]`."""
        return torch.tensor([len(answer) for answer in self.answers], dtype=torch.int64)

    @property
    def token_owners(self) -> Tensor:
        """The answer of each token, int64 `[N]`."""
        return torch.arange(len(self.answers)).repeat_interleave(self.lengths)

    @property
    def num_tokens(self) -> int:
        """N, the tokens of all answers."""
        return self._starts[-1]

    def places(self, micro: Micro) -> Tensor:
        """Where the tokens of a micro-batch lie in the flat tensors, int64, in the order of its targets."""
        stretches = [torch.arange(self._starts[one], self._starts[one + 1]) for one in micro]
        return torch.cat(stretches) if stretches else torch.zeros(0, dtype=torch.int64)

    def pack(self, micro: Micro) -> PackedBatch:
        """A micro-batch: each prompt once, its answers as branches of it, every token of an answer a target.

        The targets of a masked answer weigh nothing.
        """
        if not micro:
            return _filler(self.prompts[0] if self.prompts else [0], self.tokens)
        places = self.places(micro)
        packed = branches(
            [self.prompts[self.owners[one]] for one in micro],
            [self.answers[one] for one in micro],
            [self.owners[one] for one in micro],
            [self.rows[self.owners[one]] for one in micro],
        )
        weights = [torch.full((len(self.answers[one]),), float(one not in self.masked)) for one in micro]
        extras = {name: values[places] for name, values in self.tokens.items()}
        return packed.replace(target_weights=torch.cat(weights), extras=extras)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as numbers, lists and tensors."""
        return {
            "number": self.number,
            "first_step": self.first_step,
            "trained": self.trained,
            "prompts": self.prompts,
            "rows": self.rows,
            "answers": self.answers,
            "owners": self.owners,
            "steps": [[list(micro) for micro in step] for step in self.steps],
            "totals": [list(total) for total in self.totals],
            "tokens": self.tokens,
            "cut": self.cut,
            "masked": sorted(self.masked),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Experience:
        """The same again."""
        return cls(**state)


def branches(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    owners: Sequence[int],
    rows: Sequence[int],
) -> PackedBatch:
    """Packs answers as branches of their prompts; neighbours with one prompt share it.

    Args:
        prompts: The prompt of each answer, at least one token.
        answers: Tokens of each answer, at least one.
        owners: A number for each answer's prompt; equal neighbours have the same prompt.
        rows: Row numbers to remember.

    Returns:
        The micro-batch on the CPU. Every token of an answer is a target of weight 1; the first is predicted by the last
        of the prompt. The last token of an answer is a target only: it predicts nothing.
    """
    ids: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    parents: list[int] = []
    examples: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    segments: list[int] = []
    root, known = -1, None
    for prompt, answer, owner, row in zip(prompts, answers, owners, rows, strict=True):
        if owner != known:
            known, root, last = owner, len(lengths), len(ids) + len(prompt) - 1
            ids += prompt
            positions += range(len(prompt))
            lengths.append(len(prompt))
            parents.append(-1)
            examples.append(row)
        fed = answer[:-1] or answer  # a segment cannot be empty
        places += [last, *range(len(ids), len(ids) + len(answer) - 1)]
        targets += answer
        segments += [len(lengths)] * len(answer)
        ids += fed
        positions += range(len(prompt), len(prompt) + len(fed))
        lengths.append(len(fed))
        parents.append(root)
        examples.append(row)
    return PackedBatch(
        input_ids=torch.tensor(ids)[None],
        position_ids=torch.tensor(positions)[None],
        segments=Segments(lengths, parents),
        target_positions=torch.tensor(places),
        target_ids=torch.tensor(targets),
        target_weights=torch.ones(len(targets)),
        target_segments=torch.tensor(segments),
        examples=tuple(examples),
    )


def _filler(prompt: Sequence[int], tokens: Mapping[str, Tensor]) -> PackedBatch:
    """Something to run where a rank has nothing left: its one target weighs nothing."""
    batch = branches([prompt[:1]], [[prompt[0]]], [0], [-1])
    extras = {name: values.new_zeros(1) for name, values in tokens.items()}
    return batch.replace(target_weights=torch.zeros(1), extras=extras)


def cut(owners: Sequence[int], prompts: Sequence[int], answers: Sequence[int], max_tokens: int | None) -> list[Micro]:
    """Cuts answers into few micro-batches of even size; answers to one prompt stay together where they fit.

    Args:
        owners: The prompt of each answer.
        prompts: Tokens of each prompt.
        answers: Tokens of each answer; the numbers in the result are places in this list.
        max_tokens: Most tokens of a micro-batch; one answer with its prompt is always allowed. None: no bound.

    Returns:
        Numbers of the answers of each micro-batch; at least one micro-batch, which may be empty.
    """
    units: list[tuple[int, list[int]]] = []  # tokens, answers to one prompt
    known = None
    for number, (owner, length) in enumerate(zip(owners, answers, strict=True)):
        if owner == known and (max_tokens is None or units[-1][0] + length <= max_tokens):
            units[-1] = (units[-1][0] + length, [*units[-1][1], number])
        else:
            units.append((prompts[owner] + length, [number]))
        known = owner
    units.sort(key=lambda unit: (-unit[0], unit[1]))
    bins = 1 if max_tokens is None else max(1, -(-sum(tokens for tokens, _ in units) // max_tokens))
    while True:
        loads = [0] * bins
        filled: list[list[list[int]]] = [[] for _ in range(bins)]
        for tokens, unit in units:
            place = loads.index(min(loads))
            filled[place].append(unit)
            loads[place] += tokens
        if max_tokens is None or bins >= len(units):
            break
        if all(len(part) < 2 or load <= max_tokens for part, load in zip(filled, loads, strict=True)):
            break
        bins += 1
    return [tuple(number for unit in part for number in unit) for part in filled]


__all__ = ["Experience", "Micro", "branches", "cut"]
