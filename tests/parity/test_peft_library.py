"""Adapter folders of ftlit in the PEFT library, and the other way round: the same logits."""

import copy
import json

import pytest
import torch

from ftlit.batch import Example, pack
from ftlit.errors import ConfigError
from ftlit.export.opening import Opened, open_model
from ftlit.export.writing import write_model
from ftlit.models.policy import Policy
from ftlit.peft import LoRA, PrefixTuning, PromptTuning
from ftlit.peft.io import load_adapter, save_adapter
from ftlit.testing import tiny_examples, tiny_lm, tiny_tokenizer

peft = pytest.importorskip("peft")

FAMILIES = ["llama", "qwen2", "gemma2", "mistral"]


def moved(lm, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return lm


def plain(family):
    """The base on an attention that the PEFT library knows."""
    lm = tiny_lm(family)
    lm.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
    return lm


@torch.no_grad()
def every_logp(model, example):
    ids = torch.tensor([example.input_ids])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    logits = logits[-ids.shape[1] :]  # prompt tuning also returns the virtual tokens' logits
    return torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])[:, 0]


def whole(example):
    return Example(example.input_ids, [0.0] + [1.0] * (len(example.input_ids) - 1))


CASES = {
    "lora": (lambda: LoRA(rank=3, alpha=5), lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear")),
    "rslora": (
        lambda: LoRA(rank=4, alpha=5, rslora=True, target_modules=["q_proj", "o_proj"]),
        lambda: peft.LoraConfig(r=4, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "o_proj"]),
    ),
    "prefix": (
        lambda: PrefixTuning(num_virtual_tokens=3, init_std=1.0),
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ),
    "prompt": (
        lambda: PromptTuning(num_virtual_tokens=3),
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_ours_in_the_library(case, family, tmp_path):
    policy = Policy(tiny_lm(family), CASES[case][0]())
    moved(policy.lm)
    save_adapter(policy.strategy, policy.lm, tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(plain(family), str(tmp_path)).eval()
    for example in map(whole, tiny_examples((4, 9))):
        torch.testing.assert_close(every_logp(theirs, example), policy(pack([example])).logps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_theirs_in_ftlit_also_packed(case, family, tmp_path):
    config = CASES[case][1]()
    if case in ("lora", "rslora"):
        config.task_type = "CAUSAL_LM"
    theirs = moved(peft.get_peft_model(plain(family), config)).eval()
    theirs.save_pretrained(str(tmp_path))
    policy = Policy(tiny_lm(family), LoRA(rank=1))  # a strategy to be replaced
    policy.lm = tiny_lm(family)
    policy.lm.set_attn_implementation("ftlit")
    policy.strategy = load_adapter(policy.lm, tmp_path)
    assert isinstance(policy.strategy, type(CASES[case][0]()))
    examples = [whole(example) for example in tiny_examples((4, 9, 6))]
    expected = torch.cat([every_logp(theirs, example) for example in examples])
    torch.testing.assert_close(policy(pack(examples)).logps, expected, rtol=0, atol=1e-5)


def test_the_merged_export_is_a_plain_model_with_the_same_logits(tmp_path, tiny_model_folder):
    import transformers

    opened = open_model(tiny_model_folder)
    policy = Policy(opened.lm, LoRA(rank=3, alpha=5))
    moved(policy.lm)
    examples = [whole(example) for example in tiny_examples()]
    adapted = policy(pack(examples)).logps
    save_adapter(policy.strategy, policy.lm, tmp_path / "adapter", tiny_model_folder)
    write_model(Opened(policy.lm, policy.strategy, tiny_tokenizer(), "base"), tmp_path / "merged")
    lm = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(torch.cat([every_logp(lm, e) for e in examples]), adapted, rtol=0, atol=1e-5)
    assert lm.config._attn_implementation == "sdpa"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    # ... and what the PEFT library makes of the adapter folder, merged there, is the same model.
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    for (name, ours), (other, weight) in zip(lm.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(ours, weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"something_new": {"on": True}}, "something_new"),
    ],
)
def test_what_ftlit_does_not_have_is_refused_by_name(change, says, tmp_path):
    policy = Policy(tiny_lm(), LoRA(rank=3))
    save_adapter(policy.strategy, policy.lm, tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match=says):
        load_adapter(tiny_lm(), tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    policy = Policy(tiny_lm("llama"), LoRA(rank=3))
    save_adapter(policy.strategy, policy.lm, tmp_path, "base")
    wider = tiny_lm("llama", hidden_size=32)
    before = copy.deepcopy(wider.state_dict())
    with pytest.raises(ConfigError, match="does not belong to this model"):
        load_adapter(wider, tmp_path)
    assert all(torch.equal(wider.state_dict()[name], tensor) for name, tensor in before.items())
    with pytest.raises(ConfigError, match="does not belong to this model"):
        load_adapter(tiny_lm("llama", num_hidden_layers=1), tmp_path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "is not an adapter folder"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "JSON object"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "not written completely"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"torn"), "torn"),
    ],
)
def test_broken_folders_say_what_is_broken(spoil, says, tmp_path):
    policy = Policy(tiny_lm(), LoRA(rank=3))
    save_adapter(policy.strategy, policy.lm, tmp_path, "base")
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=says):
        load_adapter(tiny_lm(), tmp_path)
