"""TargetKL: on the trained tokens themselves the model keeps close to what it would have said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from ftlit.batch import PackedBatch
from ftlit.errors import ConfigError
from ftlit.forgetting.base import ForgettingControl, Penalty
from ftlit.objectives.scores import TokenScores

if TYPE_CHECKING:
    from ftlit.stages.base import Stage


class TargetKL(ForgettingControl):
    """Learning without forgetting (Li and Hoiem 2018, arXiv:1606.09282) for language models.

    Adds `weight * mean over trained tokens of T^2 KL(p_start || p)`, both distributions those of `logits / T`. It needs
    no further rows, but it works against what is to be learnt: the trained tokens are those that have to change. Keep
    the weight small (0.01 to 0.5) or use `Replay`, which holds other text. Costs a forward pass of the start model.

    Logged: `forgetting/target_kl/loss`, nats a trained token.

    Args:
        temperature: T; above 1 the unlikely tokens count more.
        weight: Factor on the mean.
        name: What it is called in the log.

    Raises:
        ConfigError: If a number is out of range.
    """

    of_a_step: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(self, temperature: float = 2.0, weight: float = 0.1, name: str | None = None) -> None:
        super().__init__(weight, name or "target_kl")
        if not 0 < temperature < float("inf"):
            raise ConfigError(f"TargetKL.temperature must be positive, got {temperature}.")
        self.temperature = float(temperature)

    @override
    def refuse(self, stage: Stage) -> str | None:
        if not stage.predicts_tokens:
            return f"{type(stage).__name__} trains no tokens of given rows that could be held to the start."
        if any(control is not self and 0 in control.kl for control in stage.controls):
            return "another control already holds the trained tokens to the start; use one."
        return None

    @property
    @override
    def kl(self) -> Mapping[int, float]:
        return {0: self.temperature}

    @override
    def penalty(self, stage: Stage, batch: PackedBatch, scores: TokenScores) -> Penalty | None:
        assert scores.kl is not None
        own = (batch.target_sources == 0) & (batch.target_weights != 0)
        mean = scores.kl[own].sum() / stage.totals.targets
        return Penalty(mean, {"loss": mean.detach()})

    @override
    def describe(self) -> str:
        how = f"temperature {self.temperature:g}, weight {self.weight:g}"
        return f"{self.name}: KL to the start on the trained tokens, {how}"


__all__ = ["TargetKL"]
