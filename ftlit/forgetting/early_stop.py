"""EarlyStopOnForgetting: ends a run that forgets too much, with the last weights that did not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from typing_extensions import override

from ftlit.errors import ConfigError
from ftlit.forgetting.again import measure_again
from ftlit.forgetting.base import ForgettingControl
from ftlit.forgetting.probe import ForgettingProbe
from ftlit.forgetting.pull import SHARDED

if TYPE_CHECKING:
    from ftlit.stages.base import Stage


class EarlyStopOnForgetting(ForgettingControl):
    """Stops when the worst domain of a `ForgettingProbe` has lost more than a limit.

    Each time the probe measures a model within the limit, its trained weights are kept; when it measures one above,
    the run stops, the weights kept last are put back, and validation and probe are done again on them. So `last.ckpt`
    and `adapter/last` are within the limit, while the best checkpoint is the best by its monitor. How much too late it
    stops depends on how often the probe measures. The weights that are kept are in the checkpoint too.

    Args:
        max_increase: Largest relative increase of perplexity on the worst domain: 0.02 are 2 %, `ln 1.02` nats a token.
        probe: Name of the probe to listen to; left out, the only one. A run without any gets one that measures every 10
            steps.
        name: What it is called in the log.

    Raises:
        ConfigError: If the limit is not positive.
    """

    in_loss: ClassVar[bool] = False
    has_weight: ClassVar[bool] = False

    def __init__(self, max_increase: float = 0.02, probe: str | None = None, name: str | None = None) -> None:
        super().__init__(1.0, name)
        if not 0 < max_increase < float("inf"):
            raise ConfigError(f"EarlyStopOnForgetting.max_increase must be positive, such as 0.02, got {max_increase}.")
        self.max_increase, self.limit, self.probe = max_increase, math.log1p(max_increase), probe
        self.good_step, self.stopped_at = 0, -1
        self._good: dict[str, Tensor] = {}

    @staticmethod
    def default_controls(callbacks: Sequence[Any]) -> list[ForgettingControl]:
        """The probe that a run gets which stops by one and has none."""
        stops = any(isinstance(one, EarlyStopOnForgetting) and one.probe is None for one in callbacks)
        probed = any(isinstance(one, ForgettingProbe) for one in callbacks)
        return [ForgettingProbe(every_n_steps=10)] if stops and not probed else []

    def _probes(self, stage: Stage) -> list[ForgettingProbe]:
        probes = [control for control in stage.controls if isinstance(control, ForgettingProbe)]
        return [probe for probe in probes if self.probe in (None, probe.name)]

    @override
    def refuse(self, stage: Stage) -> str | None:
        if isinstance(stage.trainer.strategy, ModelParallelStrategy):
            return SHARDED
        probes = self._probes(stage)
        if len(probes) == 1:
            if probes[0].measures_before_the_end(stage.trainer):
                return None
            return f"{probes[0].name} measures at the end only, which is too late to stop; set its every_n_steps."
        asked = "a ForgettingProbe" if self.probe is None else f"a ForgettingProbe called {self.probe!r}"
        found = len(self._probes(stage))
        return f"it listens to {asked}, of which trainer.callbacks has {found or 'none'}; name exactly one."

    @override
    def prepare(self, stage: Stage) -> None:
        (probe,) = self._probes(stage)
        if self._heard not in probe.listeners:
            probe.listeners.append(self._heard)
        self.stopped_at = -1
        self._keep(stage, 0)

    def _keep(self, stage: Stage, step: int) -> None:
        assert stage.policy is not None
        trained = stage.strategy.trained(stage.policy.lm)
        self._good = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}
        self.good_step = step

    def _heard(self, trainer: L.Trainer, stage: Stage) -> None:
        """The probe has measured the model as it is."""
        if self.stopped_at >= 0:
            return
        (probe,) = self._probes(stage)
        change = probe.worst_change
        if change <= self.limit:
            self._keep(stage, trainer.global_step)
            return
        self.stopped_at = trainer.global_step
        trainer.should_stop = True
        if trainer.is_global_zero:
            back = f"those after step {self.good_step}" if self.good_step else "the weights of the start"
            print(
                f"{self.name}: stopped after step {self.stopped_at}: the perplexity of the worst domain has risen by "
                f"{math.expm1(change):.1%}, more than {self.max_increase:.1%}; {back} are put back",
                flush=True,
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Puts the last weights within the limit back, and measures them."""
        (probe,) = self._probes(pl_module)
        probe.on_train_end(trainer, pl_module)  # whichever of the two comes first in the list of callbacks
        if self.stopped_at != trainer.global_step or self.good_step == trainer.global_step:
            return
        assert pl_module.policy is not None
        with torch.no_grad():
            for name, parameter in pl_module.strategy.trained(pl_module.policy.lm).items():
                parameter.copy_(self._good[name])
        self.good_step = trainer.global_step  # these are they; once is enough
        measure_again(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "good": self._good, "good_step": self.good_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._good, self.good_step = dict(state_dict["good"]), state_dict["good_step"]

    @override
    def describe(self) -> str:
        return (
            f"{self.name}: stops when the perplexity of the worst domain has risen by more than {self.max_increase:.1%}"
        )


__all__ = ["EarlyStopOnForgetting"]
