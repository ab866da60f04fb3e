"""Interpolate: only a part of the way from the start is kept."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
from typing_extensions import override

from ftlit.errors import ConfigError
from ftlit.forgetting.again import measure_again
from ftlit.forgetting.base import ForgettingControl
from ftlit.forgetting.early_stop import EarlyStopOnForgetting
from ftlit.forgetting.pull import outside_head
from ftlit.peft.base import Alpha

if TYPE_CHECKING:
    from ftlit.stages.base import Stage


class Interpolate(ForgettingControl):
    """Moves the weights to `start + alpha (trained - start)`: WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903).

    What is forgotten falls with about `alpha^2`, what was learnt at first only with `alpha`. With `last_alpha` the
    share grows linearly with depth, from `alpha` in the first layer to `last_alpha` in the last, so that the general
    features of the shallow layers are kept: LiNeS (Wang et al. 2025, arXiv:2410.17146, eq. 3). Embeddings move with
    the first layer, the final norm and the output layer with the last; the head of a classifier is left as it is.

    It happens right after the last optimizer step: the last validation, every measurement, `last.ckpt` and
    `adapter/last` are of the model that was moved. (A run that is stopped early is moved when it has ended; validation
    and probes are then done again.) With `every_n_steps` it happens after every so many optimizer steps instead. For
    LoRA one factor of the product is scaled, its adapter stays an adapter.

    Args:
        alpha: Share of the change that is kept, 0 (none) to 1 (all).
        last_alpha: Share in the last layer; `alpha` is then that in the first. Left out, all layers alike.
        every_n_steps: Move after every so many optimizer steps, and not at the end.
        weight: Factor on what is taken back: `1 - weight (1 - alpha)` is kept.
        name: What it is called in the log.

    Raises:
        ConfigError: If a number is out of range.
    """

    in_loss: ClassVar[bool] = False

    def __init__(
        self,
        alpha: float = 0.5,
        last_alpha: float | None = None,
        every_n_steps: int | None = None,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        for key, value in (("alpha", alpha), ("last_alpha", alpha if last_alpha is None else last_alpha)):
            if not 0 <= value <= 1:
                raise ConfigError(f"Interpolate.{key} must be in [0, 1], got {value}.")
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError(f"Interpolate.every_n_steps must be at least 1 optimizer step, got {every_n_steps}.")
        self.alpha, self.last_alpha, self.every_n_steps = alpha, last_alpha, every_n_steps
        self._moved_at = -1

    @override
    def refuse(self, stage: Stage) -> str | None:
        assert stage.policy is not None
        return stage.strategy.not_between(stage.policy.lm)

    @override
    def prepare(self, stage: Stage) -> None:
        assert stage.policy is not None
        stage.strategy.remember_start(stage.policy.lm)

    @override
    def after_step(self, stage: Stage) -> None:
        step = stage.trainer.global_step + 1  # the optimizer has stepped, Lightning has not counted it yet
        if self.every_n_steps is None:
            if step >= stage.planned_steps:
                self._move(stage, step)
        elif step % self.every_n_steps == 0:
            self._move(stage, step)

    def on_train_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Moves what a run that was stopped early ended with, and measures again."""
        step = trainer.global_step
        if not self.weight or not step or self.every_n_steps is not None or self._moved_at == step:
            return
        for control in pl_module.controls:
            if isinstance(control, EarlyStopOnForgetting):  # whichever of the two comes first in the list of callbacks
                control.on_train_end(trainer, pl_module)
        self._move(pl_module, step)
        measure_again(trainer, pl_module)

    def share(self, num_layers: int) -> Alpha:
        """What is kept, for every parameter of a model.

        Args:
            num_layers: Its number of layers.
        """
        first, last = (1 - self.weight * (1 - one) for one in (self.alpha, self._last))
        first, last = max(0.0, first), max(0.0, last)
        return first if first == last else lambda name: first + (last - first) * depth(name, num_layers)

    @property
    def _last(self) -> float:
        return self.alpha if self.last_alpha is None else self.last_alpha

    def _move(self, stage: Stage, step: int) -> None:
        if not self.weight:
            return
        assert stage.policy is not None
        lm = stage.policy.lm
        share = self.share(int(lm.config.get_text_config().num_hidden_layers))
        stage.strategy.interpolate(lm, outside_head(stage, share))
        self._moved_at = step
        if stage.trainer.is_global_zero and self.every_n_steps is None:
            print(f"{self.name} after step {step}: kept {self._words()}", flush=True)

    def _words(self) -> str:
        if self.last_alpha is None:
            return f"{self.alpha:.0%} of the change of each weight"
        return f"{self.alpha:.0%} (first layer) to {self.last_alpha:.0%} (last layer) of the change of each weight"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "moved_at": self._moved_at}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._moved_at = state_dict["moved_at"]

    @override
    def describe(self) -> str:
        when = "after the last step" if self.every_n_steps is None else f"after every {self.every_n_steps} steps"
        return f"{self.name}: {when} {self._words()} is kept"


def depth(name: str, num_layers: int) -> float:
    """Where in a model a parameter lies: 0 in the embeddings and the first layer, 1 in the last and behind it.

    Args:
        name: Its name in the model.
        num_layers: Layers of the model.
    """
    if found := re.search(r"\.(\d+)\.", name):
        return int(found[1]) / max(1, num_layers - 1)
    return 0.0 if re.search(r"(^|\.)(embed\w*|wte|wpe|\w*embeddings?)(\.|$)", name) else 1.0


__all__ = ["Interpolate", "depth"]
