"""L2ToInit: every weight is pulled back to where it started."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import override

from ftlit.batch import pack
from ftlit.errors import ConfigError
from ftlit.forgetting.general import digest, general_rows
from ftlit.forgetting.kept import kept
from ftlit.forgetting.pull import ChangePenalty, outside_head
from ftlit.models.policy import Policy, target_states
from ftlit.peft.base import Change

if TYPE_CHECKING:
    from ftlit.stages.base import Stage

# Smallest share of the change that is taken back at once: a smaller one would be lost in the rounding of the weights,
# so it is saved up. Float32 holds seven digits of a weight, of which the change fills the last four or so.
_LEAST = {torch.float64: 0.0, torch.float32: 1e-3}


class L2ToInit(ChangePenalty):
    """L2 regularisation toward the start instead of toward zero (L2-SP, Li et al. 2018, arXiv:1802.01483).

    `decoupled`: after each optimizer step the change of every weight, Delta, becomes `2^(-1 / half_life) Delta`,
    outside optimizer and clipping, as AdamW's decay is (Loshchilov and Hutter 2019, arXiv:1711.05101). Its strength
    does not depend on the learning rate: without a gradient half of the change is left after `half_life` steps. Where a
    step would take back less than rounding allows, it is saved up. For LoRA one factor of the product is scaled.

    `coupled`: `strength / 2 * ||Delta||^2` is added to the loss (its gradient, once a step, before clipping). AdamW
    divides it by the size of the gradients, so it is another method: weaker where the loss is steep. For LoRA the norm
    of the product is taken from its factors, relative to the start also where that is another adapter.

    With `rows` the coupled penalty of a layer is `tr(Delta C Delta^T)` with `C = E[x x^T]` of its inputs on general
    text at the start, divided by its mean diagonal entry: only what general text would notice is pulled back.
    Embeddings, norms, biases and the output layer keep the plain penalty. The head of a classifier is left alone.

    AdamW's `weight_decay` of the model's own weights pulls toward zero, away from the start: leave it at 0 beside this.
    (That of a LoRA adapter is another pull to the start.)

    Logged: `forgetting/l2_to_init/distance`, `||Delta||` over all weights, and coupled `.../loss`.

    Args:
        mode: `decoupled` or `coupled`.
        half_life: Decoupled: optimizer steps in which half of the change is taken back; below 1 a share of the run.
        strength: Coupled: the factor lambda; 1 when neither it nor `total_pull` is given.
        total_pull: Coupled: the sum of `lr * lambda` over the run, from which lambda follows.
        rows: Coupled: general text that weights the penalty: `self`, a file, a folder, a hub id, or `sample:NAME`.
        num_rows: How many of these rows.
        weight: Factor on the pull.
        name: What it is called in the log.

    Raises:
        ConfigError: If a number is out of range, or a setting belongs to the other mode.
    """

    of_a_step: ClassVar[tuple[str, ...]] = ("loss", "distance")

    def __init__(
        self,
        mode: Literal["decoupled", "coupled"] = "decoupled",
        half_life: float | None = None,
        strength: float | None = None,
        total_pull: float | None = None,
        rows: str | None = None,
        num_rows: int = 64,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name or "l2_to_init")
        if mode not in ("decoupled", "coupled"):
            raise ConfigError(f"L2ToInit.mode must be decoupled or coupled, got {mode!r}.")
        numbers = {"half_life": half_life, "strength": strength, "total_pull": total_pull, "num_rows": num_rows}
        for key, value in numbers.items():
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"L2ToInit.{key} must be positive, got {value}.")
        if mode == "coupled" and half_life is not None:
            raise ConfigError("L2ToInit.half_life goes with mode: decoupled; give strength or total_pull.")
        others: dict[str, Any] = {"strength": strength, "total_pull": total_pull, "rows": rows}
        for key, given in others.items():
            if mode == "decoupled" and given is not None:
                raise ConfigError(f"L2ToInit.{key} goes with mode: coupled; the decoupled pull has a half_life.")
        if strength is not None and total_pull is not None:
            raise ConfigError("L2ToInit takes strength or total_pull, not both.")
        self.mode, self.half_life = mode, 0.25 if half_life is None else half_life
        self.strength, self.total_pull, self.rows, self.num_rows = strength, total_pull, rows, num_rows
        self._saved_up = 0.0  # halvings that are still to be done
        self._moments: dict[str, Tensor] = {}
        self._rates: tuple[tuple[float, int], float] | None = None  # the sum of the rates of a run

    # ---- before training ------------------------------------------------------------------------------------------

    @override
    def refuse(self, stage: Stage) -> str | None:
        reason = super().refuse(stage)
        if reason is not None:
            return reason
        assert stage.policy is not None
        if self.rows is not None and not isinstance(stage.policy, Policy):
            return f"rows are read by a language model, and {type(stage).__name__} trains none; leave rows out."
        if self.mode == "coupled":
            if self.total_pull is not None and (stage.make_optimizer or stage.make_scheduler):
                return "total_pull needs the rates of the whole run, which model.optimizer and model.lr_scheduler hide."
            return None
        reason = stage.strategy.not_between(stage.policy.lm)
        if reason is not None:
            return f"{reason.rstrip('.')}; or use mode: coupled."
        trained = stage.strategy.trained(stage.policy.lm).values()
        narrow = {parameter.dtype for parameter in trained} - set(_LEAST)
        if narrow:
            kind = str(narrow.pop()).removeprefix("torch.")
            return f"a decoupled pull is lost in the rounding of weights in {kind}; use trainer.precision bf16-mixed."
        return None

    @override
    def prepare(self, stage: Stage) -> None:
        if self.rows is not None:
            examples = general_rows(stage, self.name, self.rows, self.num_rows)
            settings = [digest(examples), "float32"]
            self._moments = kept(stage, "moments", settings, lambda: second_moments(stage, examples))

    # ---- while training -------------------------------------------------------------------------------------------

    @override
    def term(self, change: Change) -> Tensor:
        return change.sq_norm(self._moments.get(change.name)) / 2

    @override
    def factor(self, stage: Stage) -> float:
        if self.total_pull is None:
            return 1.0 if self.strength is None else self.strength
        key = (stage.lr, stage.planned_steps)
        if self._rates is None or self._rates[0] != key:
            rate = stage.rate(stage.planned_steps)
            self._rates = (key, stage.lr * math.fsum(rate(step) for step in range(stage.planned_steps)))
        return self.total_pull / self._rates[1]

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Stage, optimizer: Any) -> None:
        if self.mode == "coupled":
            super().on_before_optimizer_step(trainer, pl_module, optimizer)

    @override
    def after_step(self, stage: Stage) -> None:
        if not self.weight:
            self.step_values = {}
            return
        assert stage.policy is not None
        lm = stage.policy.lm
        if self.mode == "decoupled":
            self.step_values = {}
            self._saved_up += self.weight / self._half_life(stage)
            least = max(_LEAST[parameter.dtype] for parameter in stage.strategy.trained(lm).values())
            if -math.expm1(-self._saved_up * math.log(2)) >= least:
                stage.strategy.interpolate(lm, outside_head(stage, 2.0**-self._saved_up))
                self._saved_up = 0.0
        with torch.no_grad():
            squares = [change.sq_norm().double() for change in stage.strategy.changes(lm)]
        self.step_values["distance"] = math.sqrt(max(0.0, float(torch.stack(squares).sum())))

    def _half_life(self, stage: Stage) -> float:
        return self.half_life if self.half_life >= 1 else self.half_life * max(1, stage.planned_steps)

    # ---- state ----------------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "saved_up": self._saved_up}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._saved_up = state_dict["saved_up"]

    @override
    def describe(self) -> str:
        if self.mode == "decoupled":
            unit = "steps" if self.half_life >= 1 else "of the run"
            length = f"{self.half_life:g}" if self.half_life >= 1 else f"{self.half_life:.0%}"
            how = f"half of the change is taken back in {length} {unit}"
        elif self.total_pull is not None:
            how = f"coupled, total pull {self.total_pull:g}"
        else:
            how = f"coupled, strength {1.0 if self.strength is None else self.strength:g}"
        seen = f", weighted by the inputs of {len(self._moments)} layers on {self.rows}" if self._moments else ""
        return f"{self.name}: {how}{seen}, weight {self.weight:g}"


@torch.no_grad()
def second_moments(stage: Stage, examples: Any) -> dict[str, Tensor]:
    """`E[x x^T]` of the input of every changed linear layer on some rows, at the start of the run.

    Args:
        stage: The stage. All ranks must call; each reads all rows.
        examples: The rows; every token of them counts.

    Returns:
        By name of the weight, `[in, in]`, divided by the mean of its diagonal: the identity for inputs without any
        preferred direction.
    """
    assert stage.policy is not None
    lm = stage.policy.lm
    sums: dict[str, Tensor] = {}
    hooks = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            with torch.autocast(x.device.type, enabled=False):  # which would multiply in half precision
                sums[name] = sums[name] + x.t() @ x if name in sums else x.t() @ x

        return hook

    for change in stage.strategy.changes(lm):
        path, _, own = change.name.rpartition(".")
        module = lm.get_submodule(path)
        if own == "weight" and len(change.shape) == 2 and module is not lm.get_input_embeddings():
            hooks.append(module.register_forward_pre_hook(watch(change.name)))
    device = next(stage.policy.parameters()).device
    try:
        with stage.strategy.start(lm):
            for example in examples:
                target_states(lm, pack([example]).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: moment / moment.diagonal().mean().clamp_min(1e-30) for name, moment in sums.items()}


__all__ = ["L2ToInit", "second_moments"]
