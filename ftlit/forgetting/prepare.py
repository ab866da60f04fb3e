"""Before training: controls see the model at its start, and give their rows to the planner."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng

from ftlit.errors import ConfigError
from ftlit.forgetting.overlap import overlaps

if TYPE_CHECKING:
    from ftlit.data.added import AddedRows
    from ftlit.stages.base import Stage


def prepare_controls(stage: Stage) -> None:
    """Prepares every control of a run: refusals, start scores, added rows, the memory of the start.

    Args:
        stage: A stage whose model is loaded and at its start.

    Raises:
        ConfigError: If two controls share a name, or one makes no sense with this stage, strategy or data.
    """
    controls = stage.controls
    data: Any = getattr(stage.trainer, "datamodule", None)
    if hasattr(data, "added_rows"):
        data.added_rows = []  # those of an earlier run on the same data
    for control in controls:
        control.source = 0
    for name, count in Counter(control.name for control in controls).items():
        if count > 1:
            raise ConfigError(f"{count} controls of forgetting are called {name!r}: give each a name of its own.")
    for control in controls:
        reason = control.refuse(stage)
        if reason is not None:
            raise ConfigError(f"{type(control).__name__} cannot be used here: {reason}")
    if not controls:
        return
    assert stage.policy is not None
    if not isinstance(stage.trainer.strategy, ModelParallelStrategy):  # that one has already placed the weights
        stage.policy.to(stage.trainer.strategy.root_device)
    stage.policy.eval()
    rows = []
    # What is drawn here must not move what is drawn in training, and new tensors lie on the CPU as they do later:
    # Lightning builds models in a context that puts them on the GPU.
    with torch.device("cpu"), isolate_rng(), stage.trainer.precision_plugin.forward_context():
        for control in controls:
            began = time.perf_counter()
            control.prepare(stage)
            added = control.added_rows(stage)
            if added is not None:
                if not hasattr(data, "added_rows"):
                    raise ConfigError(f"{type(control).__name__} adds rows, which {type(data).__name__} cannot take.")
                rows.append(added)
                control.source = len(rows)
            if control.kl:
                stage.strategy.remember_start(stage.policy.lm)
            seconds = time.perf_counter() - began
            note = f" ({seconds:.0f} s to prepare)" if seconds >= 1 else ""
            rank_zero_only(print)(f"control    {control.describe()}{note}", flush=True)
    stage.policy.train()
    if rows:
        data.added_rows = rows
    _warn_of_overlaps(stage, data, rows)


def _warn_of_overlaps(stage: Stage, data: Any, added: Sequence[AddedRows]) -> None:
    trained = {rows.name: rows.examples for rows in added}
    own = getattr(data, "sets", {}).get("train") if stage.predicts_tokens else None  # prompts alone teach nothing
    trained |= {} if own is None else {"data.train": own}
    held_out = {
        f"{control.name} ({name})": examples
        for control in stage.controls
        for name, examples in control.held_out().items()
    }
    for measurer, trainer, count in overlaps(held_out, trained):
        rank_zero_only(print)(
            f"  warning: {count:,} of the {len(held_out[measurer]):,} documents of {measurer} are also trained by "
            f"{trainer}, so what is measured on them flatters; take other rows for one of the two",
            flush=True,
        )


__all__ = ["prepare_controls"]
