"""The contract of a parameter-efficient strategy, and the change it makes to each weight."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from ftlit.batch import PackedBatch
from ftlit.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MERGE_IT_THERE = "merge it with the PEFT library (merge_and_unload, save_pretrained) and give the merged model"
"""What to do with an adapter that ftlit cannot read, and the PEFT library can."""


class Change(ABC):
    """How one weight of the model differs from what it was when the run started.

    Drift, penalties, merging and interpolation are derived from this and nothing else.

    Attributes:
        name: Name of the weight in the unadapted model, such as `model.layers.0.self_attn.q_proj.weight`.
        shape: Its shape.
        input_dim: Which dimension of the weight is the layer's input: 1 for `nn.Linear`, 0 for Conv1D and embeddings.
    """

    name: str
    shape: torch.Size
    input_dim: int = 1

    @property
    @abstractmethod
    def rank(self) -> int:
        """An upper bound of the rank of the change (its number of entries where it is not a matrix)."""

    @abstractmethod
    def materialize(self) -> Tensor:
        """The change as a dense tensor of `shape`; carries the gradient to the trained parameters."""

    @abstractmethod
    def sq_norm(self, second_moment: Tensor | None = None) -> Tensor:
        """Squared Frobenius norm of the change, differentiable, at least float32.

        Args:
            second_moment: `C = E[x x^T]` of the layer's input, `[in, in]`; then `tr(change C change^T)` (with the
                change as `[out, in]`), the mean squared size of what it adds to the layer's output, is returned.
        """


class DenseChange(Change):
    """A change known entry by entry.

    Args:
        name: Name of the weight.
        delta: The change.
        input_dim: Which dimension of the weight is the layer's input.
    """

    def __init__(self, name: str, delta: Tensor, input_dim: int = 1) -> None:
        self.name, self.shape, self.delta, self.input_dim = name, delta.shape, delta, input_dim

    @override
    @property
    def rank(self) -> int:
        return min(self.shape) if len(self.shape) == 2 else self.shape.numel()

    @override
    def materialize(self) -> Tensor:
        return self.delta

    @override
    def sq_norm(self, second_moment: Tensor | None = None) -> Tensor:
        delta = self.delta.to(torch.promote_types(self.delta.dtype, torch.float32))
        if second_moment is None:
            return delta.square().sum()
        delta = delta if self.input_dim == 1 else delta.t()
        return (delta @ second_moment.to(delta.dtype) * delta).sum()


class LowRankChange(Change):
    """`scale * up @ down`, never built for its norm: `||s B A||^2 = s^2 sum((A A^T) * (B^T B))`, an `r x r` product.

    Args:
        name: Name of the weight.
        down: A, `[r, in]` (`[r, out]` where `input_dim` is 0).
        up: B, `[out, r]` (`[in, r]` where `input_dim` is 0).
        scale: Factor on the product.
        input_dim: Which dimension of the weight is the layer's input.
    """

    def __init__(self, name: str, down: Tensor, up: Tensor, scale: float, input_dim: int = 1) -> None:
        self.name, self.down, self.up, self.scale, self.input_dim = name, down, up, scale, input_dim
        self.shape = torch.Size((up.shape[0], down.shape[1]))

    @override
    @property
    def rank(self) -> int:
        return min(self.down.shape[0], *self.shape)

    @override
    def materialize(self) -> Tensor:
        return self.scale * (self.up @ self.down)

    @override
    def sq_norm(self, second_moment: Tensor | None = None) -> Tensor:
        wide = torch.promote_types(torch.promote_types(self.down.dtype, self.up.dtype), torch.float32)
        down, up = self.down.to(wide), self.up.to(wide).t()
        seen_down, seen_up = down, up
        if second_moment is not None and self.input_dim == 0:
            seen_up = up @ second_moment.to(wide)
        elif second_moment is not None:
            seen_down = down @ second_moment.to(wide)
        return self.scale**2 * ((seen_down @ down.t()) * (seen_up @ up.t())).sum()


Alpha = float | Callable[[str], float]
"""How far along the way from the start: one number, or one for each parameter by its name in the model."""


@torch.no_grad()
def move(parameter: Tensor, start: Tensor, alpha: float) -> None:
    """Puts a parameter at `start + alpha (parameter - start)`; exactly at either end where alpha is 0 or 1.

    Args:
        parameter: Changed in place.
        start: Its value at the start, on any device and of any type.
        alpha: The share of the way that is kept.
    """
    if alpha == 1:
        return
    wide = torch.promote_types(parameter.dtype, torch.float32)
    first = start.to(parameter.device, wide)
    parameter.copy_(torch.lerp(first, parameter.to(wide), alpha))


def input_dim(module: nn.Module, name: str) -> int:
    """Which dimension of a parameter is its layer's input.

    Args:
        module: The module that holds it.
        name: Its name in the module.
    """
    return 0 if name == "weight" and isinstance(module, Conv1D | nn.Embedding) else 1


class PEFTStrategy(ABC):
    """What is trained, and how it enters the model.

    A strategy holds settings, not weights: its parameters live in the model, so that every Lightning strategy can
    shard, move and save them. Subclass it in a file of your own and name the class in the YAML; `apply`, `changes` and
    `start` are what every strategy must have. `ftlit.testing.PEFTStrategySuite` tests a subclass in four lines.
    """

    peft_type: ClassVar[str | None] = None
    """The PEFT library's name of the method in `adapter_config.json`; None where that library has no such method."""

    mergeable: ClassVar[bool] = True
    """Whether the adapter can be folded into the weights of the model."""

    pads_prompts: ClassVar[bool] = True
    """Whether prompts of unequal length may be padded into one batch of `generation_kwargs`."""

    trains_base: ClassVar[bool] = False
    """Whether weights of the model itself are trained: they are then loaded in float32 under mixed precision."""

    brought: tuple[str, ...] = ()
    """Names of frozen parameters that came with an adapter, such as the embedding of a larger vocabulary."""

    start_state: Mapping[str, Tensor] | None = None
    """Of a run that goes on from an adapter the tensors it began with: its checkpoints hold them, so that it needs the
    adapter's folder no more, and its start stays what it was."""

    active: bool = True
    """False inside `start`: the strategy then adds nothing."""

    @abstractmethod
    def apply(self, model: PreTrainedModel) -> None:
        """Freezes what is not trained and adds what is.

        Args:
            model: A transformers causal language model, changed in place.

        Raises:
            ConfigError: If the model has nothing that this strategy could train.
        """

    def prepare(self, model: PreTrainedModel, batch: PackedBatch) -> PackedBatch:
        """Changes the inputs of a micro-batch (virtual tokens, shifted positions).

        Args:
            model: The model that `apply` changed.
            batch: The micro-batch.

        Returns:
            The batch to run instead; `target_positions` must still point at the states that predict the targets.
        """
        return batch

    def attention_kwargs(self, model: PreTrainedModel, batch: PackedBatch) -> dict[str, Any]:
        """Arguments that every attention layer gets for this micro-batch, such as `prefix_kv`."""
        return {}

    def generation_kwargs(self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """Arguments for `model.generate` instead of `input_ids` and `attention_mask`.

        Args:
            model: The model.
            input_ids: Left-padded prompts, int64 `[B, T]`.
            attention_mask: 1 where a prompt is, `[B, T]`.
        """
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    @abstractmethod
    def changes(self, model: PreTrainedModel) -> Iterator[Change]:
        """Yields one `Change` for each weight that training has moved; nothing for prompt-like strategies."""

    def num_changed(self, model: PreTrainedModel) -> int:
        """How many parameters of the model itself training can change (a LoRA of rank 8 changes whole matrices).

        A strategy that copies what training will overwrite changes what it trains; any other is asked for `changes`.
        """
        if type(self).remember_start is not PEFTStrategy.remember_start:
            return sum(parameter.numel() for parameter in self.trained(model).values())
        return sum(math.prod(change.shape) for change in self.changes(model))

    def remember_start(self, model: PreTrainedModel) -> None:  # noqa: B027 - optional
        """Copies what training will overwrite; whoever will ask for `start` or `changes` calls it before training.

        Calling it again does nothing.
        """

    @abstractmethod
    def start(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Context in which the model is exactly as it was when this run started."""

    def restart(self, model: PreTrainedModel, start: Mapping[str, Tensor]) -> None:  # noqa: B027 - for those that have it
        """Makes a `start_state` the start of a model to which the strategy has been applied."""

    def scaling(self, model: PreTrainedModel) -> str:
        """What the trained tensors mean besides their values, such as a factor; a run cannot go on with another."""
        return ""

    def start_settings(self, model: PreTrainedModel) -> str:
        """What the model at its start depends on besides its tensors and its config."""
        return ""

    def not_between(self, model: PreTrainedModel) -> str | None:
        """Why the model cannot stand between its start and its present state, in one sentence; None where it can."""
        return f"{type(self).__name__} has no way back to the start of which a part could be gone."

    def interpolate(self, model: PreTrainedModel, alpha: Alpha) -> None:
        """Moves every changed weight in place to `start + alpha (present - start)`.

        With alpha 1 nothing changes, with alpha 0 the model is at its start, exactly. `remember_start` must have been
        called before training. All ranks must call.

        Args:
            model: The model.
            alpha: The share of the change that is kept, or a function that gives it for the name of a parameter.

        Raises:
            ConfigError: If the strategy cannot do that (`not_between` says why).
        """
        reason = self.not_between(model)
        if reason is not None:
            raise ConfigError(reason)
        share = alpha if callable(alpha) else lambda name: alpha
        with torch.no_grad():
            self._interpolate(model, share)

    def _interpolate(self, model: PreTrainedModel, alpha: Callable[[str], float]) -> None:
        """Does it; a strategy whose `not_between` may be None must have it."""
        raise NotImplementedError

    @contextmanager
    def at(self, model: PreTrainedModel, alpha: Alpha) -> Iterator[None]:
        """Context in which the model is `alpha` of the way from its start; afterwards it is bitwise what it was.

        Args:
            model: The model.
            alpha: As in `interpolate`.

        Raises:
            ConfigError: If the strategy cannot do that.
        """
        trained = list(self.trained(model).values())
        now = [parameter.detach().clone() for parameter in trained]
        try:
            self.interpolate(model, alpha)
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(trained, now, strict=True):
                    parameter.copy_(value)

    def notes(self, model: PreTrainedModel) -> list[str]:
        """What to say of this model at the start of a run, a line each: what is left as it is, for example."""
        return []

    def lr_factor(self, name: str) -> float:
        """Factor on the learning rate of a trained parameter.

        Args:
            name: Its name in the model.
        """
        return 1.0

    def trained(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """The trained parameters by their names in the model."""
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def state(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The trained tensors under the names that the adapter file uses."""
        return {name: parameter.detach() for name, parameter in self.trained(model).items()}

    @torch.no_grad()
    def load(self, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
        """Copies a `state` back.

        Args:
            model: A model to which the strategy has been applied.
            state: What `state` returned, or the tensors of an adapter file.

        Raises:
            ConfigError: If names or shapes differ: nothing is loaded then.
        """
        own = self.state(model)
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            wrong = f"{len(missing)} tensors are missing" if missing else f"{len(unknown)} tensors have no place"
            raise ConfigError(
                f"this adapter does not belong to this model: {wrong}, for example {(missing or unknown)[0]!r}. "
                "Give the base model it was trained on."
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ConfigError(
                    f"this adapter does not belong to this model: {name!r} has shape {list(state[name].shape)}, "
                    f"the model needs {list(tensor.shape)}. Give the base model it was trained on."
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def merge(self, model: PreTrainedModel) -> None:
        """Folds the adapter into the weights and removes every trace of it, in place.

        Raises:
            ConfigError: If the strategy cannot be folded.
        """
        raise ConfigError(
            f"{type(self).__name__} cannot be merged into the weights; use its adapter folder (ftlit export --adapter)."
        )

    def peft_config(self, model: PreTrainedModel) -> dict[str, Any]:
        """The fields of `adapter_config.json` that describe this strategy on this model."""
        raise ConfigError(f"{type(self).__name__} has no PEFT adapter format; export the merged model instead.")

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> PEFTStrategy:
        """The strategy that an adapter folder describes.

        Args:
            config: Its `adapter_config.json`.
            state: Its tensors; read for names and shapes only.

        Raises:
            ConfigError: If it uses a feature that ftlit does not have.
        """
        raise ConfigError(f"{cls.__name__} cannot be read from a PEFT adapter folder.")
