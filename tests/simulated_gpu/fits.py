"""Runs on the simulated device: what is fitted, with what, and on which rows."""

import json
import os
from contextlib import contextmanager

import lightning as L
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from ftlit.callbacks import GenerationEval
from ftlit.data.classification import ClassificationData
from ftlit.data.datamodules import SFTData
from ftlit.data.preferences import PreferenceData
from ftlit.data.prompts import PromptData
from ftlit.forgetting import (
    EWC,
    EarlyStopOnForgetting,
    ForgettingBudget,
    ForgettingProbe,
    Interpolate,
    L2ToInit,
    Replay,
    SampleWeighting,
    TargetKL,
    TokenSelection,
)
from ftlit.objectives.advantages import GRPO, RLOO, ReMax
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.stages import DPO, PPO, SFT, Classification, RewardModel
from tests.simulated_gpu.device import NAME


class SimulatedAccelerator(Accelerator):
    """What Lightning asks of a device."""

    def setup_device(self, device):
        pass

    def get_device_stats(self, device):
        return {}

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(devices):
        return [0]

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return NAME


class Where(L.Callback):
    """Notes on which devices the weights are that are trained; Lightning moves a model to the CPU when it is done."""

    def on_train_end(self, trainer, stage):
        stage.seen = {parameter.device.type for parameter in stage.parameters()}


def trainer(folder, steps=2, precision="bf16-mixed", callbacks=(), on_cpu=False, **options):
    """A Trainer whose strategy sits on the device, so that Lightning loads models in its context."""
    options = {"enable_checkpointing": False, "accelerator": "cpu", **options} if on_cpu else {
        "strategy": SingleDeviceStrategy(device=torch.device(NAME, 0), accelerator=SimulatedAccelerator()),
        "plugins": [MixedPrecision(precision, NAME)] if precision.endswith("mixed") else [],
        "enable_checkpointing": False, **options,
    }  # fmt: skip
    return L.Trainer(
        max_steps=steps, max_epochs=-1, callbacks=list(callbacks), default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, gradient_clip_val=1.0, **options,
    )  # fmt: skip


# ---- rows -----------------------------------------------------------------------------------------------------------


def _asked(number):
    return {"role": "user", "content": "ab" * (1 + number % 3)}


def _said(text):
    return {"role": "assistant", "content": text}


ROWS = {
    "sft": lambda i: {"messages": [_asked(i), _said("xy" * (1 + i % 4))]},
    "pairs": lambda i: {"prompt": [_asked(i)], "chosen": [_said("xy" * (1 + i % 3))], "rejected": [_said("zw")]},
    "prompts": lambda i: {"messages": [_asked(i), _said("q")]},
    "labels": lambda i: {"text": "ab" * (1 + i % 5), "label": "yes" if i % 2 else "no"},
}


def write_rows(folder, count=10):
    """The rows of every kind, as files."""
    for name, make in ROWS.items():
        text = "".join(json.dumps(make(number)) + "\n" for number in range(count))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def reward(prompts, completions, **columns):
    return [float(len(one)) for one in completions]


# ---- what is fitted -------------------------------------------------------------------------------------------------


class Kit:
    """Makes stages and data on one model and one folder of rows."""

    def __init__(self, model, rows):
        self.model, self.rows, self.general = str(model), rows, str(rows / "sft.jsonl")

    def _data(self, kind, name, **more):
        options = {"validation": 0.2, "batch_size": 4, "max_length": 64, **more}
        if kind is not PromptData:
            options |= {"cache": False, "num_workers": 0}
        return kind(train=str(self.rows / f"{name}.jsonl"), **options)

    def sft(self, peft, **more):
        return SFT(policy=self.model, peft=peft, **more), self._data(SFTData, "sft")

    def dpo(self, peft, **more):
        return DPO(policy=self.model, peft=peft, **more), self._data(PreferenceData, "pairs")

    def reward(self, peft, **more):
        return RewardModel(policy=self.model, peft=peft, **more), self._data(PreferenceData, "pairs")

    def classification(self, peft, **more):
        return Classification(policy=self.model, peft=peft, **more), self._data(ClassificationData, "labels")

    def ppo(self, peft, **more):
        settings = {"max_new_tokens": 4, "num_minibatches": 1, "update_epochs": 2, **more}
        if settings.get("value_model") == "policy":
            settings["value_model"] = self.model
        return PPO(policy=self.model, peft=peft, reward=reward, **settings), self._data(PromptData, "prompts")


STRATEGIES = {"full": Full, "lora": LoRA, "prefix": PrefixTuning, "prompt": PromptTuning}
STAGES = {
    "sft": lambda kit, peft: kit.sft(peft),
    "dpo": lambda kit, peft: kit.dpo(peft),
    "kto": lambda kit, peft: kit.dpo(peft, loss="kto"),
    "cached": lambda kit, peft: kit.dpo(peft, cache_reference=True),
    "reward": lambda kit, peft: kit.reward(peft),
    "classification": lambda kit, peft: kit.classification(peft),
    "ppo": lambda kit, peft: kit.ppo(peft, entropy_coef=0.01),
    "ppo_values": lambda kit, peft: kit.ppo(peft, value_model="policy"),
    "grpo": lambda kit, peft: kit.ppo(peft, advantage=GRPO(), num_answers=2),
    "rloo": lambda kit, peft: kit.ppo(peft, advantage=RLOO(), num_answers=2),
    "remax": lambda kit, peft: kit.ppo(peft, advantage=ReMax()),
}
_PROBE = {"domains": {"own": "self"}, "own_rows": 4, "own_new_tokens": 4}
CONTROLS = {
    "replay": lambda kit: [Replay(num_rows=4, max_new_tokens=4)],
    "replay_ce": lambda kit: [Replay(objective="ce", num_rows=4, max_new_tokens=4, name="replay_ce")],
    "target_kl": lambda kit: [TargetKL()],
    "ewc": lambda kit: [EWC(kit.general, num_rows=2)],
    "l2": lambda kit: [L2ToInit()],
    "l2_rows": lambda kit: [L2ToInit(mode="coupled", rows=kit.general, num_rows=2, name="l2_rows")],
    "tokens": lambda kit: [TokenSelection()],
    "samples": lambda kit: [SampleWeighting()],
    "interpolate": lambda kit: [Interpolate()],
    "probe": lambda kit: [ForgettingProbe(**_PROBE, at_steps=[1], kl=True)],
    "early_stop": lambda kit: [EarlyStopOnForgetting(max_increase=5.0), ForgettingProbe(**_PROBE, every_n_steps=1)],
    "budget": lambda kit: [
        ForgettingBudget(documents=10, new_tokens=4, steering_documents=2),
        Replay(num_rows=4, max_new_tokens=4),
    ],
    "generation": lambda kit: [GenerationEval(num_rows=2, max_new_tokens=4)],
}
TOKENS = ("sft", "dpo", "kto", "cached")  # stages on which every control can act


@contextmanager
def own_cache(folder):
    """A cache that other runs have not filled."""
    was = os.environ.get("FTLIT_CACHE")
    os.environ["FTLIT_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("FTLIT_CACHE") if was is None else os.environ.update(FTLIT_CACHE=was)
