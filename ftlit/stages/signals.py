"""Stopping a run from outside: the optimizer step ends and the run is saved.

SIGTERM, Ctrl-C, SIGHUP (the terminal is gone) and SLURM ask for that.

Lightning's own handler calls a collective operation from inside the signal handler, which meets whatever the other
ranks happen to be doing. Here a handler only takes a note, and the ranks agree at the end of a step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, ClassVar, TextIO

from lightning.pytorch.plugins.environments import SLURMEnvironment

if TYPE_CHECKING:
    import lightning as L

_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
if _HANGUP is not None:
    _NAMES[_HANGUP] = "SIGHUP"


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        signal: The signal that asked, or None.
    """

    signal: int | None = None
    last: ClassVar[int | None] = None
    """The signal that stopped the latest run of this process."""

    def __init__(self) -> None:
        self.names = dict(_NAMES)
        self._terminals: list[TextIO] = []
        self._requeued_by: int | None = None

    def take_over(self, trainer: L.Trainer) -> None:
        """Takes over the signal by which SLURM announces that a job will be put back into the queue.

        Lightning's own handler saves wherever training happens to be, inside an optimizer step too.
        """
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            environment.auto_requeue = False
            number = environment.requeue_signal
            if number is not None:
                self._requeued_by = number
                self.names[number] = f"SLURM's {signal.Signals(number).name}"
                self._install(number)

    def install(self) -> None:
        """Takes over SIGTERM, SIGINT and SIGHUP until Lightning gives them back; again: does nothing.

        A SIGHUP that is ignored stays so: the run was started with `nohup` and is to outlive its terminal.
        """
        self._terminals = [stream for stream in (sys.stdout, sys.stderr) if stream.isatty()]
        for number in self.names:
            if number != _HANGUP or signal.getsignal(number) != signal.SIG_IGN:
                self._install(number)

    def _install(self, number: int) -> None:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) != self._note:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:  # asked twice: at once, without saving
            if number == self._requeued_by:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            return
        self.signal = StopRequest.last = number
        if number == _HANGUP:
            self._leave_terminal()
        more = "" if number == self._requeued_by else "; once more stops at once"
        with contextlib.suppress(RuntimeError, OSError):  # the signal came while something was being printed
            print(f"\n{self.names[signal.Signals(number)]}: stopping after this step{more}.", flush=True)

    def _leave_terminal(self) -> None:
        """Sends what is printed nowhere: writing to a terminal that is gone is an error."""
        for stream in self._terminals:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)

    def requeue(self) -> None:
        """Puts the job back into SLURM's queue, where that is what was asked for; one process does it for all."""
        if self.signal is None or self.signal != self._requeued_by:
            return
        job = os.environ.get("SLURM_JOB_ID", "")
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
            problem = " ".join(done.stderr.split()) if done.returncode else ""
        except OSError as error:
            problem = error.strerror or str(error)
        said = f"could not be put back into the queue: {problem}" if problem else "is back in the queue"
        print(f"SLURM job {job} {said}", flush=True)


def restarted() -> bool:
    """Whether SLURM has started this job before."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def exit_status(number: int | None) -> int:
    """What a process that was stopped by a signal exits with: 143 for SIGTERM, 130 for Ctrl-C, 129 for SIGHUP."""
    return 128 + (signal.SIGTERM if number is None else number)
