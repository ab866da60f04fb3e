"""Callbacks that are not about forgetting: checkpoints, adapters, generation, reports, progress."""

from ftlit.callbacks.adapters import SaveAdapter
from ftlit.callbacks.checkpoint import SaveCheckpoint
from ftlit.callbacks.evaluation import WriteEvaluation
from ftlit.callbacks.generation_eval import GenerationEval
from ftlit.callbacks.predictions import WritePredictions
from ftlit.callbacks.progress import Progress
from ftlit.callbacks.report import Report
from ftlit.callbacks.rollout_samples import RolloutSamples
from ftlit.rollout import verifiers as verifiers  # known by short name with the callback that takes them

__all__ = [
    "GenerationEval",
    "Progress",
    "Report",
    "RolloutSamples",
    "SaveAdapter",
    "SaveCheckpoint",
    "WriteEvaluation",
    "WritePredictions",
]
