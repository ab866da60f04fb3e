"""What depends on the device that a model runs on: its generators, its clock, its memory."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Context with seeded generators: the CPU's, and that of the GPU that new tensors come to lie on here.

    Afterwards all are as they were; those of other GPUs are not touched.

    Args:
        seed: The seed.
    """
    kind = torch.empty(0).device.type  # of the context of a Lightning strategy, say
    devices = [torch.cuda.current_device()] if kind == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        yield


def wait_for(device: torch.device) -> None:
    """Waits until a device has done what it was told, so that a clock that is read next says how long that took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Most memory held so far, bytes: of a GPU what tensors took there, else what the process took."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
