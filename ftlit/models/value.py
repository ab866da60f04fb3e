"""What reward is expected from a token on: a head on the policy's states, or a model of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from ftlit.batch import PackedBatch
from ftlit.errors import ConfigError
from ftlit.models.heads import ScalarPolicy, bidirectional, reads_first
from ftlit.models.load import Classifier, load_classifier, load_tokenizer
from ftlit.models.policy import disable_dropout, recompute_activations
from ftlit.objectives.scores import TokenScores
from ftlit.peft.base import PEFTStrategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ValueHead(nn.Module):
    """A linear layer on the hidden states of the policy; it starts at 0, and PPO sets its bias at the first rollout.

    Args:
        width: D, the policy's hidden size.
        detached: Whether its loss leaves the policy alone.
        dtype: Type of its weights: float32 as a rule.
    """

    def __init__(self, width: int, detached: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.detached = detached

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves, but casts to no narrower type: small steps from the level of the rewards would be rounded away."""

        def moved(value: Tensor) -> Tensor:
            now = fn(value)
            return value.to(now.device) if now.element_size() < value.element_size() else now

        return super()._apply(moved, recurse)

    @property
    def new(self) -> bool:
        """Whether it has learned nothing and was not told where to start."""
        return not (self.weight.any() or self.bias.any())

    @torch.no_grad()
    def start_at(self, level: Tensor, values: Tensor) -> Tensor:
        """Makes a new head say the same of every token.

        Args:
            level: What.
            values: What it said before, zeros, `[N]`.

        Returns:
            What it says now, `[N]`.
        """
        self.bias.fill_(float(level))
        return values + self.bias.to(values)

    def forward(self, batch: PackedBatch, scores: TokenScores) -> Tensor:
        """The value before each token.

        Args:
            batch: The micro-batch; not read.
            scores: What the policy said of its targets, with their `states`.

        Returns:
            `[N]`, in the type of its weights.
        """
        assert scores.states is not None
        states = scores.states.detach() if self.detached else scores.states
        with torch.autocast(states.device.type, enabled=False):
            return F.linear(states.to(self.weight.dtype), self.weight[None], self.bias)[:, 0]


class ValueModel(ScalarPolicy):
    """A model of its own beside the policy: a causal sequence classifier with one output, read before each token.

    Args:
        loaded: The classifier, prepared. A head that is new starts at 0, that of a reward model stays.
        strategy: What is trained of its trunk; the head always is.

    Raises:
        ConfigError: If it reads whole texts only, or the strategy cannot be used with it.
    """

    def __init__(self, loaded: Classifier, strategy: PEFTStrategy) -> None:
        if reads_first(loaded.lm) or bidirectional(loaded.lm):
            raise ConfigError(
                f"model.value_model: {type(loaded.lm).__name__} sees what comes after a token; give a causal model."
            )
        super().__init__(loaded.lm, strategy, loaded.new)
        with torch.no_grad():
            for name in loaded.new:
                for parameter in loaded.lm.get_submodule(name).parameters():
                    parameter.zero_()

    @property
    def num_trained(self) -> int:
        """Parameters that are trained."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    @override
    def forward(self, batch: PackedBatch, scores: TokenScores) -> Tensor:  # type: ignore[override]
        """The value before each token.

        Args:
            batch: The micro-batch.
            scores: What the policy said of its targets; not read.

        Returns:
            `[N]`, at least float32.
        """
        self._check_length(batch.segments)
        return self.read(batch)[:, 0]


def new_head(lm: PreTrainedModel, detached: bool = False) -> ValueHead:
    """A value head for a language model, at least float32.

    Args:
        lm: The policy's model.
        detached: Whether its loss leaves the policy alone.
    """
    return ValueHead(lm.config.get_text_config().hidden_size, detached, torch.promote_types(lm.dtype, torch.float32))


def load_value_model(
    source: str | PreTrainedModel,
    strategy: PEFTStrategy,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> ValueModel:
    """A value model from a language model or a reward model, without dropout.

    Args:
        source: Hub id, folder, or a model built in Python.
        strategy: What is trained of its trunk.
        tokenizer: The policy's.
        dtype: Type of its weights.
        checkpointing: Recompute its activations in backward.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ConfigError: If it cannot be opened, or reads other tokens than the policy.
    """
    if isinstance(source, str) and load_tokenizer(source, trust_remote_code).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"model.value_model: {source} has another tokenizer than the policy, whose tokens it reads.")
    loaded = load_classifier(source, ["value"], dtype, trust_remote_code=trust_remote_code)
    if checkpointing:
        recompute_activations(loaded.lm)
    critic = ValueModel(loaded, strategy)
    disable_dropout(critic)
    return critic


__all__ = ["ValueHead", "ValueModel", "load_value_model", "new_head"]
