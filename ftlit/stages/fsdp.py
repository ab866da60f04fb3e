"""FSDP2: weights, gradients and optimizer states sharded over all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.optim import Optimizer
from typing_extensions import override


class FSDP2(ModelParallelStrategy):
    """Shards the policy over all ranks with torch's `fully_shard`; on CPUs too.

    `--trainer.strategy fsdp` means this one. Checkpoints are one file with what is trained, so that a run can go on
    with another number of ranks. (Lightning's own `ModelParallelStrategy` is tensor parallel by default, gathers the
    frozen weights into every checkpoint, and cannot read a sharded one back that lacks them.)
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        assert self.model is not None
        return get_model_state_dict(self.model, options=options)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on the first rank, numbered as the optimizer of an unsharded run numbers it."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

        optimizer = getattr(optimizer, "_optimizer", optimizer)
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        named = get_optimizer_state_dict(self.model, optimizer, options=options)
        numbers = {name: number for number, name in enumerate(self._names(optimizer))}
        return _renamed(named, numbers) if self.global_rank == 0 else {}

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        path = Path(self.broadcast(checkpoint_path))
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        stage: Any = self.lightning_module
        stage.check_checkpoint(checkpoint)  # before anything is loaded
        options = StateDictOptions(full_state_dict=True, strict=False)
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            named = _renamed(state, dict(enumerate(self._names(optimizer))))
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return checkpoint

    def _names(self, optimizer: Optimizer) -> list[str]:
        """The names of an optimizer's parameters in its own order."""
        assert self.model is not None
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _renamed(state: dict[str, Any], keys: dict[Any, Any]) -> dict[str, Any]:
    """An optimizer's state dict with other keys for its parameters."""
    groups = [{**group, "params": [keys[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {keys[key]: value for key, value in state["state"].items()}, "param_groups": groups}
