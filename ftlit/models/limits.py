"""What a model has places for: the tokens of its embedding, and the positions of a learned table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ftlit.batch import Example
from ftlit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTRIBUTE = "_ftlit_positions"


class PositionTables(TorchDispatchMode):
    """Context that finds the tables which are read by position: their rows go along with the positions of a batch.

    Args:
        positions: Positions of the batch that is run inside; they must not all be equal.

    Attributes:
        longest: Tokens of the longest example that all tables have places for; None: no table was read.
    """

    def __init__(self, positions: Tensor) -> None:
        super().__init__()
        self.positions = positions.reshape(-1)
        self.longest: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Looks at what an embedding looks up."""
        if func is torch.ops.aten.embedding.default:
            table, rows = args[0], args[1].reshape(-1)
            shifts = rows - self.positions if rows.shape == self.positions.shape else rows[:0]
            if len(shifts) and bool((shifts == shifts[0]).all()):
                places = table.shape[0] - int(shifts[0])
                self.longest = places if self.longest is None else min(self.longest, places)
        return func(*args, **(kwargs or {}))


def remember_positions(lm: PreTrainedModel, tables: PositionTables) -> None:
    """Keeps what was found when a model was checked."""
    setattr(lm, _ATTRIBUTE, tables.longest)


def longest_learned(lm: PreTrainedModel) -> int | None:
    """Tokens of the longest example that the model has learned positions for; None: any, or it was never checked."""
    return getattr(lm, _ATTRIBUTE, None)


def check_token(lm: PreTrainedModel, largest: int, where: str) -> None:
    """Refuses a token that the model has no embedding for.

    Args:
        lm: The model.
        largest: The largest token number.
        where: What it is of, for the message.

    Raises:
        ConfigError: If it is too large.
    """
    tokens = lm.get_input_embeddings().weight.shape[0]
    if largest >= tokens:
        raise ConfigError(
            f"{where} has the token number {largest}, and {type(lm).__name__} embeds {tokens} tokens: the tokenizer "
            "knows more than the model; give the tokenizer that the model was trained with, or grow its embedding "
            "(resize_token_embeddings) and save it."
        )


def check_length(lm: PreTrainedModel, tokens: int, where: str, virtual: int = 0, new: int = 0) -> None:
    """Refuses a length that the model has no learned positions for.

    Args:
        lm: The model.
        tokens: Tokens of an example or a prompt.
        where: What it is, for the message.
        virtual: Virtual tokens before it.
        new: Most tokens that are drawn after it.

    Raises:
        ConfigError: If it is too long.
    """
    places = longest_learned(lm)
    if places is None or tokens + virtual + new <= places:
        return
    more = (f" and {virtual} virtual ones" if virtual else "") + (f" and up to {new} new ones" if new else "")
    room = places - virtual - new
    do = f"set data.max_length to at most {room}" if room > 0 else "lower max_new_tokens or num_virtual_tokens"
    raise ConfigError(
        f"{where} has {tokens} tokens{more}, and {type(lm).__name__} has learned {places} positions; {do}."
    )


def check_examples(lm: PreTrainedModel, examples: Sequence[Example], name: str, virtual: int = 0) -> None:
    """Refuses examples with tokens or positions that the model has no places for.

    Args:
        lm: The model.
        examples: The examples; flat arrays are read at once.
        name: What they are, for the message.
        virtual: Virtual tokens before each.

    Raises:
        ConfigError: Naming the first.
    """
    tokens, places = lm.get_input_embeddings().weight.shape[0], longest_learned(lm)
    lengths = _lengths(examples)
    far = np.flatnonzero(lengths + virtual > places) if places is not None else ()
    for number in map(int, far):
        check_length(lm, _longest_line(examples[number]), f"{name}, example {number + 1},", virtual)
    if not all(_below(ids, tokens) for ids in _arrays(examples)):
        for number, example in enumerate(examples):
            check_token(lm, int(np.max(example.input_ids)), f"{name}, example {number + 1},")


def _lengths(examples: Any) -> np.ndarray:
    if hasattr(examples, "measures"):
        return np.asarray(examples.measures().lengths)
    return np.asarray([len(example.input_ids) for example in examples], dtype=np.int64)


def _longest_line(example: Example) -> int:
    """Tokens of an example; of a comparison those of the prompt and its longest answer."""
    lengths = getattr(example.answers, "lengths", None) or (0,)
    return len(example.input_ids) - sum(lengths) + max(lengths)


def _arrays(examples: Any) -> Iterable[np.ndarray]:
    """The token numbers in as few arrays as can be; an array may hold some that no example has."""
    parts = getattr(examples, "parts", [examples])
    for part in parts:
        part = getattr(part, "pieces", part)
        if hasattr(part, "ids"):
            yield part.ids
        else:
            yield from (np.asarray(example.input_ids) for example in part)


def _below(ids: np.ndarray, tokens: int) -> bool:
    return len(ids) == 0 or int(ids.max()) < tokens


__all__ = ["PositionTables", "check_examples", "check_length", "check_token", "longest_learned", "remember_positions"]
