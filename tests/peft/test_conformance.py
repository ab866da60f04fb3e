import pytest

from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.testing import PEFTStrategySuite


class TestFull(PEFTStrategySuite):
    def make(self):
        return Full()


class TestFullUntied(PEFTStrategySuite):
    family = "llama_untied"

    def make(self):
        return Full()


class TestFullGemma2(PEFTStrategySuite):
    family = "gemma2"
    tolerance = 1e-5  # its norms and its attention softmax round to float32

    def make(self):
        return Full()


class TestLoRA(PEFTStrategySuite):
    def make(self):
        return LoRA(rank=3, alpha=5)


class TestLoRAWithBiases(PEFTStrategySuite):
    family = "qwen2"

    def make(self):
        return LoRA(rank=3, rslora=True)


class TestLoRAOnTwoModules(PEFTStrategySuite):
    family = "mistral"

    def make(self):
        return LoRA(rank=2, target_modules=["q_proj", "down_proj"])


class TestLoRAGemma2(PEFTStrategySuite):
    family = "gemma2"
    tolerance = 1e-5  # its norms and its attention softmax round to float32

    def make(self):
        return LoRA(rank=2, target_modules=r".*layers\.1\..*_proj")


class TestPrefixTuning(PEFTStrategySuite):
    identity_at_start = False

    def make(self):
        return PrefixTuning(num_virtual_tokens=3, init_std=1.0)


class TestPrefixTuningQwen3(PEFTStrategySuite):
    identity_at_start = False
    family = "qwen3"

    def make(self):
        return PrefixTuning(num_virtual_tokens=2, init_std=1.0)


class TestPromptTuning(PEFTStrategySuite):
    identity_at_start = False

    def make(self):
        return PromptTuning(num_virtual_tokens=3)


class TestPromptTuningGemma2(PEFTStrategySuite):
    identity_at_start = False
    family = "gemma2"
    tolerance = 1e-5  # its norms and its attention softmax round to float32

    def make(self):
        return PromptTuning(num_virtual_tokens=2)


class TestPrefixTuningSlidingWindow(PEFTStrategySuite):
    identity_at_start = False
    family = "mistral"

    def make(self):
        return PrefixTuning(num_virtual_tokens=2, init_std=1.0)


@pytest.mark.parametrize("strategy", [LoRA, PrefixTuning, PromptTuning, Full])
def test_strategies_are_made_without_arguments(strategy):
    assert strategy()
