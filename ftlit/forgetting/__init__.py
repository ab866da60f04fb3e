"""What is forgotten, measured and controlled while a model learns."""

from ftlit.forgetting.base import ForgettingControl, Penalty
from ftlit.forgetting.budget import ForgettingBudget
from ftlit.forgetting.probe import ForgettingProbe
from ftlit.forgetting.replay import Replay

__all__ = ["ForgettingBudget", "ForgettingControl", "ForgettingProbe", "Penalty", "Replay"]
