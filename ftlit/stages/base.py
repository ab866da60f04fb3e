"""What every stage shares: the policy, the optimizer, one optimizer step a batch, checkpoints of what is trained."""

from __future__ import annotations

import math
import os
import time
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, Self

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from ftlit.batch import PackedBatch, StepBatch, StepTotals
from ftlit.callbacks.checkpoint import SaveCheckpoint
from ftlit.callbacks.monitor import direct
from ftlit.callbacks.refused import check_callbacks
from ftlit.data.packing import StepLoader
from ftlit.device import wait_for
from ftlit.errors import ConfigError
from ftlit.export.beside import tokenizer_of
from ftlit.forgetting.base import ForgettingControl
from ftlit.forgetting.budget import ForgettingBudget
from ftlit.forgetting.early_stop import EarlyStopOnForgetting
from ftlit.forgetting.prepare import prepare_controls
from ftlit.models.limits import check_examples, check_token
from ftlit.models.load import load_lm, load_tokenizer, prepare
from ftlit.models.policy import Policy, recompute_activations
from ftlit.models.shard import shard
from ftlit.objectives.scores import TokenScores
from ftlit.peft import Full, PEFTStrategy
from ftlit.ranks import whole
from ftlit.stages.checkpoint_io import AtomicCheckpointIO
from ftlit.stages.evaluated import Evaluated
from ftlit.stages.fsdp import FSDP2
from ftlit.stages.going_on import base_print, going_on
from ftlit.stages.loops import finish, position
from ftlit.stages.optimizers import Schedule, build, layer_factors, parameter_groups, rate
from ftlit.stages.precision import check_precision, check_strategy, note_slow, widen
from ftlit.stages.rates import Rate, default_rate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_LOSS = "the loss that is minimized"  # beside the metrics of a step, which may be others
_STOP = "ranks that were asked to stop"


class MicroLoss(NamedTuple):
    """What a stage says of one micro-batch.

    Attributes:
        loss: Sum of the losses of its targets or pairs, not divided by anything; carries the gradient.
        sums: Sums over the micro-batch that become step metrics when divided by the step's weight.
    """

    loss: Tensor
    sums: dict[str, Tensor]


class Stage(Evaluated):
    """Base of all stages.

    A batch is one optimizer step, cut into micro-batches: all but the last are run and differentiated inside
    `training_step`, the last is returned to Lightning, which differentiates it and steps. So `max_steps`,
    `val_check_interval`, `log_every_n_steps`, schedules, callbacks and checkpoints count optimizer steps, and a
    checkpoint cannot fall between two micro-batches. The gradient is that of the sum over the whole step, divided once
    by the planned weight of the whole step: how the step is cut over micro-batches and ranks does not matter.

    Args:
        policy: The model to train: a hub id, a folder, a GGUF file, or a transformers model built in Python (then set
            `stage.tokenizer`).
        peft: What is trained; every weight when left out.
        lr: Peak learning rate; left out, the default of stage and strategy (`ftlit.stages.rates`).
        weight_decay: AdamW's decay of the trained parameters toward zero; norms and biases are left out.
        decay_all: Decay norms and biases too.
        betas: AdamW's decay rates of the gradient's moments.
        eps: AdamW's term in the denominator.
        layer_decay: Factor on the rate from one layer to the one below it: the output layer learns at `lr`, the last
            layer at `lr * layer_decay`, the embeddings slowest. 1: all alike.
        warmup: Linear warm-up: optimizer steps if 1 or more, else a share of all steps.
        schedule: What the rate does after the warm-up; `wsd` keeps it and lets it fall at the end.
        min_lr: The rate at the end of a `cosine`, `linear` or `wsd` schedule, as a share of `lr`.
        decay: The last part of a `wsd` schedule: optimizer steps if 1 or more, else a share of all steps.
        optimizer: Makes another optimizer than AdamW; `lr`, `weight_decay`, `betas` and `eps` are then its own
            business. It is given parameter groups where norms, biases or layers are treated differently.
        lr_scheduler: Makes another schedule, stepped once an optimizer step.
        gradient_checkpointing: Recompute activations in backward: about 1.5 times slower, far less memory.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ConfigError: If a number is out of range.
    """

    loss_unit: ClassVar[str] = "nats a trained token"
    """What the loss is measured in."""
    progress: ClassVar[dict[str, str]] = {"loss": "train/loss"}
    """Step metrics that the progress shows, and what they are called there."""

    def __init__(
        self,
        policy: str | Any,
        peft: PEFTStrategy | None = None,
        lr: float | None = None,
        weight_decay: float = 0.0,
        decay_all: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        layer_decay: float = 1.0,
        warmup: float = 0.03,
        schedule: Schedule = "cosine",
        min_lr: float = 0.0,
        decay: float = 0.1,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.strategy = peft or Full()
        self.rate_used = default_rate(type(self), type(self.strategy)) if lr is None else Rate(lr, "model.lr")
        lr = self.rate_used.value
        if lr <= 0 or warmup < 0 or not 0 <= min_lr <= 1:
            raise ConfigError(f"lr must be positive, warmup >= 0, min_lr in [0, 1]; got {lr}, {warmup}, {min_lr}.")
        if not 0 < layer_decay <= 1 or decay < 0 or weight_decay < 0 or eps <= 0:
            raise ConfigError(
                "layer_decay must be in (0, 1], decay and weight_decay >= 0, eps positive; "
                f"got {layer_decay}, {decay}, {weight_decay}, {eps}."
            )
        self._source = (policy,)  # a tuple, so that a model is not registered a second time beside the policy
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, betas, eps
        self.decay_all, self.layer_decay = decay_all, layer_decay
        self.warmup, self.schedule, self.min_lr, self.decay = warmup, schedule, min_lr, decay
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self.gradient_checkpointing, self.trust_remote_code = gradient_checkpointing, trust_remote_code
        self.policy: Policy | None = None
        self.accumulate = 1
        self._given: tuple[int, int | None] = (1, 1)
        self.grad_norm = float("nan")
        self.step_metrics: dict[str, float] = {}
        self._logged: dict[str, None] = {}  # every step metric so far
        # Checkpoints hold what is trained; on_load_checkpoint checks that all of it is there.
        self.strict_loading = False
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._started = self._lr = 0.0
        self.totals = StepTotals(0.0, 0, 0, 0)
        self._hooks: list[Any] = []
        self._settings: list[dict[str, Any]] = []
        self._means: dict[str, float] = {}
        self._of_controls: dict[str, float] = {}
        self._agreed_to_stop = False
        self._batch = StepBatch([], self.totals)
        self._prepared = False
        self._base = ""  # names the weights that the run stands on

    drawn_tokens: int = 0
    """Most tokens that the policy draws for each row and is trained on."""
    predicts_tokens: ClassVar[bool] = False
    """Whether its targets are tokens of given rows that the language model predicts."""

    # ---- what a stage says ----------------------------------------------------------------------------------------

    @abstractmethod
    def micro_loss(self, batch: PackedBatch, scores: TokenScores) -> MicroLoss:
        """Loss and metrics of one micro-batch, as sums.

        Args:
            batch: The micro-batch, with the stage's own targets only.
            scores: What the policy says of each of them.
        """

    @property
    def needs(self) -> frozenset[str]:
        """Token scores with gradients that `micro_loss` reads besides `logps` and `correct`."""
        return frozenset()

    @property
    def watch(self) -> frozenset[str]:
        """Token scores without gradients that it reads."""
        return frozenset()

    def scoring(self, batch: PackedBatch) -> dict[str, Any]:
        """Further arguments of the policy for a micro-batch."""
        return {}

    @abstractmethod
    def total(self, totals: StepTotals) -> float:
        """What the sums of a step are divided by: the weight of its targets, or the number of its pairs."""

    # ---- the model ------------------------------------------------------------------------------------------------

    @property
    def source(self) -> str | PreTrainedModel:
        """The policy as it was given."""
        return self._source[0]

    @property
    def name_of_policy(self) -> str:
        """The model as it was named, or the name its config carries."""
        return self.source if isinstance(self.source, str) else str(getattr(self.source.config, "name_or_path", ""))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer.

        Raises:
            ConfigError: If the policy was built in Python and no tokenizer was set.
        """
        if self._tokenizer is None:
            if not isinstance(self.source, str):
                raise ConfigError("a policy built in Python has no tokenizer: set stage.tokenizer.")
            adapter = getattr(self.strategy, "from_adapter", None)
            if adapter is not None and Path(adapter).is_dir():  # it goes on with the template it was trained with
                self._tokenizer = tokenizer_of(adapter, self.source, self.trust_remote_code)
            else:
                self._tokenizer = load_tokenizer(self.source, self.trust_remote_code)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def configure_model(self) -> None:
        """Loads the policy and applies the strategy, once, and prepares the controls of each fit.

        Lightning calls this where the strategy wants it built.
        """
        if self.policy is None:
            self._find_start()
            self.policy = self.make_policy().train()
            if self._trainer is not None and self._trainer.state.fn == "fit":
                self._base = base_print(self.policy.lm, self.strategy)
                widen(self.policy, str(self._trainer.precision).endswith("mixed"))
            if self._trainer is not None and isinstance(self._trainer.strategy, FSDP2):
                assert self.device_mesh is not None
                shard(self.policy, self.device_mesh["data_parallel"])
        if self._trainer is not None and self._trainer.state.fn == "fit" and not self._prepared:
            self._prepared = True
            self.check_sizes()
            prepare_controls(self)

    def check_sizes(self) -> None:
        """Refuses rows with tokens or positions that the model has no places for, before anything is run.

        Raises:
            ConfigError: Naming the first.
        """
        data: Any = getattr(self._trainer, "datamodule", None)
        assert self.policy is not None
        virtual = getattr(self.strategy, "num_virtual_tokens", 0)
        for name, examples in getattr(data, "sets", {}).items():
            check_examples(self.policy.lm, examples, name.replace(":", " "), virtual)
        for rows in getattr(data, "rows", {}).values():
            for row in rows:
                check_token(self.policy.lm, max(row.input_ids, default=0), row.where)

    def _find_start(self) -> None:
        """Takes from a checkpoint what its run began with, so that the folder of that adapter is not asked again."""
        path = getattr(self._trainer, "goes_on_from", None)
        if path is not None and getattr(self.strategy, "from_adapter", None) is not None:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self.strategy.start_state = checkpoint.get("ftlit", {}).get("start")

    def make_policy(self) -> Any:
        """The model with its strategy applied: a `Policy`, or a module that is called like one."""
        if isinstance(self.source, str):
            lm = load_lm(self.source, self._load_dtype(self.strategy), self.trust_remote_code)
        else:
            lm = self.source
            prepare(lm)
        if self.gradient_checkpointing:
            recompute_activations(lm)
        return Policy(lm, self.strategy)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts, but casts no buffer to a narrower type.

        With rotary frequencies in half precision tokens stand elsewhere: another model than the one that was loaded.
        """
        named = [(module, name, buffer) for module in self.modules() for name, buffer in module._buffers.items()]
        super()._apply(fn, recurse)
        for module, name, before in named:
            now = module._buffers[name]
            if before is not None and now is not None and now.element_size() < before.element_size():
                module._buffers[name] = before.to(now.device)
        return self

    def _load_dtype(self, strategy: PEFTStrategy) -> torch.dtype:
        """Frozen weights follow the precision; trained ones are float32 wherever they are trained."""
        precision = str(getattr(self._trainer, "precision", "32-true"))
        kind, _, mode = precision.partition("-")
        if kind == "64":
            return torch.float64
        half = {"bf16": torch.bfloat16, "16": torch.float16}.get(kind)
        return half if half is not None and (mode == "true" or not strategy.trains_base) else torch.float32

    @property
    def controls(self) -> list[ForgettingControl]:
        """The controls of forgetting of this run, in the order of the callbacks."""
        return [callback for callback in self.trainer.callbacks if isinstance(callback, ForgettingControl)]

    # ---- the optimizer --------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and decay, or what the config makes instead."""
        groups = self.parameter_groups()
        if self.make_optimizer is not None:
            optimizer = build(self.make_optimizer, groups)
        else:
            # A gradient scaler and the fused step do not go together: the step would see scaled gradients.
            fused = str(self.trainer.precision) != "16-mixed"
            options: dict[str, Any] = {"betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
            optimizer = build(lambda given: torch.optim.AdamW(given, lr=self.lr, fused=fused, **options), groups)
        if self.make_scheduler is not None:
            scheduler: Any = self.make_scheduler(optimizer)
        elif self.make_optimizer is not None:
            return optimizer
        else:
            self._settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate(self.num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters by how they are decayed and how fast they learn."""
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        factors = dict.fromkeys(trained, 1.0)
        if self.policy is not None:
            for root, child in self.named_children():  # a value model may have another depth
                lm = getattr(child, "lm", None)
                layers = (
                    int(lm.config.get_text_config().num_hidden_layers)
                    if lm is not None and self.layer_decay != 1
                    else 0
                )
                own = [name for name in trained if name.startswith(f"{root}.")]
                factors |= layer_factors(own, layers, self.layer_decay)
        factors = {name: factor * self.lr_factor(name) for name, factor in factors.items()}
        return parameter_groups(trained, factors, self.decay_all)

    def lr_factor(self, name: str) -> float:
        """Factor on the learning rate of a trained parameter."""
        return self.strategy.lr_factor(name)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run, from the plan."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "planner"):
            return int(self.trainer.estimated_stepping_batches)
        if self.trainer.max_epochs == -1:
            return max(1, self.trainer.max_steps)
        total = self._epoch_steps(data) * (1 if self.trainer.max_epochs is None else self.trainer.max_epochs)
        return max(1, total if self.trainer.max_steps < 0 else min(total, self.trainer.max_steps))

    def _epoch_steps(self, data: Any) -> int:
        """Optimizer steps of an epoch, with the Trainer's limit."""
        steps = self.plan_length(data)
        limit = self.trainer.limit_train_batches
        return min(steps, limit) if isinstance(limit, int) else int(steps * limit)

    def plan_length(self, data: Any) -> int:
        """Optimizer steps of an epoch, as planned."""
        return len(data.planner(self.accumulate, self.trainer.world_size))

    def steps_in_words(self, data: Any) -> str:
        """What the run consists of, for its summary."""
        examples = data.batch_size * self.accumulate * self.trainer.world_size
        return f"{self.num_steps:,} optimizer steps of {examples} examples"

    def rate_in_words(self) -> str:
        """What the rate is, and why, for the summary."""
        if self.make_optimizer is not None:
            return "that of model.optimizer"
        shape = "the schedule of model.lr_scheduler" if self.make_scheduler is not None else f"schedule {self.schedule}"
        return f"{self.lr:g} at its peak ({self.rate_used.why}), {shape}"

    def rate(self, total: int) -> Any:
        """The schedule as a function from the optimizer step (0 is the first) to a factor on `lr`."""
        return rate(total, self.schedule, self.warmup, self.min_lr, self.decay)

    # ---- one optimizer step ---------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Takes accumulation over from the Trainer: a batch already is a whole optimizer step."""
        check_strategy(self.trainer.strategy)
        check_precision(self.trainer)
        if stage != "fit":
            return
        note_slow(self.trainer)
        self._prepared = False  # the model may be there already, from a validation or an earlier fit
        self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        self.stop.take_over(self.trainer)
        if self.trainer.ckpt_path:  # where it started from was measured when it did
            self.trainer.num_sanity_val_steps = 0
        if self.trainer.max_epochs == -1 and self.trainer.max_steps == -1:
            raise ConfigError("a run must end: set trainer.max_steps, or trainer.max_epochs to a number of epochs.")
        for callback in self.trainer.callbacks:
            if isinstance(callback, EarlyStopping | ModelCheckpoint) and not isinstance(callback, SaveCheckpoint):
                direct(self.trainer, callback)
        self._given = (self.trainer.accumulate_grad_batches, self.trainer.check_val_every_n_epoch)
        self.accumulate = self.trainer.accumulate_grad_batches
        self.trainer.accumulate_grad_batches = 1
        data: Any = getattr(self.trainer, "datamodule", None)
        interval = self.trainer.val_check_interval
        if isinstance(interval, int) and hasattr(data, "planner") and interval > self._epoch_steps(data):
            self.trainer.check_val_every_n_epoch = None  # every so many steps, across epochs

    def teardown(self, stage: str) -> None:
        """Gives the Trainer its settings back."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if stage == "fit":
            vars(self.trainer.fit_loop).pop("run", None)
            self.trainer.accumulate_grad_batches, self.trainer.check_val_every_n_epoch = self._given

    def on_train_start(self) -> None:
        """Notes the length of the run, and where its loader is.

        The position is the number of optimizer steps and nothing else: Lightning restores a loader's own state only in
        the middle of an epoch, and after an interruption inside a step it is one ahead.
        """
        self.stop.install()
        self.planned_steps = self.num_steps
        for control in self.controls:
            if type(control).after_step is not ForgettingControl.after_step:
                hook = self.trainer.optimizers[0].register_step_post_hook(lambda *_, of=control: of.after_step(self))
                self._hooks.append(hook)
        if isinstance(self.trainer.train_dataloader, StepLoader):
            self.trainer.train_dataloader.taken = self.trainer.global_step
        if self.trainer.ckpt_path:
            self._restore_settings()
        if self.trainer.ckpt_path and self.validated_at != self.trainer.global_step and self.validates_here():
            self.trainer.validating = True  # the run was stopped between this step and the end of its validation
            self.trainer.fit_loop.epoch_loop.val_loop.run()
            self.trainer.training = True

    def _restore_settings(self) -> None:
        """Lets the config decide rate and decay of a run that goes on; the checkpoint's optimizer brought its own."""
        scheduler: Any = self.lr_schedulers()
        if not self._settings or not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            return
        scheduler.base_lrs = [group["lr"] for group in self._settings]
        for group, own, factor in zip(
            scheduler.optimizer.param_groups, self._settings, scheduler.lr_lambdas, strict=True
        ):
            group.update(own, initial_lr=own["lr"], lr=own["lr"] * factor(scheduler.last_epoch))

    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        """One optimizer step; returns the loss of its last micro-batch with the gradient still to be taken."""
        self._started = time.perf_counter()
        self._seed_step()
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad()
        self._lr = self.trainer.optimizers[0].param_groups[0]["lr"]  # Lightning moves it on before the step is logged
        self.totals = batch.totals
        controls = [control for control in self.controls if control.weight]
        batch = batch.only({control.source for control in controls})
        sums: dict[str, Tensor] = {}
        for number, micro in enumerate(batch.micro_batches, start=1):
            loss, values = self._loss(micro, controls)
            for name, value in values.items():
                sums[name] = sums[name] + value if name in sums else value
            loss = loss * self.trainer.world_size  # DDP averages over ranks; the sum over all ranks is wanted
            if number < len(batch.micro_batches):
                with torch.autocast(self.device.type, enabled=False):  # as Lightning's own backward: outside of it
                    self.trainer.strategy.backward(loss, None)
        means = self._reduce(sums, batch)
        self._of_controls = {
            f"forgetting/{control.name}/{name}": value
            for control in controls
            for name, value in control.summary(_part(means, control.name)).items()
        }
        self._means = {name: value for name, value in means.items() if not name.startswith("forgetting/")}
        return loss

    def _loss(self, batch: PackedBatch, controls: list[ForgettingControl]) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's part of the loss of the step, and of its metrics: one forward pass serves stage and controls.

        Args:
            batch: The micro-batch, with the rows of all sources.
            controls: Those whose weight is not 0.
        """
        assert self.policy is not None
        needs = self.needs.union(*(control.needs for control in controls))
        divergences = {source: t for control in controls for source, t in control.kl.items()}
        scores = self.policy(batch, needs=needs, watch=self.watch, kl=divergences or None, **self.scoring(batch))
        if not any(batch.sources):
            result = self.micro_loss(batch, scores)
        elif 0 in batch.sources:
            own = batch.target_sources == 0
            result = self.micro_loss(batch.select(own), scores.select(own))
        else:  # nothing but what controls added, on all ranks; DDP wants every weight in the last loss of a step
            others = [p for n, p in self.named_parameters() if p.requires_grad and not n.startswith("policy.")]
            result = MicroLoss(sum((0.0 * p.sum() for p in others), scores.logps.new_zeros(())), {})
        total = self.total(self.totals)
        loss = result.loss / total
        values = {name: value / total for name, value in result.sums.items()}
        for control in controls:
            penalty = control.penalty(self, batch, scores)
            if penalty is None:
                continue
            loss = loss + control.weight * penalty.loss
            values |= {f"forgetting/{control.name}/{name}": value for name, value in penalty.metrics.items()}
        loss = loss / self.divisor
        return loss, {**values, _LOSS: loss}

    @property
    def divisor(self) -> float:
        """What the loss is divided by: 1, and the weights that a budget turns, so that they do not change its size."""
        return 1.0 + sum(control.weight for control in self.controls if control.normalised and control.in_loss)

    def configure_callbacks(self) -> list[L.Callback]:
        """What a budget turns, where the run has no control of its own, and the probe that is missing."""
        if self.trainer.state.fn != "fit":
            return []
        callbacks: list[Any] = self.trainer.callbacks
        check_callbacks(callbacks)
        added: list[L.Callback] = [*ForgettingBudget.default_controls(callbacks)]
        return [*added, *EarlyStopOnForgetting.default_controls([*callbacks, *added])]

    def _seed_step(self) -> None:
        """Makes dropout a function of seed, step and rank, so that no generator state has to survive a restart."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        place = (seed * 1_000_003 + self.trainer.global_step) * 1_009 + self.trainer.global_rank
        torch.manual_seed(place % (1 << 63))

    def _reduce(self, sums: dict[str, Tensor], batch: StepBatch) -> dict[str, float]:
        """Means over the whole step, from all ranks.

        Raises:
            FloatingPointError: On every rank alike, before the weights are touched, if the loss is not a finite number.
        """
        names = [*sorted(sums), _STOP]
        sums = {**sums, _STOP: torch.tensor(float(self.stop.signal is not None), device=self.device)}
        values = torch.stack([sums[name].detach().double() for name in names])
        values = self.trainer.strategy.reduce(values, reduce_op="sum")
        means = dict(zip(names, values.tolist(), strict=True))
        self._agreed_to_stop = means.pop(_STOP) > 0
        self._batch = batch
        loss = means.pop(_LOSS)
        if not math.isfinite(loss):
            self._not_finite("loss", loss)
        return means

    def _not_finite(self, what: str, value: float) -> NoReturn:
        """Stops the run before the weights are touched; every rank finds the same value.

        Raises:
            FloatingPointError: Always; names the rows of the step.
        """
        micros = self._batch.micro_batches
        places = [place for micro in micros for place in zip(micro.examples, micro.sources, strict=True)]
        rows = [row for row, source in places if row >= 0 and source == 0]
        where = getattr(getattr(self.trainer, "datamodule", None), "where", None)
        named = [where(row) if where is not None else f"training example {row + 1}" for row in rows[:8]]
        more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        raise FloatingPointError(
            f"the {what} of optimizer step {self.trainer.global_step + 1} is {value} ({'; '.join(named)}{more}); "
            "lower model.lr, or look at these rows with `ftlit data`. The last checkpoint is from before this step."
        )

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Nothing: Lightning calls this after the forward pass, when earlier micro-batches already left gradients."""

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as the Trainer was told, and keeps the norm from before for the log."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.grad_norm = float(whole(torch.nn.utils.get_total_norm(gradients)))
        if not math.isfinite(self.grad_norm) and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            self._not_finite("gradient norm", self.grad_norm)  # a scaler passes over such a step by itself
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
        elif self.grad_norm > gradient_clip_val:
            torch._foreach_mul_(gradients, gradient_clip_val / (self.grad_norm + 1e-6))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, then measures: callbacks see `step_metrics` of the step they are told of."""
        super().optimizer_step(*args, **kwargs)
        wait_for(self.device)
        totals, seconds = self.totals, time.perf_counter() - self._started
        for control in self.controls:
            self._of_controls |= {f"forgetting/{control.name}/{key}": x for key, x in control.step_values.items()}
        self.step_metrics = {
            **{_metric(name): value for name, value in self.step_summary(self._means).items()},
            **self._of_controls,
            "train/lr": self._lr,
            "train/grad_norm": self.grad_norm,
            "train/tokens_per_s": totals.tokens / seconds,
            "train/trained_tokens_per_s": totals.targets / seconds,
        }

    def on_train_batch_end(self, outputs: Any, batch: StepBatch, batch_idx: int) -> None:
        """Logs the step: means over all its targets on all ranks, speed, rate, gradient norm."""
        self.log_position()
        self.forget_logged(set(self._logged) - set(self.step_metrics))  # this step has none of their rows, say
        self._logged |= dict.fromkeys(self.step_metrics)
        for name, value in self.step_metrics.items():
            shown = name in (*self.progress.values(), "train/tokens_per_s")
            self.log(name, value, on_step=True, on_epoch=False, prog_bar=shown, batch_size=1)
        if self.trainer.global_step >= self.planned_steps:
            # So that Lightning validates the last step, wherever in an epoch and whatever else it was told.
            self.trainer.should_stop, self.trainer.check_val_every_n_epoch = True, 1
        if self._agreed_to_stop:
            self.trainer._signal_connector.received_sigterm = True  # Lightning's loops end at their next safe place

    @property
    def step_names(self) -> list[str]:
        """Of the stage (`of_a_step`), of the optimizer, and of the controls."""
        own = [_metric(name) for name in self.of_a_step]
        optimizer = [f"train/{name}" for name in ("lr", "grad_norm", "tokens_per_s", "trained_tokens_per_s")]
        controls = [f"forgetting/{control.name}/{name}" for control in self.controls for name in control.of_a_step]
        return [*own, *optimizer, *controls]

    @property
    def of_a_step(self) -> list[str]:
        """Names of what `step_summary` gives."""
        return ["loss"]

    def step_summary(self, means: dict[str, float]) -> dict[str, float]:
        """The step metrics made from the means of `MicroLoss.sums`."""
        return means

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the trained weights; the frozen base is where it came from."""
        shapes = self._trained_shapes()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in shapes}
        checkpoint["ftlit"] = {
            "trained": {name: list(shape) for name, shape in shapes.items()},
            "start_metrics": self.start_metrics,
            "last_metrics": self.last_metrics,
            # What was saved at a step may not be logged yet; Lightning logs float32.
            "step_metrics": {name: torch.tensor(value).item() for name, value in self.step_metrics.items()},
            "validated_at": self.validated_at,
            "data": self._data_fingerprint(),
            "precision": str(self.trainer.precision),
            "base": self._base,
            "scaling": "" if self.policy is None else self.strategy.scaling(self.policy.lm),
            "schedule": self._schedule(self.planned_steps),
        }
        if self.strategy.start_state is not None:
            checkpoint["ftlit"]["start"] = dict(self.strategy.start_state)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint belongs to this run, and sets Lightning's loops to its optimizer step."""
        self.configure_model()
        self.check_checkpoint(checkpoint)
        own = checkpoint["ftlit"]
        if self.policy is not None and "start" in own and self.strategy.start_state is not own["start"]:
            self.strategy.restart(self.policy.lm, own["start"])
        self.start_metrics, self.validated_at = own["start_metrics"], own["validated_at"]
        self.last_metrics, self.step_metrics = own.get("last_metrics", {}), own["step_metrics"]
        if self._trainer is None or self._trainer.state.fn != "fit":
            return
        if own["data"] != self._data_fingerprint():
            rank_zero_only(print)(
                "note       the training rows or their order are not those of the checkpoint: the run goes on, but not "
                "as if it had never stopped"
            )
        here = {"precision": str(self.trainer.precision), "schedule": self._schedule(self.num_steps)}
        for note in going_on(own, self._base, here, checkpoint["global_step"]):
            rank_zero_only(print)(f"note       {note}", flush=True)
        data = getattr(self._trainer, "datamodule", None)
        if hasattr(data, "planner"):
            step, loop = checkpoint["global_step"], self._trainer.fit_loop
            checkpoint["loops"]["fit_loop"] = position(step, self._epoch_steps(data))
            if step >= self.num_steps:
                loop.run = partial(finish, loop)

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that lacks a trained weight or has one more: Lightning would pass over both.

        Raises:
            ConfigError: Naming the first weight that differs.
        """
        if "ftlit" not in checkpoint:
            raise ConfigError("this is not a checkpoint of an ftlit run.")
        trained = {name: list(shape) for name, shape in self._trained_shapes().items()}
        saved = checkpoint["ftlit"]["trained"]
        wrong = next((name for name in {**trained, **saved} if trained.get(name) != saved.get(name)), None)
        if wrong is not None:
            raise ConfigError(
                f"the checkpoint does not fit this model and strategy: {wrong!r} is {saved.get(wrong, [])} in "
                f"the checkpoint and {trained.get(wrong, [])} here. Use the config.yaml of the run it belongs to."
            )

        saved, here = checkpoint["ftlit"].get("scaling", ""), ""
        if self.policy is not None:
            here = self.strategy.scaling(self.policy.lm)
        if saved and saved != here:
            raise ConfigError(
                f"the checkpoint was trained with a scale of {saved}, and this config says {here}: its weights would "
                "mean another model. Give it the alpha, rank and rslora of the run it belongs to."
            )

    def _schedule(self, steps: int) -> dict[str, Any]:
        """What the rate at each of so many steps depends on, where it is ftlit's own."""
        if self.make_optimizer is not None or self.make_scheduler is not None or steps < 1:
            return {}
        return {
            "steps": steps, "lr": self.lr, "schedule": self.schedule, "warmup": self.warmup, "min_lr": self.min_lr,
            "decay": self.decay,
        }  # fmt: skip

    def _trained_shapes(self) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in self.named_parameters() if p.requires_grad}

    def _data_fingerprint(self) -> str:
        make = getattr(getattr(self._trainer, "datamodule", None), "fingerprint", None)
        return "" if make is None else make()


def _metric(name: str) -> str:
    """A step metric's name in the log: one that names its group keeps it."""
    return name if "/" in name else f"train/{name}"


def _part(means: dict[str, float], control: str) -> dict[str, float]:
    """What a control measured, under its own names."""
    prefix = f"forgetting/{control}/"
    return {name.removeprefix(prefix): value for name, value in means.items() if name.startswith(prefix)}
