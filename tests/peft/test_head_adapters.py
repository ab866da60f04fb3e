"""Adapters of classifiers with their heads: the PEFT library loads them to the same scores, and so does ftlit."""

import pytest
import torch

from ftlit.batch import Example, pack
from ftlit.errors import ConfigError
from ftlit.models.heads import ScalarPolicy, head_names, prepare_classifier, rated
from ftlit.models.load import load_classifier
from ftlit.peft import LoRA, PrefixTuning, PromptTuning
from ftlit.peft.io import load_adapter, read_adapter, save_adapter
from ftlit.testing import ENCODERS, tiny_classifier, tiny_examples

STRATEGIES = {
    "LoRA": lambda: LoRA(rank=3),
    "LoRA_bias": lambda: LoRA(rank=3, bias="lora_only"),
    "PrefixTuning": lambda: PrefixTuning(num_virtual_tokens=3, init_std=0.5),
    "PromptTuning": lambda: PromptTuning(num_virtual_tokens=3),
}
CASES = [(family, name) for family in ("llama", "gpt2") for name in ("LoRA", "PromptTuning")]
CASES += [(family, name) for family in ("bert", "roberta", "distilbert") for name in ("LoRA", "LoRA_bias")]
CASES += [("bert", "PrefixTuning"), ("llama", "PrefixTuning")]


def trained(folder, name):
    """A policy whose trained weights have moved away from their start."""
    lm, new = load_classifier(folder, ["a", "b"])
    policy = ScalarPolicy(lm, STRATEGIES[name](), new)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return policy.eval()


def scores(policy, rows):
    return policy(rated(pack([Example(ids, [0.0] * len(ids)) for ids in rows]), range(len(rows))))


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_peft_library_gives_the_same_scores(family, name, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    base = str(tmp_path / "base")
    tiny_classifier(family, labels=2, pad_token_id=1 if family in ENCODERS else 299).save_pretrained(base)
    policy = trained(base, name)
    save_adapter(policy.strategy, policy.lm, tmp_path / "adapter", base, head=policy.head)
    rows = [list(e.input_ids) for e in tiny_examples((5, 9, 3))]
    ours = scores(policy, rows)
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base), tmp_path / "adapter"
    )
    theirs.eval()
    with torch.no_grad():
        for ids, row in zip(rows, ours, strict=True):
            alone = torch.tensor([ids])
            got = theirs(input_ids=alone, attention_mask=torch.ones_like(alone)).logits[0]
            torch.testing.assert_close(got, row, rtol=0, atol=2e-5)
    again = tiny_classifier(family, labels=2, seed=5)
    again, _ = load_classifier(base, ["a", "b"])
    strategy = load_adapter(again, tmp_path / "adapter", head_names(again))
    reopened = ScalarPolicy.around(again.eval(), strategy)
    torch.testing.assert_close(scores(reopened.eval(), rows), ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["LoRA", "PrefixTuning"])
def test_what_the_peft_library_saves_is_read(name, tmp_path):
    peft = pytest.importorskip("peft")
    base = str(tmp_path / "base")
    tiny_classifier("llama", labels=2, pad_token_id=299).save_pretrained(base)
    from transformers import AutoModelForSequenceClassification

    common = {"task_type": "SEQ_CLS"}
    config = (
        peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **common)
        if name == "LoRA"
        else peft.PrefixTuningConfig(num_virtual_tokens=3, **common)
    )
    theirs = peft.get_peft_model(AutoModelForSequenceClassification.from_pretrained(base), config).eval()
    with torch.no_grad():
        theirs.base_model.get_submodule("model.score" if name == "LoRA" else "score").modules_to_save[
            "default"
        ].weight.normal_()
    theirs.save_pretrained(tmp_path / "adapter")
    lm, _ = load_classifier(base, ["a", "b"])
    policy = ScalarPolicy.around(lm, load_adapter(lm, tmp_path / "adapter", head_names(lm))).eval()
    ids = [5, 9, 12, 40]
    with torch.no_grad():
        wanted = theirs(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, 4, dtype=torch.int64)).logits
        torch.testing.assert_close(scores(policy, [ids]), wanted, rtol=0, atol=2e-5)


def test_a_head_of_another_size_is_refused(tmp_path):
    base = str(tmp_path / "base")
    tiny_classifier("llama", labels=2).save_pretrained(base)
    policy = trained(base, "LoRA")
    save_adapter(policy.strategy, policy.lm, tmp_path / "adapter", base, head=policy.head)
    assert read_adapter(tmp_path / "adapter")[0]["task_type"] == "SEQ_CLS"
    other = tiny_classifier("llama", labels=3)
    prepare_classifier(other)
    with pytest.raises(ConfigError, match="has a head that does not fit"):
        load_adapter(other, tmp_path / "adapter", head_names(other))
