"""What every control of forgetting must hold. A control outside ftlit gets these tests from a few lines."""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from typing_extensions import override

from ftlit.batch import Example, pack
from ftlit.callbacks.checkpoint import SaveCheckpoint
from ftlit.data.datamodules import SFTData
from ftlit.data.store import Examples, Joined
from ftlit.errors import ConfigError
from ftlit.forgetting.base import ForgettingControl
from ftlit.peft import Full, LoRA, PEFTStrategy, PrefixTuning, PromptTuning
from ftlit.stages import SFT
from ftlit.testing.tiny import tiny_examples, tiny_lm, tiny_tokenizer

OWN = (9, 4, 4, 12, 2, 7, 15, 3, 6, 6, 11, 5, 8, 2, 3, 10, 4, 9, 7, 5)
GENERAL = (7, 3, 10, 5, 6, 4, 8)
STRATEGIES: dict[str, Callable[[], PEFTStrategy]] = {
    "Full": Full,
    "LoRA": lambda: LoRA(rank=3),
    "PrefixTuning": lambda: PrefixTuning(3),
    "PromptTuning": lambda: PromptTuning(3),
}
_STOP_AT = 3


class TinyData(SFTData):
    """Random rows instead of files: twenty to train on, seven that a control may add.

    Args:
        plan: `batch_size`, `max_tokens` and other settings of `SFTData`.
    """

    def __init__(self, **plan: Any) -> None:
        super().__init__(train="made in code", **{"batch_size": 8, "max_tokens": None, "shuffle": False, **plan})

    @override
    def setup(self, stage: str) -> None:
        self.sets.setdefault("train", _joined(tiny_examples(OWN)))

    @override
    def load_added(self, name: str, file: str) -> Joined:
        return _joined(tiny_examples(GENERAL, seed=7))


class Ran(NamedTuple):
    """A run on a tiny model.

    Attributes:
        stage: The stage, trained; None where other processes trained it.
        weights: What was trained, by name.
        gradients: For each step those that the optimizer got, before clipping.
        metrics: For each step what was logged.
        state: The state of the control.
    """

    stage: SFT | None
    weights: dict[str, Tensor]
    gradients: list[dict[str, Tensor]]
    metrics: list[dict[str, float]]
    state: dict[str, Any]


class _Record(L.Callback):
    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.metrics: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, stage: Any, optimizer: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in stage.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer: L.Trainer, stage: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.metrics.append(dict(stage.step_metrics))


class _Stop(L.Callback):
    """Asks the run to stop as SIGTERM does."""

    def on_train_batch_end(self, trainer: L.Trainer, stage: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == _STOP_AT:
            signals: Any = trainer._signal_connector
            signals.received_sigterm = True


class _Write(L.Callback):
    """Writes what was trained: the run was in other processes."""

    def __init__(self, path: Path, record: _Record) -> None:
        self.path, self.record = path, record

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            torch.save((_trained(pl_module), self.record.metrics), self.path)


class ForgettingControlSuite(ABC):
    """Conformance of a control, in float64 on a tiny model, in four optimizer steps with clipping.

    Example:
        ```python
        class TestReplay(ForgettingControlSuite):
            logged = ("loss", "tokens")

            def make(self, weight=1.0):
                return Replay(rows="general.jsonl", weight=weight)
        ```

    Attributes:
        strategies: What to test with, by name.
        refused: Names of those that the control refuses.
        silent_at_start: Whether the first gradient is what it is without the control, because nothing has changed yet.
        holds: Whether a large weight keeps the model closer to its start.
        large: What a large weight is.
        weighted: Whether `make` takes a weight.
        logged: What every step logs under the control's name.
        tolerance: Largest difference between cuts of a step.
    """

    strategies: dict[str, Callable[[], PEFTStrategy]] = STRATEGIES
    refused: frozenset[str] = frozenset()
    silent_at_start: bool = True
    holds: bool = True
    large: float = 30.0
    weighted: bool = True
    logged: tuple[str, ...] = ("loss",)
    tolerance: float = 1e-9

    @abstractmethod
    def make(self, weight: float = 1.0) -> ForgettingControl:
        """A new control."""

    # ---- helpers --------------------------------------------------------------------------------------------------

    def _made(self, weight: float = 1.0) -> ForgettingControl:
        return self.make(weight) if self.weighted else self.make()

    def _sound(self) -> dict[str, Callable[[], PEFTStrategy]]:
        return {name: make for name, make in self.strategies.items() if name not in self.refused}

    def run(
        self,
        strategy: PEFTStrategy,
        control: ForgettingControl | None,
        *,
        folder: Path | None = None,
        more: Sequence[L.Callback] = (),
        ckpt: Path | None = None,
        accumulate: int = 1,
        steps: int = 4,
        ranks: int = 1,
        sgd: bool = False,
        **plan: Any,
    ) -> Ran:
        """Trains a tiny model.

        Args:
            strategy: What is trained.
            control: The control, if any.
            folder: Where checkpoints go.
            more: Further callbacks.
            ckpt: Checkpoint to go on from.
            accumulate: Micro-batches a step.
            steps: Optimizer steps.
            ranks: Processes.
            sgd: Plain gradient descent, whose step is proportional to the gradient.
            plan: Settings of the data.
        """
        torch.manual_seed(0)
        optimizer = (lambda groups: torch.optim.SGD(groups, lr=0.02)) if sgd else None
        stage = SFT(tiny_lm(dtype=torch.float64), strategy, lr=1e-2, warmup=2, optimizer=optimizer)
        stage.tokenizer = tiny_tokenizer()
        record = _Record()
        callbacks: list[Any] = [*([] if control is None else [control]), record, *more]
        if folder is not None:
            callbacks.append(SaveCheckpoint(save_best=False))
        results = None if folder is None else folder / "results.pt"
        if ranks > 1:
            assert results is not None
            callbacks = [*callbacks[:-1], _Write(results, record)]
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = L.Trainer(
                accelerator="cpu",
                devices=ranks,
                strategy="ddp_fork" if ranks > 1 else "auto",
                precision="64-true",
                max_steps=steps,
                max_epochs=-1,
                gradient_clip_val=0.5,
                accumulate_grad_batches=accumulate,
                logger=False,
                enable_checkpointing=folder is not None and ranks == 1,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                default_root_dir=str(folder or "."),
                callbacks=callbacks,
            )
            trainer.fit(stage, TinyData(**plan), ckpt_path=ckpt)
        if ranks > 1:
            assert results is not None
            weights, metrics = torch.load(results, weights_only=True)
            return Ran(None, weights, [], metrics, {})
        state = {} if control is None else control.state_dict()
        return Ran(stage, _trained(stage), record.gradients, record.metrics, state)

    def distance(self, stage: SFT) -> float:
        """How far the model is from its start: mean KL on own and general rows, nats a token."""
        assert stage.policy is not None
        rows = pack([*tiny_examples(OWN), *tiny_examples(GENERAL, seed=7)])
        with torch.no_grad():
            scores = stage.policy(rows, kl={0: 1.0})
        assert scores.kl is not None
        return float(scores.kl.mean())

    # ---- what it does ---------------------------------------------------------------------------------------------

    def test_it_works_with_a_strategy_or_says_why_not(self) -> None:
        """A refusal is one sentence."""
        for name, strategy in self.strategies.items():
            if name in self.refused:
                with pytest.raises(ConfigError) as error:
                    self.run(strategy(), self._made(), steps=1)
                text = str(error.value)
                assert text.endswith(".")
                assert "\n" not in text
                assert type(self._made()).__name__ in text
            else:
                self.run(strategy(), self._made(), steps=1)

    def test_at_the_start_it_pulls_nowhere(self) -> None:
        """The first gradient is that of a run without the control, where it says so and the strategy starts there."""
        for name, strategy in self._sound().items():
            if self.distance(_fresh(strategy())) > 1e-12:
                continue  # virtual tokens change the model before they are trained
            first = self.run(strategy(), self._made(10.0), steps=1).gradients[0]
            plain = self.run(strategy(), None, steps=1).gradients[0]
            off = max(float((first[key] - one).abs().max()) for key, one in plain.items())
            assert (off < 1e-9) == self.silent_at_start, f"{name}: the first gradient differs by {off}"

    def test_it_keeps_the_model_closer_to_its_start(self) -> None:
        """Further with a larger weight."""
        if not self.holds:
            return
        for name, strategy in self._sound().items():
            weights = (0.0, self.large) if self.weighted else (None, 1.0)
            found = []
            for weight in weights:
                control = None if weight is None else self._made(weight)
                stage = self.run(strategy(), control, sgd=True).stage
                assert stage is not None
                found.append(self.distance(stage))
            assert found[1] < 0.998 * found[0], f"{name}: {found[1]} with it, {found[0]} without"

    def test_it_does_something(self) -> None:
        """Training ends elsewhere than without it."""
        for name, strategy in self._sound().items():
            with_it, plain = self.run(strategy(), self._made()), self.run(strategy(), None)
            off = max(float((with_it.weights[key] - one).abs().max()) for key, one in plain.weights.items())
            assert off > 1e-9, f"{name}: nothing is different with the control"

    def test_with_weight_zero_training_is_bitwise_what_it_is_without(self) -> None:
        """Also where micro-batches are capped by their tokens."""
        if not self.weighted:
            return
        for name, strategy in self._sound().items():
            none = self.run(strategy(), self._made(0.0), batch_size=4, accumulate=2, max_tokens=17)
            plain = self.run(strategy(), None, batch_size=4, accumulate=2, max_tokens=17)
            for key, one in plain.weights.items():
                assert torch.equal(none.weights[key], one), f"{name}: {key} is another with weight 0"

    def test_how_a_step_is_cut_does_not_matter(self) -> None:
        """Neither for the weights nor for what is logged."""
        for name, strategy in self._sound().items():
            whole = self.run(strategy(), self._made())
            cut = self.run(strategy(), self._made(), batch_size=2, accumulate=4, max_tokens=17)
            self._alike(cut, whole, name)

    def test_ranks_do_not_matter(self, tmp_path: Path) -> None:
        """Two processes train what one trains; with the first two strategies, so that it stays quick."""
        for name, strategy in list(self._sound().items())[:2]:
            folder = tmp_path / name
            folder.mkdir(parents=True)
            two = self.run(strategy(), self._made(), folder=folder, ranks=2, batch_size=4)
            self._alike(two, self.run(strategy(), self._made()), name)

    def test_a_run_that_goes_on_keeps_it(self, tmp_path: Path) -> None:
        """Stopped after three of four steps and gone on by a new control: bitwise the run that never stopped."""
        for name, strategy in self._sound().items():
            whole = self.run(strategy(), self._made())
            folder = tmp_path / name
            with pytest.raises(SIGTERMException):
                self.run(strategy(), self._made(), folder=folder, more=[_Stop()])
            then = self.run(strategy(), self._made(), folder=folder, ckpt=folder / "checkpoints/last.ckpt")
            for key, one in whole.weights.items():
                assert torch.equal(then.weights[key], one), f"{name}: {key} is another after a stop"
            for ours, theirs in zip(then.metrics, whole.metrics[_STOP_AT:], strict=True):
                assert _lasting(ours) == _lasting(theirs), f"{name}: what is logged is other after a stop"

    def test_it_is_logged_under_its_name(self) -> None:
        """Every step logs the same numbers under it."""
        for strategy in self._sound().values():
            control = self._made()
            for values in self.run(strategy(), control).metrics:
                mine = {key for key in values if key.startswith("forgetting/")}
                assert mine >= {f"forgetting/{control.name}/{key}" for key in self.logged}, sorted(values)
                assert all(key.startswith(f"forgetting/{control.name}/") for key in mine), sorted(mine)

    def test_its_state_is_made_of_plain_things(self) -> None:
        """Numbers, strings and tensors: a checkpoint runs no code when it is read."""
        for strategy in self._sound().values():
            _plain(self.run(strategy(), self._made()).state)

    def _alike(self, ours: Ran, theirs: Ran, name: str) -> None:
        for key, one in theirs.weights.items():
            torch.testing.assert_close(ours.weights[key], one, rtol=0, atol=self.tolerance, msg=f"{name}: {key}")
        for mine, other in zip(ours.metrics, theirs.metrics, strict=True):
            assert _lasting(mine) == pytest.approx(_lasting(other), abs=1e-8, rel=1e-8), name


def _joined(examples: list[Example]) -> Joined:
    count = len(examples)
    return Joined([Examples.of(examples, list(range(count)), [False] * count)])


def _fresh(strategy: PEFTStrategy) -> SFT:
    """A stage before its first step."""
    stage = SFT(tiny_lm(dtype=torch.float64), strategy)
    stage.configure_model()
    assert stage.policy is not None
    strategy.remember_start(stage.policy.lm)
    return stage


def _trained(stage: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in stage.named_parameters() if p.requires_grad}


def _lasting(metrics: dict[str, float]) -> dict[str, float]:
    """What is no measure of speed."""
    return {key: value for key, value in metrics.items() if "per_s" not in key}


def _plain(value: Any) -> None:
    if isinstance(value, dict):
        for key, one in value.items():
            _plain(key)
            _plain(one)
    elif isinstance(value, list | tuple):
        for one in value:
            _plain(one)
    else:
        assert value is None or isinstance(value, bool | int | float | str | Tensor), f"the state holds {value!r}"


__all__ = ["ForgettingControlSuite", "TinyData"]
