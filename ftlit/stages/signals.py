"""Stopping a run from outside: SIGTERM and Ctrl-C let the optimizer step end, and the run is saved.

Lightning's own handler calls a collective operation from inside the signal handler, which meets whatever the other
ranks happen to be doing. Here a handler only takes a note, and the ranks agree at the end of a step.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import ClassVar

_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        signal: The signal that asked, or None.
    """

    signal: int | None = None
    last: ClassVar[int | None] = None
    """The signal that stopped the latest run of this process."""

    def install(self) -> None:
        """Takes over SIGTERM and SIGINT until Lightning gives them back; again: does nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _NAMES:
            if signal.getsignal(number) != self._note:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:  # asked twice: at once, without saving
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            return
        self.signal = StopRequest.last = number
        print(f"\n{_NAMES[signal.Signals(number)]}: stopping after this step; once more stops at once.", flush=True)


def exit_status(number: int | None) -> int:
    """What a process that was stopped by a signal exits with: 143 for SIGTERM, 130 for Ctrl-C."""
    return 128 + (signal.SIGTERM if number is None else number)
