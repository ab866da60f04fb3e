"""Callbacks that are not about forgetting: checkpoints, adapters, reports, progress."""

from ftlit.callbacks.adapters import SaveAdapter
from ftlit.callbacks.checkpoint import SaveCheckpoint
from ftlit.callbacks.predictions import WritePredictions
from ftlit.callbacks.progress import Progress
from ftlit.callbacks.report import Report

__all__ = ["Progress", "Report", "SaveAdapter", "SaveCheckpoint", "WritePredictions"]
