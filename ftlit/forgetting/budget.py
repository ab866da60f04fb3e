"""A budget of forgetting: controls are turned while the model learns, and the end is held to it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
from typing_extensions import override

from ftlit.batch import Example
from ftlit.data.store import measure
from ftlit.errors import ConfigError
from ftlit.forgetting.again import measure_again
from ftlit.forgetting.base import ForgettingControl
from ftlit.forgetting.controller import IntegralController
from ftlit.forgetting.documents import Documents, read_documents
from ftlit.forgetting.early_stop import EarlyStopOnForgetting
from ftlit.forgetting.measuring import Measured, Meter
from ftlit.forgetting.own_text import own_text
from ftlit.forgetting.probe import ForgettingProbe
from ftlit.forgetting.replay import FIRST_OWN, OWN, Replay
from ftlit.forgetting.share import largest_share
from ftlit.models.policy import Policy

if TYPE_CHECKING:
    from ftlit.stages.base import Stage

# Texts of the model's own by number: the first steer, these judge, and from `FIRST_OWN` on they are replayed.
FIRST_VERDICT = FIRST_OWN // 2
_TARGET = "target"
_EARLY = (2, 5, 10)  # forgetting is fastest early: the controller hears of it before its regular probes
_ONE_SIDED = 1.645  # standard errors below which 95 % of a normal distribution lie
# What is forgotten at one weight grows to its level in the first part of a run, and as the rate decays the pull to the
# start takes back what the noise of large steps had cost: seen on SmolLM2-135M with cosine to zero, a factor of 2 to 4.
_RISE = 0.2
_SETTLES = 1.5
_LEARNT = "nats a trained token"  # the loss whose fall is what was learnt


class ForgettingBudget(ForgettingControl):
    """Holds what a model forgets below a budget: at most so much more perplexity on the worst domain.

    While training, a small probe of the first documents is measured every few steps, and an `IntegralController` turns
    the weight of the controls in the loss (of a KL `Replay` of the model's own text, where the run has no control of
    its own). The loss is divided by 1 and the weights, so that they do not change the size of the step. At the end the
    weights go back toward the start as far as it takes for the verdict to be within the budget with 95 % confidence, as
    all documents of the first probe say, and a **second** set of documents, which steers nothing, gives that verdict:
    met, if its estimate is within the budget. What was kept of the gain on the target is printed beside: a model that
    learnt nothing has met every budget.

    Logged: `forgetting/budget/change` (nats a token, worst domain), `.../limit`, `.../weight`; at the end, and in
    `summary.json`, `.../limit`, `.../alpha`, `.../verdict`, `.../verdict_low`, `.../verdict_high`, `.../met` (1 or 0),
    `.../gain` (nats a token of the target rows, or what the stage's `best_by` got better by), `.../kept` (the share of
    the gain; none where nothing was learnt).

    Args:
        max_increase: Largest relative increase of perplexity: 0.02 are 2 %, `ln 1.02` nats a token.
        domains: What is not to be forgotten, as for `ForgettingProbe`; half of the documents of each steer, half judge.
            Text that the start model writes itself when left out.
        controls: Names of the controls to turn, `[]` for none: then only the end is held to it. All that are in the
            loss when left out.
        documents: Documents of the start model's own in each of the two probes. About 600 are needed to tell 0.005 nats
            a token.
        new_tokens: Most tokens of each.
        steering_documents: How many of the first probe's documents steer.
        max_tokens: Most tokens of each probe of a domain of rows.
        probes: How many times to measure over the run, besides early ones.
        integral: Gain of the controller, in a tenth of the run; see `IntegralController`.
        max_weight: Largest factor on the controls' own weights.
        project: Whether to go back toward the start at the end if that is needed.
        seed: Seed of the texts and of the bootstrap.
        name: What it is called in the log.

    Raises:
        ConfigError: If a number is out of range, or there is nothing to turn.
    """

    in_loss: ClassVar[bool] = False
    has_weight: ClassVar[bool] = False

    def __init__(
        self,
        max_increase: float = 0.02,
        domains: dict[str, str] | None = None,
        controls: list[str] | None = None,
        documents: int = 600,
        new_tokens: int = 96,
        steering_documents: int = 64,
        max_tokens: int = 32768,
        probes: int = 30,
        integral: float = 1.0,
        max_weight: float = 20.0,
        project: bool = True,
        seed: int = 0,
        name: str = "budget",
    ) -> None:
        super().__init__(0.0, name)
        if not 0 < max_increase <= 10:
            raise ConfigError(f"ForgettingBudget.max_increase must be in (0, 10], such as 0.02, got {max_increase}.")
        for key, value, least in (
            ("documents", documents, 10),
            ("new_tokens", new_tokens, 2),
            ("steering_documents", steering_documents, 2),
            ("max_tokens", max_tokens, 2),
            ("probes", probes, 1),
        ):
            if value < least:
                raise ConfigError(f"ForgettingBudget.{key} must be at least {least}, got {value}.")
        self.max_increase, self.limit = max_increase, math.log1p(max_increase)
        self.domains = {"own": OWN} if domains is None else dict(domains)
        if not self.domains:
            raise ConfigError("ForgettingBudget.domains is empty: name at least one, such as {own: self}.")
        self.names, self.documents, self.new_tokens = controls, documents, new_tokens
        self.steering_documents, self.max_tokens, self.probes = steering_documents, max_tokens, probes
        self.project, self.seed = project, seed
        self.controller = IntegralController(self.limit, integral, max_weight, min(1.0, max_weight))
        self.lowest = self.highest = self.controller.weight
        self.seconds, self._began, self._earlier = 0.0, 0.0, 0.0
        self.outcome: dict[str, float] = {}
        self.ended_at = -1
        self.infeasible_at: int | None = None
        self._turned_at = 0
        self._unit = ""
        self._given: dict[str, float] = {}
        self._meters: dict[str, Meter] = {}

    # ---- before ---------------------------------------------------------------------------------------------------

    @staticmethod
    def default_controls(callbacks: Sequence[Any]) -> list[ForgettingControl]:
        """What a run with a budget gets where it has none of its own: KL replay of its own text, and a probe to see.

        A budget that names its controls, `[]` for none, gets no replay.
        """
        budgets = [one for one in callbacks if isinstance(one, ForgettingBudget)]
        if not budgets:
            return []
        budget = budgets[0]
        probed = any(isinstance(one, ForgettingProbe) for one in callbacks)
        turned = budget.names is not None or any(
            isinstance(one, ForgettingControl) and one.in_loss for one in callbacks
        )
        added: list[ForgettingControl] = [] if turned else [Replay()]
        return added if probed else [*added, budget._probe()]

    def _probe(self) -> ForgettingProbe:
        """A probe of the first of the texts that judge: no others have to be written, and they have not steered."""
        return ForgettingProbe(
            dict(self.domains),
            own_rows=min(128, self.documents),
            own_new_tokens=self.new_tokens,
            own_first=FIRST_VERDICT,
            seed=self.seed,
        )

    def turned(self, stage: Stage) -> list[ForgettingControl]:
        """The controls whose weights it turns."""
        return [
            control
            for control in stage.controls
            if (control.in_loss if self.names is None else control.name in self.names)
        ]

    @override
    def refuse(self, stage: Stage) -> str | None:
        if sum(isinstance(control, ForgettingBudget) for control in stage.controls) > 1:
            return "a run has one budget; give its domains to one."
        if not isinstance(stage.policy, Policy):
            return f"{type(stage).__name__} trains a model without next tokens, which is what is measured."
        known = [control.name for control in stage.controls if control is not self]
        unknown = [name for name in self.names or [] if name not in known]
        if unknown:
            return f"no control of this run is called {unknown[0]!r}; there are {', '.join(known) or 'none'}."
        fixed = [control.name for control in self.turned(stage) if not control.has_weight]
        if fixed:
            return f"{fixed[0]} has no weight that could be turned; name other controls, or [] to hold the end only."
        if any(isinstance(control, EarlyStopOnForgetting) for control in stage.controls):
            return "EarlyStopOnForgetting would put others in the place of the weights that it judges; use one of them."
        return None

    @override
    def prepare(self, stage: Stage) -> None:
        assert stage.policy is not None
        stage.strategy.remember_start(stage.policy.lm)
        self.outcome, self.ended_at, self.infeasible_at, self._turned_at = {}, -1, None, 0
        first: dict[str, Documents] = {}
        second: dict[str, Documents] = {}
        for name, rows in self.domains.items():
            first[name], second[name] = self._documents(stage, rows)
        room = getattr(stage.trainer.datamodule, "max_tokens", None) or 4096
        steering = {name: one.first(self.steering_documents) for name, one in first.items()}
        target = self._target_documents(stage)
        self._unit = "nats a token on the target rows" if target is not None else f"by {stage.judged_by}"
        sets = {"steering": steering, "first": first, "second": second}
        if target is not None:
            sets[_TARGET] = {_TARGET: target}
        for key, documents in sets.items():
            self._meters[key] = Meter(documents, room, seed=self.seed)
            self._meters[key].prepare(stage.trainer, stage)
        for control in stage.controls:
            if isinstance(control, ForgettingProbe):
                control.limit = self.limit  # its pictures show it
        for control in self.turned(stage):
            self._given.setdefault(control.name, control.weight or 1.0)
            control.normalised = True
        self._turn(stage)

    @override
    def held_out(self) -> dict[str, Sequence[Example]]:
        both = [self._meters[key].sets for key in ("first", "second")]
        return {name: [*both[0][name].examples, *both[1][name].examples] for name in self.domains}

    def _documents(self, stage: Stage, rows: str) -> tuple[Documents, Documents]:
        """Two disjoint sets."""
        if rows == OWN:
            first, second = (
                own_text(stage, None, self.documents, max_new_tokens=self.new_tokens, seed=self.seed, skip=skip)
                for skip in (0, FIRST_VERDICT)
            )
            return Documents(first), Documents(second)
        data: Any = stage.trainer.datamodule
        both, _ = read_documents(
            data,
            rows,
            max_tokens=2 * self.max_tokens,
            max_length=getattr(data, "max_length", 1024),
            seed=self.seed,
            quiet=not stage.trainer.is_global_zero,
        )
        if both.num_documents < 4:
            raise ConfigError(
                f"ForgettingBudget needs at least 4 documents of each domain to judge by, got {both.num_documents}."
            )
        return both.halves()

    def _target_documents(self, stage: Stage) -> Documents | None:
        """Some of the run's own validation rows, or without any, of its training rows.

        None where a stage does not learn to predict them: the likelihood of pairs says nothing of what was learnt.
        """
        if not stage.predicts_tokens or stage.loss_unit != _LEARNT:
            return None
        data: Any = stage.trainer.datamodule
        name = f"validation:{stage.judged_on}"
        examples: Sequence[Example] = data.sets[name if name in data.sets else "train"]
        most = int((measure(examples).lengths.cumsum() <= self.max_tokens // 4).sum())
        return Documents([examples[i] for i in range(min(max(2, most), len(examples)))])

    @override
    def describe(self) -> str:
        names = ", ".join(self._given) or "nothing"
        what = ", ".join(f"{name} ({rows})" for name, rows in self.domains.items())
        count = len(next(iter(self._meters["second"].sets.values())).examples)
        return (
            f"{self.name}: perplexity may rise by {self.max_increase:.1%} ({self.limit:.4f} nats a token) on {what}, "
            f"{count:,} texts judge; turns {names}"
        )

    # ---- while training -------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Starts its clock."""
        self._began = time.perf_counter()
        self._turn(pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures and turns; after the last step, ends."""
        step, last = trainer.global_step, pl_module.planned_steps
        if step >= last:
            self._finish(trainer, pl_module)
            return
        every = max(1, last // self.probes)
        if step % every and not (step in _EARLY and step < every):
            return
        measured = self._measured("steering", trainer, pl_module)
        worst, before = self._worst(measured), self.controller.weight
        judged = max(self._judged(name, one) for name, one in measured.items())
        allowed = _allowed(pl_module, step, last)
        if step < _RISE * last:  # slack says nothing yet, and what is forgotten early is hard to bring back
            judged = max(judged, allowed * self.limit)
        elapsed, left = 10 * (step - self._turned_at) / last, 10 * (last - 1 - step) / last
        weight = self.controller.update(judged, allowed, elapsed, left)
        self._turned_at = step
        self.lowest, self.highest = min(self.lowest, weight), max(self.highest, weight)
        self._turn(pl_module)
        self._log(trainer, {"change": worst.change, "limit": self.limit, "weight": weight})
        if self.controller.out_of_reach and self.infeasible_at is None:
            self.infeasible_at = step
            self._say(
                trainer,
                f"budget     cannot be met as things are: after step {step} the perplexity is "
                f"{math.expm1(worst.change):+.1%} with weight {before:.2g}, which cannot grow enough (to at most "
                f"{self.controller.most:g}) in the {last - step:,} steps that are left; lower model.lr, raise the "
                "ratio of replay or the budget"
                + ("; at the end the weights will be taken back toward the start" if self.project else ""),
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Ends a run that was stopped early; if that changes the weights, they are validated and measured again."""
        if trainer.global_step and self.ended_at != trainer.global_step:
            self._finish(trainer, pl_module)
            if self.outcome["alpha"] < 1:
                measure_again(trainer, pl_module)

    def _judged(self, name: str, steering: Measured) -> float:
        """The upper bound of the change that all documents of the first probe would give.

        The end is judged by a bound that allows for the second probe, too. What lies between the two is cheaper to give
        up by going back a little than by a larger weight all along.
        """
        share = steering.documents / self._meters["first"].sets[name].num_documents
        return steering.change + _ONE_SIDED * steering.paired.standard_error * math.sqrt(share)

    def _bound(self, name: str, found: Measured) -> float:
        """What the estimate of the second probe will not be above, with 95 % confidence.

        Its documents are others, so that it has an error of its own: the distance of the upper bound of the change, as
        the first probe gives it, grows by the square root of `1 + documents of the first / of the second`.
        """
        first, second = (self._meters[key].sets[name].num_documents for key in ("first", "second"))
        return found.change + (found.upper() - found.change) * math.sqrt(1 + first / second)

    def _turn(self, stage: Stage) -> None:
        for control in self.turned(stage):
            control.weight = self.controller.weight * self._given[control.name]

    def _measured(self, key: str, trainer: L.Trainer, stage: Stage) -> dict[str, Measured]:
        began = time.perf_counter()
        found = self._meters[key].measure(trainer, stage)
        self.seconds += time.perf_counter() - began
        return found

    @staticmethod
    def _worst(measured: dict[str, Measured]) -> Measured:
        return max(measured.values(), key=lambda one: one.change)

    # ---- the end --------------------------------------------------------------------------------------------------

    def _finish(self, trainer: L.Trainer, stage: Stage) -> None:
        """Takes the weights back as far as it takes, reads the second probe, and says how it ended."""
        self.ended_at = trainer.global_step
        alpha = 1.0
        assert stage.policy is not None
        if self.project and stage.strategy.not_between(stage.policy.lm) is None:
            alpha = self._alpha(trainer, stage)
        gain = kept = self._gain(trainer, stage)
        if alpha < 1:
            stage.strategy.interpolate(stage.policy.lm, alpha)
            kept = self._gain(trainer, stage)
        verdict = self._worst(self._measured("second", trainer, stage))
        self.outcome = {
            "limit": self.limit,
            "alpha": alpha,
            "verdict": verdict.change,
            "verdict_low": verdict.low,
            "verdict_high": verdict.high,
            "met": float(verdict.change <= self.limit),
        }
        if gain is not None and kept is not None:
            self.outcome |= {"gain": gain, **({"kept": kept / gain} if gain > 0 else {})}
        self._log(trainer, self.outcome)
        self._say(trainer, f"budget     {self.line(trainer)}")

    def _gain(self, trainer: L.Trainer, stage: Stage) -> float | None:
        """What has been learnt: by how much the loss on target rows fell, or the stage's own validation got better.

        None where it is not known where the run began.
        """
        if _TARGET in self._meters:
            return -self._measured(_TARGET, trainer, stage)[_TARGET].change
        key = stage.judged_by
        if key is None or key not in stage.start_metrics or not trainer.enable_validation:
            return None
        began = time.perf_counter()
        gain = stage.validated()[key] - stage.start_metrics[key]
        self.seconds += time.perf_counter() - began
        return gain if stage.best_by[1] == "max" else -gain

    def _alpha(self, trainer: L.Trainer, stage: Stage) -> float:
        """The largest share of the way from the start whose verdict will meet the budget, as the first probe says."""
        assert stage.policy is not None
        lm = stage.policy.lm

        def lost(share: float) -> float:
            with nullcontext() if share == 1 else stage.strategy.at(lm, share):
                measured = self._measured("first", trainer, stage)
            return max(self._bound(name, one) for name, one in measured.items())

        return largest_share(lost, self.limit)

    def line(self, trainer: L.Trainer) -> str:
        """How it ended, in one line."""
        got = self.outcome
        percent = [f"{math.expm1(got[key]):+.1%}" for key in ("verdict", "verdict_low", "verdict_high")]
        texts = len(next(iter(self._meters["second"].sets.values())).examples)
        way = f"the weights went {got['alpha']:.0%} of the way from the start"
        if "kept" in got:
            way += f" and kept {got['kept']:.0%} of what was learnt by then ({got['gain'] * got['kept']:.3f} of "
            way += f"{got['gain']:.3f}, {self._unit})"
        elif "gain" in got:
            worse = f"worse than before by {-got['gain']:.3f}, {self._unit}" if got["gain"] < 0 else self._unit
            way += f", and nothing was learnt ({worse})"
        words = [
            f"{self.max_increase:.1%} {'met' if got['met'] else 'NOT met'}: perplexity {percent[0]} "
            f"[{percent[1]}, {percent[2]}] on {texts:,} texts that steered nothing",
            way,
        ]
        if self._given:
            words.append(f"weight of {', '.join(self._given)} {self.lowest:.2g} to {self.highest:.2g}")
        words.append(f"measuring took {self.seconds / max(self._spent(), 1e-9):.0%} of the run")
        return "; ".join(words)

    def _spent(self) -> float:
        """Seconds of training, those before a stop included."""
        return self._earlier + (time.perf_counter() - self._began if self._began else 0.0)

    @property
    def last_values(self) -> dict[str, float]:
        """How it ended, as it is logged."""
        return self._named(self.outcome)

    def _named(self, values: dict[str, float]) -> dict[str, float]:
        return {f"forgetting/{self.name}/{key}": value for key, value in values.items()}

    def _log(self, trainer: L.Trainer, values: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(self._named(values), step=trainer.global_step)

    @staticmethod
    def _say(trainer: L.Trainer, text: str) -> None:
        if trainer.is_global_zero:
            print(text, flush=True)

    # ---- state ----------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "controller": self.controller.state_dict(),
            "lowest": self.lowest,
            "highest": self.highest,
            "seconds": self.seconds,
            "spent": self._spent(),
            "outcome": dict(self.outcome),
            "ended_at": self.ended_at,
            "infeasible_at": self.infeasible_at,
            "turned_at": self._turned_at,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.controller.load_state_dict(state_dict["controller"])
        for name in ("lowest", "highest", "seconds", "ended_at", "infeasible_at"):
            setattr(self, name, state_dict[name])
        self._earlier, self.outcome = state_dict["spent"], dict(state_dict["outcome"])
        self._turned_at = state_dict["turned_at"]


def _allowed(stage: Stage, step: int, last: int) -> float:
    """The part of the limit that may be forgotten by now if it is to be kept in the end at the present weight.

    Args:
        stage: The stage.
        step: Optimizer steps taken.
        last: Optimizer steps of the run.
    """
    share = min(1.0, step / (_RISE * last))
    if stage.make_scheduler is not None:
        return share
    rate = stage.rate(last)
    return share * (1 + _SETTLES * max(0.0, rate(step) - rate(last - 1)))


__all__ = ["ForgettingBudget"]
