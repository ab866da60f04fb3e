"""Who draws the answers of a rollout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from typing_extensions import override

from ftlit.data.tokenizing import Progress
from ftlit.errors import ConfigError
from ftlit.peft.base import PEFTStrategy
from ftlit.rollout.generate import Answer, answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Sampling(NamedTuple):
    """How answers are drawn.

    Attributes:
        num_answers: Answers to each prompt.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 takes the likeliest token each time.
        top_p: Sample from the likeliest tokens that together have this probability.
        top_k: Sample from so many of the likeliest; None: from all.
        min_p: Sample from tokens of at least this share of the likeliest one's probability.
        stop: Texts that end an answer with the token that completes them.
    """

    num_answers: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    def check(self, who: str) -> None:
        """Checks that the numbers are in range.

        Args:
            who: What they are settings of.

        Raises:
            ConfigError: If one is not.
        """
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"{who} needs temperature >= 0 and top_p in (0, 1], got {self.temperature} and {self.top_p}."
            )
        if (self.top_k is not None and self.top_k < 1) or not 0 <= self.min_p <= 1:
            raise ConfigError(
                f"{who} needs top_k of at least 1 (or none) and min_p in [0, 1], got {self.top_k} and {self.min_p}."
            )
        if not all(self.stop):
            raise ConfigError(f"{who}.stop must be texts of at least one character, got {list(self.stop)}.")

    @property
    def greedy(self) -> Sampling:
        """One answer, the likeliest token each time."""
        return self._replace(num_answers=1, temperature=0.0)


class Generator(ABC):
    """Answers prompts with the policy as it is now.

    Subclass it to let another engine draw: it is handed the model and its strategy each time, and keeps its own copy of
    the weights up to date by them. The log-probabilities that the update compares with are never the engine's: the
    stage scores the answers itself, on the path that the update takes.
    """

    @abstractmethod
    def __call__(
        self,
        lm: PreTrainedModel,
        strategy: PEFTStrategy,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        quiet: bool = False,
    ) -> list[Answer]:
        """Answers some prompts.

        Args:
            lm: The model, left as it was.
            strategy: What is applied to it.
            tokenizer: Its tokenizer.
            prompts: Tokens of each prompt.
            seeds: Seed of each answer: `num_answers` for the first prompt, then as many for the second.
            sampling: How to draw.
            quiet: Whether to show no progress.

        Returns:
            One answer a seed, in that order.
        """


class BatchedGenerator(Generator):
    """ftlit's own: batches of prompts of similar length, which answers leave when they end.

    Args:
        batch_size: Most answers at once.
        max_tokens: Most tokens at once, prompts and answers with padding: bounds memory.
        merge: Whether an adapter that can be folded into the weights is, while answers are drawn: into a copy of the
            adapted weights, and the originals are put back as they were. Measured with rank 8 on a CPU, drawing takes
            about 5 % less time (short answers do not pay for the merging); it needs memory for the copy. A model in
            half precision is never merged: rounding the sum would lose an adapter that has just begun to learn.

    Raises:
        ConfigError: If a number is not positive.
    """

    def __init__(self, batch_size: int = 64, max_tokens: int = 32768, merge: bool = True) -> None:
        if batch_size < 1 or max_tokens < 1:
            raise ConfigError(
                f"BatchedGenerator's batch_size and max_tokens must be at least 1, got {batch_size} and {max_tokens}."
            )
        self.batch_size, self.max_tokens, self.merge = batch_size, max_tokens, merge

    @override
    def __call__(
        self,
        lm: PreTrainedModel,
        strategy: PEFTStrategy,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        quiet: bool = False,
    ) -> list[Answer]:
        progress = Progress(len(seeds), "drawing answers", quiet)
        folds = self.merge and strategy.mergeable and not strategy.trains_base and lm.dtype.itemsize >= 4
        with merged(lm, strategy) if folds else nullcontext():
            answers = answer(
                lm, None if folds else strategy, tokenizer, prompts,
                num_answers=sampling.num_answers, max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
                min_p=sampling.min_p, stop=sampling.stop, seeds=seeds,
                batch_size=self.batch_size, max_tokens=self.max_tokens, done=progress.update,
            )  # fmt: skip
        progress.close()
        return answers


@contextmanager
def merged(lm: PreTrainedModel, strategy: PEFTStrategy) -> Iterator[None]:
    """Context in which the adapter lies in the weights, and costs nothing.

    The weights are those of the start plus the strategy's changes, in new tensors; the original parameters come back
    untouched: nothing is ever subtracted.

    Args:
        lm: The model.
        strategy: A strategy whose `changes` say all that it does to the model.
    """
    with torch.no_grad(), torch.autocast(lm.device.type, enabled=False):  # which would round the changes
        changes = {change.name: change.materialize().detach() for change in strategy.changes(lm)}
    with strategy.start(lm):
        originals: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for name in list(changes):
                delta = changes.pop(name)  # a change is let go when it lies in the weights
                path, _, own = name.rpartition(".")
                module = lm.get_submodule(path)
                original = module.get_parameter(own)
                value = original.detach().to(delta.dtype) + delta
                originals.append((module, own, original))
                setattr(module, own, nn.Parameter(value.to(original.dtype), requires_grad=False))
                del delta, value
            yield
        finally:
            for module, own, original in originals:
                setattr(module, own, original)


__all__ = ["BatchedGenerator", "Generator", "Sampling", "merged"]
