"""The learning rate of a run that names none: one table of stages and strategies."""

from __future__ import annotations

from typing import NamedTuple

from ftlit.peft import Full, LoRA, PEFTStrategy, PrefixTuning, PromptTuning

# A stage's own rate, by the name of its class; SFT, and a stage of one's own that descends from none of these, takes
# that of its strategy.
_STAGES: dict[str, float] = {"DPO": 5e-5, "RewardModel": 1e-5, "PPO": 1e-5, "Classification": 2e-5}
_STRATEGIES: dict[type[PEFTStrategy], float] = {Full: 2e-5, LoRA: 2e-4, PrefixTuning: 5e-3, PromptTuning: 5e-3}


class Rate(NamedTuple):
    """A peak learning rate.

    Attributes:
        value: The rate.
        why: Where it comes from, in words.
    """

    value: float
    why: str


def default_rate(stage: type, strategy: type[PEFTStrategy]) -> Rate:
    """The rate of a stage and a strategy where the config names none.

    A subclass has the rate of what it descends from. A strategy of one's own has that of full fine-tuning where it
    trains weights of the model, else that of LoRA.

    Args:
        stage: Class of the stage.
        strategy: Class of the strategy.
    """
    for cls in stage.__mro__:
        if cls.__name__ in _STAGES and cls.__module__.startswith("ftlit."):
            return Rate(_STAGES[cls.__name__], f"the default of {cls.__name__}")
    for kind in strategy.__mro__:
        if kind in _STRATEGIES:
            return Rate(_STRATEGIES[kind], f"the default of {stage.__name__} with {kind.__name__}")
    like = Full if strategy.trains_base else LoRA
    why = f"{strategy.__name__} has no default of its own and takes that of {like.__name__}"
    return Rate(_STRATEGIES[like], why)


__all__ = ["Rate", "default_rate"]
