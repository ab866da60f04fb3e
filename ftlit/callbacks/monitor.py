"""What "the best" of a run is: one metric and its direction, for whoever keeps, uploads or reports it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ftlit.data.datamodules import MAIN
from ftlit.errors import ConfigError, nearest
from ftlit.metrics.directions import Mode, direction

DEFAULT = "val/loss"
_WORDS = {"min": "smaller is better", "max": "larger is better"}
_WORST = {"min": math.inf, "max": -math.inf}


class Monitor(NamedTuple):
    """A metric that decides.

    Attributes:
        name: Its name in the log.
        mode: Whether a small or a large value is better.
    """

    name: str
    mode: Mode

    @property
    def words(self) -> str:
        """Its direction in words."""
        return _WORDS[self.mode]

    def rated(self, value: float) -> float:
        """The value, or the worst there is where it is not a number."""
        return _WORST[self.mode] if math.isnan(value) else value

    def better(self, value: float, than: float | None) -> bool:
        """Whether a value is better than the best so far; anything is better than none."""
        if than is None:
            return True
        return self.rated(value) < than if self.mode == "min" else self.rated(value) > than


def monitor_of(trainer: L.Trainer, where: str, name: str = DEFAULT, mode: Mode | None = None) -> Monitor | None:
    """What decides in this run.

    Args:
        trainer: The trainer, its data set up and its callbacks complete.
        where: Who asks, for the messages, such as `SaveCheckpoint`.
        name: The metric as it was configured; the default stands for what the stage says is best by.
        mode: The direction as it was configured; None: the metric's own.

    Returns:
        None where the default is wanted and nothing is validated.

    Raises:
        ConfigError: If nothing will log the metric, or its direction is not known or contradicted.
    """
    stage: Any = trainer.lightning_module
    validates = getattr(stage, "judged_on", MAIN) is not None and float(trainer.limit_val_batches) > 0
    if name == DEFAULT and hasattr(stage, "judged_by"):
        return _default(where, stage, mode) if validates else None
    return chosen(trainer, where, name, mode, validates)


def _default(where: str, stage: Any, mode: Mode | None) -> Monitor | None:
    """What the stage is judged by."""
    own = stage.best_by[1]
    if mode not in (None, own):
        raise ConfigError(_contradiction(where, stage.judged_by, mode, own))
    return None if stage.judged_by is None else Monitor(stage.judged_by, own)


def chosen(trainer: L.Trainer, where: str, name: str, mode: Mode | None, validates: bool) -> Monitor:
    """A metric that was named.

    Args:
        trainer: The trainer.
        where: Who asks.
        name: The metric.
        mode: Its direction, if one was given.
        validates: Whether the run has validations.

    Raises:
        ConfigError: If nothing will log it, or its direction is not known or contradicted.
    """
    stage: Any = trainer.lightning_module
    at_validations, at_steps = logged_at_validations(trainer), list(getattr(stage, "step_names", ()))
    name = _of_first_set(stage, name, at_validations)
    if name not in (*at_validations, *at_steps):
        _check_foreign(trainer, where, name, mode, [*at_validations, *at_steps] if validates else at_steps)
        assert mode is not None
        return Monitor(name, mode)
    if name not in at_steps and not validates:
        raise ConfigError(
            f"{where} watches {name!r}, which is measured at validations, and this run has none; give data.validation, "
            "or leave monitor out."
        )
    own = stage.best_by[1] if name == getattr(stage, "judged_by", None) else direction(name)
    if own is None and mode is None:
        raise ConfigError(f"{where} watches {name!r}, which has no better end of its own; set its mode to min or max.")
    if own is not None and mode is not None and own != mode:
        raise ConfigError(_contradiction(where, name, mode, own))
    return Monitor(name, own or mode or "min")


def logged_at_validations(trainer: L.Trainer) -> list[str]:
    """Names of all that ftlit's stage and callbacks will log at a validation, known before the first."""
    names: list[str] = []
    for one in (trainer.lightning_module, *getattr(trainer, "callbacks", ())):
        tell = getattr(one, "logged_at_validations", None)
        names += [] if tell is None else tell(trainer)
    return list(dict.fromkeys(names))


def _of_first_set(stage: Any, name: str, known: Iterable[str]) -> str:
    """`val/KEY` of the set that stands for the run, where no set bears the main name."""
    place, _, key = name.partition("/")
    own = f"{place}/{getattr(stage, 'judged_on', None)}/{key}"
    return own if place == "val" and name not in known and own in known else name


def _check_foreign(trainer: L.Trainer, where: str, name: str, mode: str | None, known: list[str]) -> None:
    """Refuses a metric that nobody logs; one that a class of the user's own may log needs a direction.

    Raises:
        ConfigError: If so.
    """
    others = sorted({type(one).__name__ for one in (trainer.lightning_module, *trainer.callbacks) if _is_foreign(one)})
    if others and mode is not None:
        return
    hint = nearest(name, known)
    listed = "" if hint.startswith("known") or not known else f" Logged are: {', '.join(known)}."
    mine = f" If {' or '.join(others)} logs it, set the mode too (min or max)." if others else ""
    if not known:
        raise ConfigError(f"{where} watches {name!r}, which nothing logs in this run.{mine}")
    raise ConfigError(f"{where} watches {name!r}, which ftlit does not log in this run: {hint}{listed}{mine}")


def _is_foreign(part: Any) -> bool:
    """Whether a stage or callback is neither ftlit's nor Lightning's: what it logs is not known."""
    return type(part).__module__.split(".")[0] not in ("ftlit", "lightning", "pytorch_lightning")


def _contradiction(where: str, name: str, given: str | None, own: Mode) -> str:
    return f"{where}: mode is {given}, but of {name} {_WORDS[own].replace(' is', ' values are')}; leave mode out."


class Best:
    """The best value so far, and when it was.

    Attributes:
        monitor: What decides; None before the run begins, or where nothing is validated.
        value: Its best value.
        step: The optimizer step it was measured after.
    """

    def __init__(self) -> None:
        self.monitor: Monitor | None = None
        self.value: float | None = None
        self.step: int | None = None
        self._of: str | None = None

    def begin(self, monitor: Monitor | None) -> None:
        """Says what decides; what another metric said before a run went on does not count."""
        self.monitor = monitor
        name = None if monitor is None else monitor.name
        if self._of not in (None, name):
            self.value = self.step = None
        self._of = name

    def update(self, trainer: L.Trainer) -> bool:
        """Whether the validation that has just ended is the best so far."""
        value = None if self.monitor is None else trainer.callback_metrics.get(self.monitor.name)
        if value is None or self.monitor is None or not self.monitor.better(value.item(), self.value):
            return False
        self.value, self.step = self.monitor.rated(value.item()), trainer.global_step
        return True

    def summary(self) -> dict[str, Any] | None:
        """What `summary.json` says of it; None where there is none."""
        if self.monitor is None or self.value is None:
            return None
        return {"monitor": self.monitor.name, "mode": self.monitor.mode, "value": self.value, "step": self.step}

    def state_dict(self) -> dict[str, Any]:
        """For a run that goes on."""
        return {"best": self.value, "step": self.step, "monitor": self._of}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from it."""
        self.value, self.step, self._of = state["best"], state.get("step"), state.get("monitor")


def deciding(trainer: L.Trainer) -> Monitor | None:
    """What decides in this run: the metric of its checkpoints, else what the stage says is best by.

    Raises:
        ConfigError: If nothing will log it.
    """
    kept = [one for one in trainer.callbacks if isinstance(one, ModelCheckpoint)]
    for one in kept:
        if isinstance(found := getattr(one, "decides", None), Monitor):
            return found
    for one in kept:
        if one.monitor is not None:
            return Monitor(one.monitor, "max" if one.mode == "max" else "min")
    return monitor_of(trainer, "SaveAdapter")


# ---- Lightning's own callbacks --------------------------------------------------------------------------------------


def direct(trainer: L.Trainer, watching: EarlyStopping | ModelCheckpoint) -> None:
    """Gives one of Lightning's callbacks the metric as it is called in this run, and its direction.

    These take `min` where nothing is said, so that `min` may mean that nobody thought of it.

    Args:
        trainer: The trainer, its data set up and its callbacks complete.
        watching: The callback, before its state is restored.

    Raises:
        ConfigError: If nothing will log what it watches, or its direction is contradicted.
    """
    if watching.monitor is None:
        return
    where, stage = type(watching).__name__, trainer.lightning_module
    validates = getattr(stage, "judged_on", MAIN) is not None and float(trainer.limit_val_batches) > 0
    given: Mode = "max" if watching.mode == "max" else "min"
    found = _lenient(trainer, where, watching.monitor, given, validates)
    watching.monitor = found.name
    if found.mode == watching.mode:
        return
    watching.mode = found.mode
    worst = torch.tensor(_WORST[found.mode])
    if isinstance(watching, EarlyStopping):
        watching.min_delta, watching.best_score = -watching.min_delta, worst
    else:
        watching.kth_value = worst
    rank_zero_only(print)(f"note       {where} watches {found.name}: {found.words}, so its mode is {found.mode}")


def _lenient(trainer: L.Trainer, where: str, name: str, given: Mode, validates: bool) -> Monitor:
    """`chosen`, with a `min` that may be the default."""
    known = direction(name) or direction(_of_first_set(trainer.lightning_module, name, logged_at_validations(trainer)))
    if given == "min" and known == "max":
        return chosen(trainer, where, name, None, validates)
    return chosen(trainer, where, name, given, validates)


__all__ = ["DEFAULT", "Best", "Monitor", "deciding", "direct", "logged_at_validations", "monitor_of"]
