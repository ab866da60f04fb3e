"""Penalties on the change of the weights, which depend on no batch: their gradient is added once an optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.autograd.graph import Node
from typing_extensions import override

from ftlit.forgetting.base import ForgettingControl
from ftlit.peft.base import Alpha, Change

if TYPE_CHECKING:
    from ftlit.stages.base import Stage

SHARDED = "its weights are sharded, and it needs them whole; use --config trainer/ddp."
NO_CHANGES = "changes no weight of the model: there is no change to penalise; use Replay."


def outside_head(stage: Stage, alpha: Alpha) -> Alpha:
    """An `alpha` that leaves a head of its own, such as a classifier's, alone: it has no start worth going back to.

    Args:
        stage: The stage.
        alpha: What is kept of the other parameters.
    """
    head = head_of_its_own(stage)
    if not head:
        return alpha
    share = alpha if callable(alpha) else lambda name: alpha
    return lambda name: 1.0 if name.startswith(head) else share(name)


def head_of_its_own(stage: Stage) -> tuple[str, ...]:
    """Beginnings of the names of what the stage trains besides the strategy."""
    return tuple(f"{name}." for name in getattr(stage.policy, "head", ()))


def add_gradient(stage: Stage, term: Callable[[Change], Tensor | None], factor: float) -> float:
    """Adds `factor * d sum(term) / d parameters` to the gradients, one change at a time.

    `torch.autograd.grad`, not `backward`: the gradients of the step are reduced over the ranks already, and every rank
    adds the same.

    Args:
        stage: The stage, with the gradient of a whole step.
        term: The penalty on one change; None leaves it alone.
        factor: Factor on all.

    Returns:
        The sum of the terms.
    """
    assert stage.policy is not None
    total = 0.0
    head = head_of_its_own(stage)
    for change in stage.strategy.changes(stage.policy.lm):
        if head and change.name.startswith(head):
            continue
        with torch.enable_grad():
            value = term(change)
        if value is None:
            continue
        total += float(value.detach())
        leaves = _leaves(value)
        for parameter, gradient in zip(leaves, torch.autograd.grad(value, leaves), strict=True):
            if parameter.grad is None:
                parameter.grad = factor * gradient
            else:
                parameter.grad.add_(gradient, alpha=factor)
    return total


def _leaves(value: Tensor) -> list[Tensor]:
    """The trained parameters that a value depends on."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    open_nodes: list[Node | None] = [value.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # an accumulator of a leaf's gradient
        if variable is not None:
            found[id(variable)] = variable
        open_nodes += [parent for parent, _ in node.next_functions]
    return list(found.values())


class ChangePenalty(ForgettingControl):
    """A control that adds the gradient of a penalty on the changes, once a step, before clipping.

    Subclasses say the penalty of one change. The value of the step, without the weight, is logged as
    `forgetting/NAME/loss`.
    """

    of_a_step: ClassVar[tuple[str, ...]] = ("loss",)

    in_loss = False

    def term(self, change: Change) -> Tensor | None:
        """The penalty on one change, differentiable; None where there is none."""
        raise NotImplementedError

    def factor(self, stage: Stage) -> float:
        """Factor on the sum of the terms besides the weight."""
        return 1.0

    @override
    def refuse(self, stage: Stage) -> str | None:
        assert stage.policy is not None
        if isinstance(stage.trainer.strategy, ModelParallelStrategy):
            return SHARDED
        stage.strategy.remember_start(stage.policy.lm)
        if next(iter(stage.strategy.changes(stage.policy.lm)), None) is None:
            return f"{type(stage.strategy).__name__} {NO_CHANGES}"
        return None

    def on_train_start(self, trainer: L.Trainer, pl_module: Stage) -> None:
        """Says it when the optimizer pulls elsewhere."""
        decay = max(float(group.get("weight_decay", 0)) for one in trainer.optimizers for group in one.param_groups)
        if decay and pl_module.strategy.trains_base and trainer.is_global_zero:
            print(
                f"  warning: the optimizer's weight_decay {decay:g} pulls toward zero and {self.name} to the start; "
                "set it to 0",
                flush=True,
            )

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Stage, optimizer: Any) -> None:
        """Adds the gradient: unscaled, of the whole step, before clipping."""
        self.step_values = {}
        if self.weight:
            factor = self.factor(pl_module)
            total = add_gradient(pl_module, self.term, self.weight * factor)
            self.step_values = {"loss": factor * total}


__all__ = ["NO_CHANGES", "SHARDED", "ChangePenalty", "add_gradient", "head_of_its_own", "outside_head"]
