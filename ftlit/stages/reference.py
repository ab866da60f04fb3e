"""Log-probabilities under the model at the start of the run: computed beside the policy's, or once and kept on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from ftlit.batch import PackedBatch
from ftlit.cache import cache_dir
from ftlit.data.packing import EvalLoader
from ftlit.data.store import Joined
from ftlit.data.tokenizing import Progress
from ftlit.forgetting.fingerprint import fingerprint
from ftlit.models.policy import Policy
from ftlit.stages.base import Stage

VERSION = 1


@torch.no_grad()
def start_logps(policy: Policy, batch: PackedBatch) -> Tensor:
    """Log-probabilities of the targets under the model at the start of the run, without dropout, nats `[N]`.

    Args:
        policy: The policy; where its strategy trains the model itself, `remember_start` must have been called.
        batch: The micro-batch; only its targets of source 0 are scored, in their order.
    """
    with policy.at_start():
        logps: Tensor = policy(batch.only({0})).logps
        return logps


class StoredScores:
    """Log-probabilities of every trained token of a set of rows under the start model.

    Args:
        values: The rows end to end, nats.
        starts: Where each row begins; one number more than there are rows.
    """

    def __init__(self, values: np.ndarray, starts: np.ndarray) -> None:
        self.values, self.starts = values, starts

    def of(self, batch: PackedBatch) -> Tensor:
        """The scores of the targets of a micro-batch, `[N]`; 0 for those of a filler."""
        parts = []
        counts = torch.bincount(batch.target_segments, minlength=len(batch.segments)).tolist()
        number = 0
        while number < len(counts):
            row, targets = batch.examples[number], 0
            first = number
            # A row is a prompt and its answers: neighbours, the prompt being the one without a parent.
            while number < len(counts) and (number == first or batch.segments.parents[number] >= 0):
                targets += counts[number]
                number += 1
            if row >= 0 and batch.sources[first] == 0:
                parts.append(self.values[self.starts[row] : self.starts[row + 1]])
            else:
                parts.append(np.zeros(targets, self.values.dtype))
        return torch.from_numpy(np.concatenate(parts)).to(batch.target_weights.device)


def stored_scores(stage: Stage, rows: Joined, name: str, batch_size: int, max_tokens: int | None) -> StoredScores:
    """The scores of a set of rows: from the cache, or computed and put there.

    They are found by a hash of the start model, of every token and weight of the rows, and of the arithmetic
    (precision, kind of device, version of torch), so scores of another model or of other rows are never taken for them.
    All ranks must ask; they share the work.

    Args:
        stage: The stage, its model at its start or `strategy.start` able to bring it there.
        rows: The rows.
        name: What they are called in the progress.
        batch_size: Most rows in a micro-batch.
        max_tokens: Most tokens in a micro-batch.
    """
    assert stage.policy is not None
    starts = np.concatenate([[0], np.cumsum(rows.measures().targets)])
    wide = np.float64 if str(stage.trainer.precision).startswith("64") else np.float32
    weights = fingerprint(stage.policy.lm, stage.strategy)
    arithmetic = f"{stage.trainer.precision} {stage.device.type} {torch.__version__} {np.dtype(wide)}"
    what = f"{VERSION} {weights} {rows.fingerprint()} {arithmetic}"
    path = cache_dir() / "reference" / f"{hashlib.blake2b(what.encode(), digest_size=16).hexdigest()}.npy"
    found = _read(path, int(starts[-1]))
    # Whether a file is there must be one answer for all ranks: they compute together or not at all.
    missing = torch.tensor(float(found is None), device=stage.device)
    if stage.trainer.strategy.reduce(missing, reduce_op="sum") == 0:
        assert found is not None
        return StoredScores(found, starts)
    values = _computed(stage, rows, starts, f"reference of {name}", batch_size, max_tokens).astype(wide)
    if stage.trainer.is_global_zero:
        _write(path, values)
    return StoredScores(values, starts)


@torch.no_grad()
def _computed(
    stage: Stage, rows: Joined, starts: np.ndarray, label: str, batch_size: int, max_tokens: int | None
) -> np.ndarray:
    """Each rank scores its part; their sum is the whole."""
    assert stage.policy is not None
    world, rank = stage.trainer.world_size, stage.trainer.global_rank
    values = torch.zeros(int(starts[-1]), dtype=torch.float64)
    progress = Progress(-(-len(rows) // world), label, quiet=bool(rank))
    with stage.trainer.precision_plugin.forward_context():
        for batch in EvalLoader(rows, batch_size, max_tokens, rank, world):
            batch = batch.to(stage.device)
            own = [row for row, parent in zip(batch.examples, batch.segments.parents, strict=True) if parent < 0]
            logps = start_logps(stage.policy, batch).double().cpu()
            if own[0] >= 0:
                places = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in own])
                values[torch.from_numpy(places)] = logps
            progress.update(len(own))
    progress.close()
    total: Tensor = stage.trainer.strategy.reduce(values.to(stage.device), reduce_op="sum")
    return total.cpu().numpy()


def _read(path: Path, count: int) -> np.ndarray | None:
    """The scores in a file, None where there is none, or it is torn."""
    try:
        values: np.ndarray = np.load(path, mmap_mode=None)
    except (OSError, ValueError, EOFError):
        return None
    return values if values.shape == (count,) else None


@rank_zero_only
def _write(path: Path, values: np.ndarray) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"), tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.save(file, values)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
    except OSError as error:
        print(f"reference scores are not kept: {path.parent} cannot be written ({error.strerror})", flush=True)


__all__ = ["StoredScores", "start_logps", "stored_scores"]
