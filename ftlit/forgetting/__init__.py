"""What is forgotten, measured and controlled while a model learns."""

from ftlit.forgetting.base import ForgettingControl, Penalty
from ftlit.forgetting.replay import Replay

__all__ = ["ForgettingControl", "Penalty", "Replay"]
