"""FSDP2: weights, gradients and optimizer states sharded over all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from typing_extensions import override

if TYPE_CHECKING:
    from ftlit.stages.base import Stage


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
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        # Lightning loads the weights here, before any hook could look at them.
        stage: Any = self.lightning_module
        checked: Stage = stage
        checked.check_checkpoint(torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True))
        return super().load_checkpoint(checkpoint_path, weights_only=True)
