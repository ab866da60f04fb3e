"""Which validation metric a callback watches."""

from __future__ import annotations

import lightning as L

from ftlit.data.datamodules import MAIN

DEFAULT = "val/loss"


def watched(trainer: L.Trainer, monitor: str) -> str | None:
    """The metric behind `monitor` in this run.

    Args:
        trainer: The trainer, its data set up.
        monitor: The metric as it was configured.

    Returns:
        None where nothing is validated; where the default is wanted and no set bears its name, the first set's loss.
    """
    names = getattr(getattr(trainer, "datamodule", None), "validation_names", None)
    if names is not None and not names:
        return None
    if names and monitor == DEFAULT and MAIN not in names:
        return f"val/{names[0]}/loss"
    return monitor
