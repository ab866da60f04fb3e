"""Stages: LightningModules, one a kind of training. Importing this package makes their short names known."""

from ftlit.stages.base import Stage
from ftlit.stages.dpo import DPO
from ftlit.stages.sft import SFT

__all__ = ["DPO", "SFT", "Stage"]
