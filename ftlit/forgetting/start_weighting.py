"""Controls that weight what is trained by what the start model says of it."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from typing_extensions import override

from ftlit.data.store import Examples, Joined, measure
from ftlit.forgetting.base import ForgettingControl
from ftlit.forgetting.measuring import Meter

if TYPE_CHECKING:
    from ftlit.stages.base import Stage


class StartWeighting(ForgettingControl):
    """Scores the training rows with the start model, once, and multiplies the weights of their trained tokens.

    The scores are kept on disk, so a run that goes on weights its rows as before. The loss of a step is the weighted
    mean over its tokens, so only the weights within a step matter; `train/loss` is that mean.

    Args:
        name: What it is called in the log.
    """

    in_loss: ClassVar[bool] = False
    has_weight: ClassVar[bool] = False

    def __init__(self, name: str | None = None) -> None:
        super().__init__(1.0, name)
        self.note = ""
        self._weighted: Any = None

    @abstractmethod
    def factors(self, nll: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The factor on the weight of each trained token; sets `note`, which is printed.

        Args:
            nll: NLL of the start model for each trained token, nats, `[tokens]`, example after example.
            counts: Trained tokens of each example, `[examples]`; their sum is the length of `nll`.
        """

    @override
    def refuse(self, stage: Stage) -> str | None:
        data: Any = stage.trainer.datamodule
        rows = getattr(data, "sets", {}).get("train")
        tokens = isinstance(rows, Joined) and all(isinstance(part, Examples) for part in rows.parts)
        if not (stage.predicts_tokens and tokens and hasattr(data, "reweight")):
            return f"it weights the trained tokens of rows, and {type(stage).__name__} trains none; use it with SFT."
        return None

    @override
    def prepare(self, stage: Stage) -> None:
        data: Any = stage.trainer.datamodule
        rows = data.sets["train"]
        if rows is self._weighted:  # by an earlier run on the same data
            return
        assert stage.policy is not None
        stage.strategy.remember_start(stage.policy.lm)
        meter = Meter({"train": rows}, data.max_tokens or 4096)
        meter.prepare(stage.trainer, stage)
        data.reweight(self.factors(meter.start_tokens("train"), measure(rows).targets))
        self._weighted = data.sets["train"]

    @override
    def describe(self) -> str:
        return f"{self.name}: {self.note}"


__all__ = ["StartWeighting"]
