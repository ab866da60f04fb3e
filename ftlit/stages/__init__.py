"""Stages: LightningModules, one a kind of training. Importing this package makes their short names known."""

from ftlit.stages.base import Stage
from ftlit.stages.ppo import PPO
from ftlit.stages.sft import SFT

__all__ = ["PPO", "SFT", "Stage"]
