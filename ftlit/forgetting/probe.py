"""Measures, while a model learns, what it forgets."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import lightning as L
import numpy as np
from lightning.pytorch.strategies import ModelParallelStrategy
from typing_extensions import override

from ftlit.batch import Example
from ftlit.data.prompts import PromptData
from ftlit.data.store import measure
from ftlit.data.templating import ChatTemplate
from ftlit.errors import ConfigError
from ftlit.forgetting.base import ForgettingControl
from ftlit.forgetting.documents import Documents, read_documents
from ftlit.forgetting.drift import OUTSIDE, Drift, drift, start_norms
from ftlit.forgetting.measuring import Measured, Meter
from ftlit.forgetting.own_text import own_text
from ftlit.models.policy import Policy

if TYPE_CHECKING:
    from ftlit.stages.base import Stage

OWN = "self"
TARGET = "target"
_TAKEN = ("worst", "weights", TARGET)
_ENDS = ("change", "change_low", "change_high")
_KEYS = ("nll", *_ENDS, "ppl_ratio", "agreement")


class ForgettingProbe(ForgettingControl):
    """Scores held-out text with the start model, once, and with the present one while it learns.

    Logged for each domain, as `forgetting/DOMAIN/...`: `nll` (nats a token), `change` since the start (nats a token;
    above 0 is forgotten) with its 95 % interval `change_low`, `change_high` (a bootstrap over documents), `ppl_ratio`
    (perplexity now over perplexity at the start), `kl` (mean KL(start || now), nats a token), `agreement` (share of
    tokens whose likeliest choice is that of the start). Over all: `forgetting/worst/change` of the domain that lost
    most; `forgetting/weights/change`, the relative change of the weights; and the same as for a domain as
    `forgetting/target/...` for the first of the run's own validation rows: what was learnt, and the KL that tells
    forgetting ahead (Shenfeld et al. 2025, arXiv:2509.04259); of held-out prompts that have no answers `kl` and
    `agreement` alone, on what the start model says to them. `ftlit fit` ends with a table and two pictures of them.

    It only looks: training is bitwise the same with and without. Ranks share the documents. Of several probes, such as
    a small one that measures often and a large one for the end, the first in the list measures target and weights too;
    the domain that lost most in another is logged as `forgetting/NAME_worst/...`.

    Args:
        domains: Documents by name: a file, a folder, a hub id, `sample:NAME`, or `self` for text that the start model
            writes itself. Of a conversation the answers are scored, of raw text every token. Left out, the 150 general
            questions that ship with ftlit: enough to tell a change of about 0.02 nats a token; give a few hundred
            documents of what you want to keep for a finer one.
        max_tokens: Most tokens of a domain, prompts included: the cost of a probe is a forward pass over them. Of more,
            whole documents are chosen at random.
        at_steps: Optimizer steps to measure after, such as `[2, 5, 10]`: forgetting is fastest early.
        every_n_steps: Also every so many optimizer steps.
        at_validations: Whether to measure with each validation.
        at_end: Whether to measure after the last step.
        kl: Whether to measure KL too; keeps the start model's hidden states of the scored tokens in memory.
        own_rows: How many texts the start model writes for `self`; made once and kept on disk.
        own_new_tokens: Most tokens of each of its answers.
        own_first: Number of the first of these texts. Beside a `ForgettingBudget` take 32768: the texts from 0 on steer
            it and would flatter, those from there on judge it.
        batch_tokens: Most tokens scored at once: bounds memory; `data.max_tokens` when left out.
        seed: Seed of the choice of documents, of the texts and of the bootstrap.
        name: What it is called, where there are several.

    Raises:
        ConfigError: If a number is out of range, or a domain has a name that is taken.
    """

    in_loss: ClassVar[bool] = False
    has_weight: ClassVar[bool] = False

    def __init__(
        self,
        domains: dict[str, str] | None = None,
        max_tokens: int = 16384,
        at_steps: list[int] | None = None,
        every_n_steps: int | None = None,
        at_validations: bool = True,
        at_end: bool = True,
        kl: bool = True,
        own_rows: int = 128,
        own_new_tokens: int = 128,
        own_first: int = 0,
        batch_tokens: int | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(0.0, name)
        for key, value, least in (
            ("max_tokens", max_tokens, 2),
            ("every_n_steps", every_n_steps, 1),
            ("at_steps", min(at_steps or [1]), 1),
            ("own_rows", own_rows, 1),
            ("own_new_tokens", own_new_tokens, 2),
            ("own_first", own_first, 0),
            ("batch_tokens", batch_tokens, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"ForgettingProbe.{key} must be at least {least}, got {value}.")
        self.domains = {"general": "sample:general"} if domains is None else dict(domains)
        if not self.domains:
            raise ConfigError("ForgettingProbe.domains is empty: name at least one, such as {general: sample:general}.")
        for domain in self.domains:
            if domain in _TAKEN or not domain or "/" in domain:
                raise ConfigError(
                    f"ForgettingProbe cannot call a domain {domain!r}: {', '.join(_TAKEN)} are taken, and a name "
                    "has no slash; call it otherwise."
                )
        self.max_tokens, self.at_steps, self.every_n_steps = max_tokens, sorted(at_steps or []), every_n_steps
        self.at_validations, self.at_end, self.with_kl = at_validations, at_end, kl
        self.own_rows, self.own_new_tokens, self.batch_tokens = own_rows, own_new_tokens, batch_tokens
        self.own_first, self.seed = own_first, seed
        self.limit: float | None = None
        """The change that is allowed, nats a token, where there is a budget: the pictures show it."""
        self.listeners: list[Callable[[L.Trainer, Stage], None]] = []
        """Called after each round, while the model is still the one that was measured."""
        self.measured: dict[str, Measured] = {}
        self.drift: Drift | None = None
        self.start_values: dict[str, float] = {}
        self.last_values: dict[str, float] = {}
        self.seconds, self.start_seconds, self.rounds = 0.0, 0.0, 0
        self._last_step: int | None = None
        self._first = True  # of the probes of the run
        self._answered = False  # whether the target's answers are the start model's
        self._meter: Meter | None = None
        self._norms: dict[int, float] = {}
        self._words: dict[str, str] = {}

    @property
    def _worst(self) -> str:
        """What the domain that lost most is called in the log."""
        return "worst" if self._first else f"{self.name}_worst"

    @property
    def worst_change(self) -> float:
        """The change of the domain that lost most, as last measured, nats a token."""
        return self.last_values[f"forgetting/{self._worst}/change"]

    @property
    def layers(self) -> dict[str, float]:
        """The relative change of the weights of each layer, as last measured."""
        found = {} if self.drift is None else self.drift.layers
        return {"outside" if layer == OUTSIDE else str(layer): size for layer, size in found.items()}

    # ---- the start ------------------------------------------------------------------------------------------------

    @override
    def refuse(self, stage: Stage) -> str | None:
        if not isinstance(stage.policy, Policy):
            return f"{type(stage).__name__} trains a model without next tokens, which is what is measured."
        if not isinstance(getattr(getattr(stage.trainer, "datamodule", None), "template", None), ChatTemplate):
            return "its data module has no chat template to read the documents with."
        if stage.strategy.trains_base and isinstance(stage.trainer.strategy, ModelParallelStrategy):
            return "the start of a model that is trained whole cannot be had while its weights are sharded; use ddp."
        others = [one for one in stage.controls if isinstance(one, ForgettingProbe) and one is not self]
        twice = [domain for domain in self.domains if any(domain in one.domains for one in others)]
        if twice:
            return f"another probe measures {twice[0]!r} too; call the domain otherwise in one of them."
        return None

    @override
    def prepare(self, stage: Stage) -> None:
        """Reads the documents and scores the start model on them."""
        began = time.perf_counter()
        trainer = stage.trainer
        assert stage.policy is not None
        stage.strategy.remember_start(stage.policy.lm)
        data: Any = trainer.datamodule
        self._first = next(one for one in stage.controls if isinstance(one, ForgettingProbe)) is self
        sets = {name: self._documents(stage, data, rows, name) for name, rows in self.domains.items()}
        self._answered = False
        if self._first and (target := self._target(stage, data)) is not None:
            sets[TARGET] = target
        room = self.batch_tokens or getattr(data, "max_tokens", None) or 4096
        self._meter = Meter(sets, room, keep_states=self.with_kl, seed=self.seed)
        self._meter.prepare(trainer, stage)
        self._norms = start_norms(stage.policy.lm, stage.strategy) if self._first else {}
        self.start_seconds = time.perf_counter() - began

    @override
    def held_out(self) -> dict[str, Sequence[Example]]:
        assert self._meter is not None
        return {name: self._meter.sets[name].examples for name in self.domains}

    def _documents(self, stage: Stage, data: Any, rows: str, name: str) -> Documents:
        if rows != OWN:
            documents, self._words[name] = read_documents(
                data,
                rows,
                max_tokens=self.max_tokens,
                max_length=getattr(data, "max_length", 1024),
                seed=self.seed,
                quiet=not stage.trainer.is_global_zero,
            )
            return documents
        texts = own_text(
            stage, None, self.own_rows, max_new_tokens=self.own_new_tokens, seed=self.seed, skip=self.own_first
        )
        documents = _first(texts, self.max_tokens)
        tokens = int(measure(documents.examples).targets.sum())
        self._words[name] = f"{len(documents.examples):,} of its own texts, {tokens:,} scored tokens"
        return documents

    def _target(self, stage: Stage, data: Any) -> Documents | None:
        """A few of the run's own validation rows; None without any.

        Held-out prompts that have no answers get those of the start model: they say how far the model has gone there,
        and nothing of what was learnt.
        """
        held_out = f"validation:{stage.judged_on}"
        examples: Sequence[Example] | None = data.sets.get(held_out)
        if examples is None and isinstance(data, PromptData) and held_out in data.rows:
            self._answered = True
            sampling = getattr(stage, "sampling", None)
            new = self.own_new_tokens if sampling is None else min(self.own_new_tokens, sampling.max_new_tokens)
            prompts = [row.input_ids for row in data.rows[held_out]]
            upto = np.cumsum([len(prompt) + new for prompt in prompts])
            prompts = prompts[: max(1, int(np.searchsorted(upto, self.max_tokens // 4, side="right")))]
            examples = own_text(stage, prompts, len(prompts), max_new_tokens=max(new, 2), seed=self.seed)
        return None if examples is None else _first(examples, self.max_tokens // 4)

    @override
    def describe(self) -> str:
        when = [f"at steps {', '.join(map(str, self.at_steps))}"] if self.at_steps else []
        when += [f"every {self.every_n_steps} steps"] if self.every_n_steps else []
        when += ["at validations"] if self.at_validations else []
        when += ["at the end"] if self.at_end else []
        what = "; ".join(f"{name} ({self.domains[name]}): {words}" for name, words in self._words.items())
        return f"{self.name}: {what}; measured {' and '.join([', '.join(when[:-1]), when[-1]] if when[1:] else when)}"

    # ---- when -----------------------------------------------------------------------------------------------------

    def measures_before_the_end(self, trainer: L.Trainer) -> bool:
        """Whether it measures while the model still trains."""
        validates = cast("Stage", trainer.lightning_module).judged_on is not None and trainer.enable_validation
        return bool(self.at_steps or self.every_n_steps or (self.at_validations and validates))

    def logged_at_validations(self, trainer: L.Trainer) -> list[str]:
        """Whole names of what it logs at validations, known before the first."""
        stage = cast("Stage", trainer.lightning_module)
        if not self.at_validations:
            return []
        first = next(one for one in stage.controls if isinstance(one, ForgettingProbe)) is self
        keys = [*_KEYS, *(["kl"] if self.with_kl else [])]
        names = [f"forgetting/{domain}/{key}" for domain in self.domains for key in keys]
        names += [f"forgetting/{'worst' if first else f'{self.name}_worst'}/{key}" for key in _ENDS]
        if first and stage.judged_on is not None:
            answered = isinstance(getattr(trainer, "datamodule", None), PromptData)
            kept = ["agreement", *(["kl"] if self.with_kl else [])] if answered else keys
            names += [f"forgetting/{TARGET}/{key}" for key in kept]
        return [*names, "forgetting/weights/change"] if first else names

    def on_train_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Where the run starts from: by definition nothing is forgotten yet."""
        if trainer.global_step and self.start_values:  # a run that goes on has logged them
            return
        self.start_values = self._start_values()
        if not trainer.global_step:
            _to_loggers(trainer, self.start_values)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Stage, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At chosen optimizer steps; where a validation follows, it measures there.

        After the last step it waits for the end: a budget may still take the weights back.
        """
        step = trainer.global_step
        validates = pl_module.judged_on is not None and pl_module.validates_here()
        if self._asked(step) and step < pl_module.planned_steps and not validates:
            self.observe(trainer, pl_module)

    def _asked(self, step: int) -> bool:
        return step in self.at_steps or bool(self.every_n_steps and step % self.every_n_steps == 0)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """At validations: logged like their losses, so that checkpoints and early stopping can watch it."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        step = trainer.global_step
        last = self.at_end and step >= pl_module.planned_steps
        if self._last_step == step or not (self.at_validations or last or self._asked(step)):
            return
        for key, value in self._round(trainer, pl_module).items():
            # Already the same on all ranks; the mean of equal numbers only keeps Lightning from warning.
            pl_module.log(key, value, sync_dist=trainer.world_size > 1, batch_size=1)

    def on_train_end(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """At the end, where no validation was."""
        step = trainer.global_step
        if step and (self.at_end or self._asked(step)) and self._last_step != step:
            self.observe(trainer, pl_module)

    # ---- a round --------------------------------------------------------------------------------------------------

    def measure(
        self, trainer: L.Trainer, stage: Stage, kl: bool = False, domains: Sequence[str] | None = None
    ) -> dict[str, Measured]:
        """Measures the model as it is, without logging; all ranks must call, all get the same.

        Args:
            trainer: The trainer.
            stage: The stage.
            kl: Whether to compute KL too.
            domains: The domains to measure; all when left out.
        """
        assert self._meter is not None
        began = time.perf_counter()
        found = self._meter.measure(trainer, stage, kl, list(self.domains) if domains is None else domains)
        self.seconds += time.perf_counter() - began
        return found

    def observe(self, trainer: L.Trainer, stage: Stage) -> dict[str, Measured]:
        """Measures the model as it is and logs it at the present step; whoever changes the weights afterwards calls it.

        Args:
            trainer: The trainer.
            stage: The stage.
        """
        _to_loggers(trainer, self._round(trainer, stage))
        return self.measured

    def _round(self, trainer: L.Trainer, stage: Stage) -> dict[str, float]:
        """Measures, keeps, shows; the values are the same on all ranks."""
        assert self._meter is not None
        assert stage.policy is not None
        began = time.perf_counter()
        found = self.measure(trainer, stage, self.with_kl, list(self._meter.sets))
        if self._first:
            self.drift = drift(stage.policy.lm, stage.strategy, self._norms)
        self.measured = {name: found[name] for name in self.domains}
        self.last_values = self._logged(_values(self.measured, found.get(TARGET), self.drift, self._worst))
        self._last_step = trainer.global_step
        self.rounds += 1
        if trainer.is_global_zero:
            print(self._line(trainer.global_step, time.perf_counter() - began), flush=True)
        for listener in self.listeners:
            listener(trainer, stage)
        return self.last_values

    def _start_values(self) -> dict[str, float]:
        assert self._meter is not None
        values: dict[str, float] = {}
        for name, nll in self._meter.start_nll().items():
            none = {
                "nll": nll,
                "change": 0.0,
                "change_low": 0.0,
                "change_high": 0.0,
                "ppl_ratio": 1.0,
                "agreement": 1.0,
            }
            none |= {"kl": 0.0} if self.with_kl else {}
            values |= {f"forgetting/{name}/{key}": value for key, value in none.items()}
        values |= {f"forgetting/{self._worst}/{key}": 0.0 for key in ("change", "change_low", "change_high")}
        return self._logged(values)

    def _logged(self, values: dict[str, float]) -> dict[str, float]:
        """Without the loss of answers that the start model gave itself: it rises whatever is learnt."""
        kept = {f"forgetting/{TARGET}/{key}" for key in ("kl", "agreement")}
        hidden = f"forgetting/{TARGET}/" if self._answered else "/"
        return {key: value for key, value in values.items() if key in kept or not key.startswith(hidden)}

    def _line(self, step: int, seconds: float) -> str:
        parts = [
            f"{name} {one.change:+.4f} [{one.low:+.4f}, {one.high:+.4f}] (perplexity x {one.perplexity_ratio:.3f})"
            for name, one in self.measured.items()
        ]
        return f"step {step}: forgotten, nats a token: {'; '.join(parts)} ({seconds:.1f} s)"

    # ---- state ----------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "start": self.start_values,
            "last": self.last_values,
            "last_step": self._last_step,
            "seconds": self.seconds,
            "rounds": self.rounds,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start_values, self.last_values = dict(state_dict["start"]), dict(state_dict["last"])
        self._last_step = state_dict["last_step"]
        self.seconds, self.rounds = state_dict["seconds"], state_dict["rounds"]


def _values(
    measured: dict[str, Measured], target: Measured | None, moved: Drift | None, worst_name: str
) -> dict[str, float]:
    """What is logged of a round."""
    values: dict[str, float] = {}
    for name, one in {**measured, **({} if target is None else {TARGET: target})}.items():
        known = {
            "nll": one.nll,
            "change": one.change,
            "change_low": one.low,
            "change_high": one.high,
            "ppl_ratio": one.perplexity_ratio,
            "agreement": one.agreement,
        }
        known |= {} if one.kl is None else {"kl": one.kl}
        values |= {f"forgetting/{name}/{key}": value for key, value in known.items()}
    worst = max(measured.values(), key=lambda one: one.change)
    ends = {"change": worst.change, "change_low": worst.low, "change_high": worst.high}
    values |= {f"forgetting/{worst_name}/{key}": value for key, value in ends.items()}
    return values if moved is None else {**values, "forgetting/weights/change": moved.overall}


def _first(examples: Sequence[Example], max_tokens: int) -> Documents:
    """The first examples that hold together at most so many tokens; one at least."""
    upto = np.cumsum(measure(examples).lengths)
    count = max(1, int(np.searchsorted(upto, max_tokens, side="right")))
    return Documents([examples[i] for i in range(count)])


def _to_loggers(trainer: L.Trainer, values: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)


__all__ = ["OWN", "TARGET", "ForgettingProbe"]
