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


def plain(family, dtype=torch.float32):
    """The base on an attention that the PEFT library knows."""
    lm = tiny_lm(family, dtype)
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


# Settings of ftlit, of the PEFT library where it calls something else, and the families that have what they name.
BOTH_ENDS = ["input_layernorm", "model.norm", "lm_head", "embed_tokens"]
PATTERNS = {"rank_pattern": {"q_proj": 1, r"layers\.1\..*": 5}, "alpha_pattern": {"down_proj": 1.5}}
SOME = {"target_modules": ["q_proj", "up_proj", "lm_head"], "layers_to_transform": [1], "exclude_modules": ["up_proj"]}
GPT2 = {"target_modules": ["c_attn", "c_proj", "wte", "wpe"], "bias": "all", "modules_to_save": ["ln_f"]}
ALL = {"target_modules": "all-linear"}
WHOLE = {
    "patterns": ({**PATTERNS, "rslora": True}, {**ALL, **PATTERNS, "use_rslora": True}, ["llama", "qwen2"]),
    "layers": (SOME, SOME, ["llama_untied"]),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, None, ["llama", "llama_untied", "gemma3"]),
    "output layer": (
        {"target_modules": ["lm_head", "o_proj"], "init": "gaussian"},
        {"target_modules": ["lm_head", "o_proj"], "init_lora_weights": "gaussian"},
        ["llama", "llama_untied", "cohere"],
    ),
    "both ends by expression": ({"target_modules": r".*(lm_head|embed_tokens|v_proj)"}, None, ["llama", "qwen2"]),
    "trained modules": (
        {"target_modules": ["q_proj"], "modules_to_save": BOTH_ENDS}, None, ["llama", "llama_untied"],
    ),
    "trained block": ({**ALL, "modules_to_save": ["layers.1.mlp"]}, None, ["llama", "qwen2"]),
    "all biases": ({"target_modules": ["q_proj", "o_proj"], "bias": "all"}, None, ["qwen2"]),
    "biases of the adapted": ({"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}, None, ["qwen2"]),
    "GPT-2": (GPT2, {**GPT2, "fan_in_fan_out": True}, ["gpt2"]),
    "GPT-2, all linear": ({**ALL, "bias": "lora_only"}, None, ["gpt2"]),
}  # fmt: skip
WHOLE_CASES = [(case, family) for case, (_, _, families) in WHOLE.items() for family in families]
DTYPES = {torch.float32: 1e-5, torch.float64: 1e-10}


def close(ours, theirs, family, dtype):
    # Gemma rounds to float32 inside.
    tolerance = max(DTYPES[dtype], 2e-5 if family == "gemma3" else 0.0)
    torch.testing.assert_close(ours, theirs.to(ours), rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "family"), WHOLE_CASES)
def test_every_setting_of_lora_in_the_library(case, family, dtype, tmp_path):
    policy = Policy(tiny_lm(family, dtype), LoRA(rank=3, alpha=5, **WHOLE[case][0]))
    moved(policy.lm)
    save_adapter(policy.strategy, policy.lm, tmp_path, "base")
    theirs = peft.PeftModel.from_pretrained(plain(family, dtype), str(tmp_path)).eval()
    for example in map(whole, tiny_examples((4, 9))):
        close(policy(pack([example])).logps, every_logp(theirs, example), family, dtype)
    # Nothing of the library's own is left at its first value: it trains as many numbers as were saved.
    trained = sum(tensor.numel() for tensor in policy.strategy.state(policy.lm).values())
    again = peft.PeftModel.from_pretrained(plain(family, dtype), str(tmp_path), is_trainable=True)
    active = [p for n, p in again.named_parameters() if p.requires_grad and "original_module" not in n]
    assert sum(p.numel() for p in active) == trained


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "family"), WHOLE_CASES)
def test_every_setting_of_lora_from_the_library(case, family, dtype, tmp_path):
    ours, settings, _ = WHOLE[case]
    config = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **(settings or ours))
    theirs = moved(peft.get_peft_model(plain(family, dtype), config)).eval()
    theirs.save_pretrained(str(tmp_path))
    policy = Policy(tiny_lm(family, dtype), LoRA(rank=3, alpha=5, **ours))
    same = sum(p.numel() for n, p in theirs.named_parameters() if p.requires_grad and "original_module" not in n)
    assert sum(p.numel() for p in policy.strategy.trained(policy.lm).values()) == same
    policy.lm = tiny_lm(family, dtype)
    policy.lm.set_attn_implementation("ftlit")
    policy.strategy = load_adapter(policy.lm, tmp_path)
    examples = [whole(example) for example in tiny_examples((4, 9, 6))]
    expected = torch.cat([every_logp(theirs, example) for example in examples])
    close(policy(pack(examples)).logps, expected, family, dtype)
    # ... and as the library writes it, so does ftlit again.
    save_adapter(policy.strategy, policy.lm, tmp_path / "again", "base")
    back = peft.PeftModel.from_pretrained(plain(family, dtype), str(tmp_path / "again")).eval()
    close(every_logp(back, examples[1]), every_logp(theirs, examples[1]), family, dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "llama_untied"])
def test_gradients_are_those_of_the_library(family, tmp_path):
    """Of every trained tensor, with adapters on both ends, whole norms and the scale of rsLoRA."""
    targets = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, task_type="CAUSAL_LM", target_modules=targets, modules_to_save=["model.norm"],
        rank_pattern={"q_proj": 2}, use_rslora=True,
    )  # fmt: skip
    theirs = moved(peft.get_peft_model(plain(family, torch.float64), config))
    theirs.save_pretrained(str(tmp_path))
    lm = tiny_lm(family, torch.float64)
    strategy = load_adapter(lm, tmp_path)
    policy = Policy(tiny_lm(family, torch.float64), LoRA(rank=1))
    policy.lm, policy.strategy = lm, strategy
    lm.set_attn_implementation("ftlit")
    example = whole(tiny_examples((9,))[0])
    policy(pack([example])).logps.sum().backward()
    ids = torch.tensor([example.input_ids])
    logps = torch.log_softmax(theirs(input_ids=ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])
    logps.sum().backward()
    own = {name: p.grad for name, p in strategy.trained(lm).items()}
    other = {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default.weight", "")
        .replace(".default", ""): p.grad
        for name, p in theirs.named_parameters() if p.requires_grad
    }  # fmt: skip
    assert own.keys() == other.keys()
    for name, grad in own.items():
        torch.testing.assert_close(grad, other[name], rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_with_another_embedding_is_refused(tmp_path):
    config = peft.LoraConfig(r=3, task_type="CAUSAL_LM", target_modules=["embed_tokens"])
    peft.get_peft_model(plain("llama"), config).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="is not the model's"):
        load_adapter(tiny_lm(seed=1), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_tied_pair_of_adapters_is_refused(tmp_path):
    config = peft.LoraConfig(r=3, task_type="CAUSAL_LM", target_modules=["embed_tokens"], ensure_weight_tying=True)
    peft.get_peft_model(plain("llama"), config).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="ensure_weight_tying"):
        load_adapter(tiny_lm(), tmp_path)


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
        ({"use_qalora": True}, "use_qalora"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias"),
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
    with pytest.raises(ConfigError, match=rf"{says}.*; merge it with the PEFT library"):
        load_adapter(tiny_lm(), tmp_path)


@pytest.mark.parametrize("kind", ["P_TUNING", "MULTITASK_PROMPT_TUNING", "ADAPTION_PROMPT"])
def test_what_cannot_be_merged_is_refused_without_that_advice(kind, tmp_path):
    policy = Policy(tiny_lm(), LoRA(rank=3))
    save_adapter(policy.strategy, policy.lm, tmp_path, "base")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(ConfigError, match=rf"'{kind}' is not one that ftlit has \([A-Z_, ]+\)\."):
        load_adapter(tiny_lm(), tmp_path)


def test_only_what_an_adapter_uses_is_named(tmp_path):
    """Its tensors are those of what the config names."""
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], use_dora=True)
    peft.get_peft_model(plain("llama"), config).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="uses use_dora, which ftlit cannot read yet; merge"):
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
