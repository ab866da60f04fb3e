"""The folder of a run: its name, that one process alone trains in it, and what it branched from."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ftlit.errors import ConfigError
from ftlit.files import write_text

ORIGIN = "branched_from.json"
"""Which run and step a run began from, where it is a branch."""
_LOCK, _OWNER = ".lock", ".owner"
_RUNS = Path("runs")


def begun_in(configs: Sequence[Any]) -> Path | None:
    """The folder of the run whose `config.yaml` is among some configs; None where none is a run's.

    Args:
        configs: Paths of the configs that were given.
    """
    folders = (Path(str(file)).parent for file in configs)
    return next((folder for folder in folders if (folder / "checkpoints").is_dir()), None)


def remember_origin(folder: Path, source: Path, step: int) -> None:
    """Keeps in the folder of a branch where it came from.

    Args:
        folder: The new run.
        source: The folder of the run that it branches from.
        step: The optimizer step of the checkpoint.
    """
    content = {"run": str(source.resolve()), "step": step}
    write_text(folder / ORIGIN, json.dumps(content, indent=2) + "\n")


def origin(folder: Path) -> dict[str, Any] | None:
    """Where a run branched from: `run` and `step`; None for a run that began by itself."""
    file = folder / ORIGIN
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


class RunLock:
    """Keeps other processes from training in the same folder.

    The system gives the lock back when a process ends, however it ends; a note in the folder says whose it is.

    Args:
        folder: The run folder, made if needed; None makes a new one, `runs/KIND-DATE-TIME`.
        kind: What the run is, such as `sft`.

    Attributes:
        folder: The run folder.

    Raises:
        ConfigError: If another process trains there.
    """

    def __init__(self, folder: Path | None, kind: str) -> None:
        place = _RUNS if folder is None else folder
        self._made = [one for one in (place, *place.parents) if not one.exists()]
        if folder is None:
            folder = _new_folder(kind)
            self._made.insert(0, folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._owner = folder / _OWNER
        self._lock: FileLock | None = FileLock(folder / _LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            owner = self._owner.read_text(encoding="utf-8").strip() if self._owner.exists() else "another process"
            raise ConfigError(
                f"{folder} is in use: {owner} trains in it. Give another --run, or end that one."
            ) from None
        except OSError:  # a file system without locks, or one that cannot be written, which is said later
            self._lock = None
            return
        if self._owner.exists():
            was = self._owner.read_text(encoding="utf-8").strip()
            print(f"run        {folder} is taken over: {was}, which trained in it, is gone", flush=True)
        self._owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")

    @property
    def is_new(self) -> bool:
        """Whether the folder was made for this run."""
        return self.folder in self._made

    def release(self) -> None:
        """Lets others train there; again: does nothing."""
        if self._lock is None:
            return
        for file in (self._owner, Path(self._lock.lock_file)):
            file.unlink(missing_ok=True)
        self._lock.release()
        self._lock = None
        for place in self._made:  # a command that failed at once leaves no empty folder
            with contextlib.suppress(OSError):
                place.rmdir()


def _new_folder(kind: str) -> Path:
    """Makes a folder that no other run has, even one that begins in the same second."""
    stem = f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1, 1000):
        folder = _RUNS / (stem if number == 1 else f"{stem}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True, exist_ok=False)
            return folder
    raise ConfigError(f"runs/{stem} and many more are there already: give --run.")


__all__ = ["ORIGIN", "RunLock", "begun_in", "origin", "remember_origin"]
