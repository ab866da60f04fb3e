"""Which validation metric a callback watches."""

from __future__ import annotations

import lightning as L

DEFAULT = "val/loss"


def watched(trainer: L.Trainer, monitor: str) -> str | None:
    """The metric behind `monitor` in this run.

    Args:
        trainer: The trainer, its data set up.
        monitor: The metric as it was configured.

    Returns:
        None where nothing is validated; where the default is wanted, what the stage says is best by, of the first set
        if none bears the main name.
    """
    judged_by = getattr(trainer.lightning_module, "judged_by", monitor)
    return judged_by if monitor == DEFAULT or judged_by is None else monitor
