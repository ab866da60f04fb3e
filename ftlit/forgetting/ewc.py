"""EWC: weights that what is known depends on are held more tightly than others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from ftlit.batch import Example, pack
from ftlit.data.store import measure
from ftlit.errors import ConfigError
from ftlit.forgetting.general import digest, general_rows, weights_with_gradients
from ftlit.forgetting.kept import kept
from ftlit.forgetting.pull import ChangePenalty
from ftlit.forgetting.replay import OWN
from ftlit.models.divergence import logits_of
from ftlit.models.policy import Policy, head_of
from ftlit.models.score import Head, token_scores
from ftlit.peft.base import Change

if TYPE_CHECKING:
    from ftlit.stages.base import Stage


_ROWS = 64  # whose probabilities are held at once, in float64: 80 MB for 151,000 tokens


class EWC(ChangePenalty):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3).

    Adds `weight * 1/2 sum_i F_i Delta_i^2` to the loss (its gradient, once a step, before clipping), Delta the change
    of the weights since the start and F the diagonal of the Fisher matrix of the start model on general text:
    `F_i = E_x E_{y ~ p(.|x)} [(d log p(y|x) / d w_i)^2]`, with labels y **drawn from the model** (with those of the
    data it would be the "empirical Fisher", Kunstner et al. 2019, arXiv:1905.12558) and the square taken **for each
    example**, not of the gradient of a batch.

    F is a mean over tokens, so `1/2 sum_i F_i Delta_i^2` is, to second order and without the off-diagonal terms, the
    KL divergence from the start in nats a token of general text, and `weight` means what it means for `Replay`. It is
    that of the weights themselves, also for LoRA, whose own coordinates have none at the start (with B = 0 the gradient
    of A is zero): its change is built layer by layer.

    Made once and kept on disk (as many numbers as the weights that change). Logged: `forgetting/ewc/loss`.

    Args:
        rows: General text: `self` (texts of the model's own, those of `Replay`), a file, a folder, a hub id, or
            `sample:NAME`.
        num_rows: How many of these rows; each costs a forward and a backward pass, once.
        weight: Factor on the penalty.
        seed: Seed of the labels.
        name: What it is called in the log.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(
        self, rows: str = OWN, num_rows: int = 256, weight: float = 1.0, seed: int = 0, name: str | None = None
    ) -> None:
        super().__init__(weight, name or "ewc")
        if num_rows < 1:
            raise ConfigError(f"EWC.num_rows must be at least 1, got {num_rows}.")
        self.rows, self.num_rows, self.seed = rows, num_rows, seed
        self._fisher: dict[str, Tensor] = {}
        self._seen = (0, 0)

    @override
    def refuse(self, stage: Stage) -> str | None:
        reason = super().refuse(stage)
        if not isinstance(stage.policy, Policy):
            return f"its labels are drawn from a language model, and {type(stage).__name__} trains none; use L2ToInit."
        if reason is None and getattr(stage.strategy, "from_adapter", None) is not None:
            return "the Fisher matrix of a model with another adapter is not computed; merge that first (ftlit export)."
        return reason

    def examples(self, stage: Stage) -> Sequence[Example]:
        """The rows of which the Fisher matrix is taken."""
        return general_rows(stage, self.name, self.rows, self.num_rows)

    @override
    def prepare(self, stage: Stage) -> None:
        assert stage.policy is not None
        examples = self.examples(stage)
        names = sorted(change.name for change in stage.strategy.changes(stage.policy.lm))
        self._seen = (len(examples), int(measure(examples).targets.sum()))
        if not self._seen[1]:
            raise ConfigError(f"EWC.rows: nothing is trained in any of the {len(examples)} rows of {self.rows}.")
        settings = [digest(examples), self.seed, names]
        self._fisher = kept(stage, "fisher", settings, lambda: fisher(stage, examples, names, self.seed))

    @override
    def term(self, change: Change) -> Tensor:
        return (self._fisher[change.name] * change.materialize().square()).sum() / 2

    @override
    def describe(self) -> str:
        rows, tokens = self._seen
        what = f"{rows:,} texts of its own" if self.rows == OWN else f"{rows:,} rows of {self.rows}"
        return f"{self.name}: Fisher matrix of {what} ({tokens:,} tokens), weight {self.weight:g}"


def fisher(stage: Stage, examples: Sequence[Example], names: Sequence[str], seed: int = 0) -> dict[str, Tensor]:
    """The diagonal of the Fisher matrix of the start model, a mean over tokens.

    Labels of one example are drawn independently given what stands before each, so the squared gradient of their sum
    has the expectation of the sum of the squared gradients: one backward pass an example.

    Args:
        stage: The stage. All ranks must call; they share the examples.
        examples: General text; its trained tokens are the places of the labels.
        names: Weights of the unadapted model.
        seed: Seed of the labels: those of an example depend on it and the example's number alone.

    Returns:
        By name, of the shape of the weight, at least float32.
    """
    assert stage.policy is not None
    policy, lm, trainer = stage.policy, stage.policy.lm, stage.trainer
    device = next(policy.parameters()).device
    tokens = int(measure(examples).targets.sum())
    with torch.enable_grad(), weights_with_gradients(stage, names) as weights:
        wide = {name: torch.promote_types(weight.dtype, torch.float32) for name, weight in weights.items()}
        sums = {name: torch.zeros_like(weight, dtype=wide[name]) for name, weight in weights.items()}
        for number in range(trainer.global_rank, len(examples), trainer.world_size):
            batch = pack([examples[number]]).to(device)
            if not len(batch.target_ids):
                continue
            hidden = policy.hidden(batch)
            head = head_of(lm)
            labels = _drawn(hidden.detach(), head.detach(), seed, number)
            total = token_scores(hidden, head, labels).logps.sum()
            gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    sums[name] += gradient.to(wide[name]).square()
    if trainer.world_size > 1:
        sums = {name: trainer.strategy.reduce(one, reduce_op="sum") for name, one in sums.items()}
    return {name: one / tokens for name, one in sums.items()}


@torch.no_grad()
def _drawn(hidden: Tensor, head: Head, seed: int, number: int) -> Tensor:
    """A label for each hidden state, `[N]`: the same on any device and rank."""
    generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + number) % (1 << 63))
    uniform = torch.rand(len(hidden), 1, generator=generator, dtype=torch.float64, device="cpu").to(hidden.device)
    labels = []
    for some, chance in zip(hidden.split(_ROWS), uniform.split(_ROWS), strict=True):
        below = torch.softmax(logits_of(some, head).double(), dim=-1).cumsum(dim=-1)
        found = torch.searchsorted(below, chance * below[:, -1:], right=True)[:, 0]
        labels.append(found.clamp_max(below.shape[-1] - 1))
    return torch.cat(labels)


__all__ = ["EWC", "fisher"]
