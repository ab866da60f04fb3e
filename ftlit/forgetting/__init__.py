"""What is forgotten, measured and controlled while a model learns."""

from ftlit.forgetting.base import ForgettingControl, Penalty
from ftlit.forgetting.budget import ForgettingBudget
from ftlit.forgetting.early_stop import EarlyStopOnForgetting
from ftlit.forgetting.ewc import EWC
from ftlit.forgetting.interpolate import Interpolate
from ftlit.forgetting.l2_to_init import L2ToInit
from ftlit.forgetting.probe import ForgettingProbe
from ftlit.forgetting.replay import Replay
from ftlit.forgetting.sample_weighting import SampleWeighting
from ftlit.forgetting.target_kl import TargetKL
from ftlit.forgetting.token_selection import TokenSelection

__all__ = [
    "EWC",
    "EarlyStopOnForgetting",
    "ForgettingBudget",
    "ForgettingControl",
    "ForgettingProbe",
    "Interpolate",
    "L2ToInit",
    "Penalty",
    "Replay",
    "SampleWeighting",
    "TargetKL",
    "TokenSelection",
]
