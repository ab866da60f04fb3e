"""Stages: LightningModules, one a kind of training. Importing this package makes their short names known."""

from ftlit.stages.base import Stage
from ftlit.stages.classification import Classification
from ftlit.stages.dpo import DPO
from ftlit.stages.ppo import PPO
from ftlit.stages.reward import RewardModel
from ftlit.stages.sft import SFT

__all__ = ["DPO", "PPO", "SFT", "Classification", "RewardModel", "Stage"]
