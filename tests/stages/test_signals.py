"""What a run makes of signals; `tests/e2e/test_kill.py` stops real ones."""

import os
import pty
import signal
import sys

import pytest

from ftlit.stages.signals import StopRequest, exit_status


@pytest.fixture(autouse=True)
def _as_before():
    known = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    StopRequest.last = None
    for number, handler in known.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGHUP, 129), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_noted_and_the_step_goes_on(number, status, capsys):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have ignored it
    stop = StopRequest()
    stop.install()
    assert stop.signal is None
    signal.raise_signal(number)
    assert stop.signal == StopRequest.last == number
    assert "stopping after this step" in capsys.readouterr().out
    assert exit_status(number) == status


def test_a_run_under_nohup_outlives_its_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    stop.install()
    signal.raise_signal(signal.SIGHUP)
    assert stop.signal is None


def test_nothing_is_written_to_a_terminal_that_is_gone(monkeypatch):
    """Else the next line that the run prints is an error, and nothing is saved."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop = StopRequest()
        stop.install()
        os.close(ours)
        signal.raise_signal(signal.SIGHUP)
        print("step 2/6", flush=True)
        monkeypatch.undo()
    assert stop.signal == signal.SIGHUP
