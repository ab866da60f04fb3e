"""Strategies: what is trained. One file a strategy; importing this package makes their short names known."""

from ftlit.peft.base import Change, DenseChange, LowRankChange, PEFTStrategy
from ftlit.peft.full import Full
from ftlit.peft.lora import LoRA
from ftlit.peft.prefix_tuning import PrefixTuning
from ftlit.peft.prompt_tuning import PromptTuning
from ftlit.peft.selective import SelectiveStrategy

__all__ = [
    "Change",
    "DenseChange",
    "Full",
    "LoRA",
    "LowRankChange",
    "PEFTStrategy",
    "PrefixTuning",
    "PromptTuning",
    "SelectiveStrategy",
]
