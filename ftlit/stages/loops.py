"""Where Lightning's loops stand after a number of optimizer steps.

Lightning saves the progress of its loops as it is at that moment, with different counters for a checkpoint made after a
batch, inside a validation, after it, and after an epoch, and guesses at loading which it was. A run of ftlit is wholly
described by its number of optimizer steps, so the counters are written from that: inside an epoch, the step completed,
nothing half done.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loops.fit_loop import _FitLoop


def position(step: int, epoch_steps: int) -> dict[str, Any]:
    """The state of Lightning's fit loop.

    Args:
        step: Optimizer steps taken.
        epoch_steps: Optimizer steps of an epoch.

    Returns:
        What goes into `checkpoint["loops"]["fit_loop"]`.
    """
    epoch, number = divmod(step, epoch_steps)
    full = ("ready", "started", "processed", "completed")
    epochs = {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
    nothing = {"total": dict.fromkeys(full, 0), "current": dict.fromkeys(full, 0), "is_last_batch": False}
    return {
        "state_dict": {},
        "epoch_progress": {"total": epochs, "current": dict(epochs)},
        "epoch_loop.state_dict": {"_batches_that_stepped": step},
        "epoch_loop.batch_progress": {
            "total": dict.fromkeys(full, step),
            "current": dict.fromkeys(full, number),
            "is_last_batch": False,
        },
        "epoch_loop.scheduler_progress": _both(("ready", "completed"), step, number),
        "epoch_loop.automatic_optimization.state_dict": {},
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {
                "step": _both(("ready", "completed"), step, number),
                "zero_grad": _both(("ready", "started", "completed"), step, number),
            }
        },
        "epoch_loop.manual_optimization.state_dict": {},
        "epoch_loop.manual_optimization.optim_step_progress": _both(("ready", "completed"), 0, 0),
        "epoch_loop.val_loop.state_dict": {},
        "epoch_loop.val_loop.batch_progress": nothing,
    }


def finish(loop: _FitLoop) -> None:
    """Runs a fit loop that has no step left: what comes before the first step and what follows the last.

    Lightning passes over both; a run that was killed after its last step would stay without validation and report.
    """
    loop.setup_data()
    loop.on_run_start()
    loop.on_run_end()


def _both(names: tuple[str, ...], total: int, current: int) -> dict[str, dict[str, int]]:
    return {"total": dict.fromkeys(names, total), "current": dict.fromkeys(names, current)}
