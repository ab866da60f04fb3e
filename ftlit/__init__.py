"""ftlit: fine-tune and align language models on PyTorch Lightning, and see what they forget.

Importing this package is instant: torch and Lightning are imported when a name below is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "DPO": "ftlit.stages.dpo",
    "SFT": "ftlit.stages.sft",
    "Classification": "ftlit.stages.classification",
    "RewardModel": "ftlit.stages.reward",
    "RewardScorer": "ftlit.export.scorer",
    "Stage": "ftlit.stages.base",
    "PreferenceData": "ftlit.data.preferences",
    "SFTData": "ftlit.data.datamodules",
    "ClassificationData": "ftlit.data.classification",
    "PPO": "ftlit.stages.ppo",
    "PromptData": "ftlit.data.prompts",
    "PEFTStrategy": "ftlit.peft.base",
    "Full": "ftlit.peft.full",
    "LoRA": "ftlit.peft.lora",
    "PrefixTuning": "ftlit.peft.prefix_tuning",
    "PromptTuning": "ftlit.peft.prompt_tuning",
    "SelectiveStrategy": "ftlit.peft.selective",
    "RowFormat": "ftlit.data.formats.base",
    "PackedBatch": "ftlit.batch",
    "FtlitError": "ftlit.errors",
    "ConfigError": "ftlit.errors",
    "DataError": "ftlit.errors",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ftlit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
