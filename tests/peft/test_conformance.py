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


class TestLoRAWithPatterns(PEFTStrategySuite):
    def make(self):
        return LoRA(
            rank=3, alpha=5, rank_pattern={"q_proj": 1, r"layers\.1\..*": 4}, alpha_pattern={"mlp.down_proj": 1.5},
            rslora=True, init="gaussian",
        )  # fmt: skip


class TestLoRAOnSomeLayers(PEFTStrategySuite):
    family = "mistral"

    def make(self):
        return LoRA(rank=2, layers_to_transform=1, exclude_modules=["k_proj", "mlp.up_proj"])


class TestLoRAOnTheEmbedding(PEFTStrategySuite):
    def make(self):  # the embedding is also the output layer, which stays as it is
        return LoRA(rank=3, alpha=5, target_modules=["q_proj", "embed_tokens"])


class TestLoRAOnAScaledEmbedding(PEFTStrategySuite):
    family = "gemma3"
    tolerance = 1e-5  # its norms and its attention softmax round to float32

    def make(self):
        return LoRA(rank=3, alpha=5, target_modules=["embed_tokens", "lm_head"])


class TestLoRAOnTheOutputLayer(PEFTStrategySuite):
    def make(self):  # and not on the embedding, which is the same weight
        return LoRA(rank=3, alpha=5, target_modules=["o_proj", "lm_head"])


class TestLoRAOnASoftCappedOutputLayer(PEFTStrategySuite):
    family = "gemma2"
    tolerance = 1e-5  # its norms and its attention softmax round to float32

    def make(self):
        return LoRA(rank=2, target_modules=["lm_head"])


class TestLoRAOnBothEndsUntied(PEFTStrategySuite):
    family = "llama_untied"

    def make(self):
        return LoRA(rank=2, target_modules=["lm_head", "embed_tokens", "v_proj"])


class TestLoRAWithTrainedModules(PEFTStrategySuite):
    def make(self):  # whole copies of both ends of the one weight, and of norms
        return LoRA(rank=2, modules_to_save=["embed_tokens", "lm_head", "model.norm", "input_layernorm"])


class TestLoRAWithATrainedBlock(PEFTStrategySuite):
    family = "qwen2"

    def make(self):
        return LoRA(rank=2, modules_to_save=["layers.1"], target_modules=["q_proj", "embed_tokens"], bias="all")


class TestLoRAWithItsBiases(PEFTStrategySuite):
    family = "qwen2"

    def make(self):
        return LoRA(rank=2, target_modules=["q_proj", "o_proj"], bias="lora_only", modules_to_save=["lm_head"])


class TestLoRAOnConv1D(PEFTStrategySuite):
    family = "gpt2"

    def make(self):
        return LoRA(rank=2, alpha=5)


class TestLoRAWithEverything(PEFTStrategySuite):
    family = "gpt2"

    def make(self):
        return LoRA(
            rank=2, target_modules=["c_attn", "mlp.c_fc", "wte", "wpe", "lm_head"], bias="all",
            modules_to_save=["ln_f", "ln_1"], rank_pattern={"wte": 5}, alpha_pattern={"lm_head": 1.0},
        )  # fmt: skip


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


class TestPrefixTuningGPT2(PEFTStrategySuite):
    identity_at_start = False
    family = "gpt2"

    def make(self):
        return PrefixTuning(num_virtual_tokens=2, init_std=1.0)


@pytest.mark.parametrize("strategy", [LoRA, PrefixTuning, PromptTuning, Full])
def test_strategies_are_made_without_arguments(strategy):
    assert strategy()
