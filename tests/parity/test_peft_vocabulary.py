"""Adapters of the PEFT library whose model was resized, and other ways in which they are written."""

import json

import peft
import pytest
import torch

from ftlit.batch import pack
from ftlit.errors import ConfigError
from ftlit.models.policy import Policy
from ftlit.peft import LoRA
from ftlit.peft.io import load_adapter, read_config, save_adapter
from ftlit.testing import tiny_examples, tiny_lm
from tests.parity.test_peft_library import every_logp, moved, plain, whole

pytestmark = pytest.mark.filterwarnings("ignore")


def resized(family, rows):
    """A model whose vocabulary was changed, its new rows like nothing else."""
    lm = plain(family)
    lm.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            module.weight[300:].normal_(std=0.3)
    return lm


ENDS = ["embed_tokens", "lm_head"]
LORA = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"}
CASES = {
    "beside the adapter": lambda: peft.LoraConfig(target_modules=["q_proj"], **LORA),
    "trained whole": lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=ENDS, **LORA),
    "one trained whole": lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **LORA),
    "adapted": lambda: peft.LoraConfig(target_modules=["q_proj", *ENDS], **LORA),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def opened(folder, family):
    """The base as it was, with the adapter."""
    policy = Policy(tiny_lm(family), LoRA(rank=1))  # a strategy to be replaced
    policy.lm = tiny_lm(family)
    policy.lm.set_attn_implementation("ftlit")
    policy.strategy = load_adapter(policy.lm, folder)
    return policy


@pytest.mark.parametrize("family", ["llama", "llama_untied"])
@pytest.mark.parametrize("rows", [303, 320, 290])
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_a_resized_model_is_read(case, rows, family, tmp_path):
    theirs = moved(peft.get_peft_model(resized(family, rows), CASES[case]())).eval()
    theirs.save_pretrained(str(tmp_path / "a"), save_embedding_layers=True)
    policy = opened(tmp_path / "a", family)
    assert policy.lm.get_input_embeddings().weight.shape[0] == rows
    assert policy.lm.config.vocab_size == rows
    examples = [whole(example) for example in tiny_examples((4, 9, 6), vocabulary=min(rows, 303))]
    expected = torch.cat([every_logp(theirs, example) for example in examples])
    torch.testing.assert_close(policy(pack(examples)).logps, expected, rtol=0, atol=1e-5)
    # ... and written again, it is that adapter for the library and for ftlit.
    save_adapter(policy.strategy, policy.lm, tmp_path / "b", "base")
    again = opened(tmp_path / "b", family)
    torch.testing.assert_close(again(pack(examples)).logps, expected, rtol=0, atol=1e-5)
    back = peft.PeftModel.from_pretrained(resized(family, rows), str(tmp_path / "b")).eval()
    theirs_again = torch.cat([every_logp(back, example) for example in examples])
    torch.testing.assert_close(theirs_again, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["beside the adapter", "trained whole", "adapted"])
def test_it_is_merged_with_its_vocabulary(case, tmp_path):
    theirs = moved(peft.get_peft_model(resized("llama_untied", 303), CASES[case]())).eval()
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
    policy = opened(tmp_path, "llama_untied")
    example = whole(tiny_examples((9,), vocabulary=303)[0])
    expected = every_logp(theirs, example)
    policy.strategy.merge(policy.lm)
    policy.lm.set_attn_implementation("sdpa")
    torch.testing.assert_close(every_logp(policy.lm.eval(), example), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["beside the adapter", "trained whole", "adapted"])
def test_a_run_goes_on_from_it(case, tmp_path):
    theirs = moved(peft.get_peft_model(resized("llama_untied", 303), CASES[case]())).eval()
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
    config = CASES[case]()
    settings = {"target_modules": sorted(config.target_modules), "modules_to_save": config.modules_to_save}
    strategy = LoRA(rank=3, alpha=5, from_adapter=str(tmp_path), **settings)
    policy = Policy(tiny_lm("llama_untied"), strategy)
    example = whole(tiny_examples((9,), vocabulary=303)[0])
    torch.testing.assert_close(policy(pack([example])).logps, every_logp(theirs, example), rtol=0, atol=1e-5)
    moved(policy.lm)
    save_adapter(strategy, policy.lm, tmp_path / "b", "base")
    assert torch.equal(opened(tmp_path / "b", "llama_untied")(pack([example])).logps, policy(pack([example])).logps)


def test_rows_that_are_nowhere_are_one_sentence(tmp_path):
    """An older library wrote the embedding alone, and the output layer has rows of its own."""
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], **LORA)
    theirs = moved(peft.get_peft_model(resized("llama_untied", 303), config))
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    with pytest.raises(ConfigError, match=r"303 tokens, this one has 300.*rows of the others in lm_head are not in"):
        load_adapter(tiny_lm("llama_untied"), tmp_path)


def test_another_model_is_still_refused(tmp_path):
    theirs = peft.get_peft_model(resized("llama", 303), CASES["adapted"]())
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=True)
    with pytest.raises(ConfigError, match="that is not this model's; give the base model it was trained on"):
        load_adapter(tiny_lm("llama", seed=1), tmp_path)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_a_model_that_has_none(bias, tmp_path):
    theirs = moved(peft.get_peft_model(plain("llama"), peft.LoraConfig(bias=bias, target_modules=["q_proj"], **LORA)))
    theirs.eval().save_pretrained(str(tmp_path))
    assert read_config(tmp_path)["bias"] == bias
    example = whole(tiny_examples((9,))[0])
    torch.testing.assert_close(opened(tmp_path, "llama")(pack([example])).logps, every_logp(theirs, example), rtol=0,
                               atol=1e-5)  # fmt: skip


def test_weights_in_the_older_file(tmp_path):
    theirs = moved(peft.get_peft_model(plain("llama"), peft.LoraConfig(target_modules=["q_proj"], **LORA))).eval()
    theirs.save_pretrained(str(tmp_path), safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    example = whole(tiny_examples((9,))[0])
    torch.testing.assert_close(opened(tmp_path, "llama")(pack([example])).logps, every_logp(theirs, example), rtol=0,
                               atol=1e-5)  # fmt: skip


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("content", [{"a": Evil()}, {"a": 3}, [1], None])
def test_an_older_file_that_holds_more_than_tensors_is_not_run(content, tmp_path, capsys):
    save_adapter(*adapter(), tmp_path, "base")
    (tmp_path / "adapter_model.safetensors").unlink()
    if content is None:
        (tmp_path / "adapter_model.bin").write_bytes(b"torn")
    else:
        torch.save(content, tmp_path / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"adapter_model\.bin"):
        load_adapter(tiny_lm(), tmp_path)
    assert "executed" not in capsys.readouterr().out


def adapter():
    policy = Policy(tiny_lm(), LoRA(rank=3))
    return policy.strategy, policy.lm


@pytest.mark.parametrize(
    ("wanted", "listed"),
    [
        ("q_proj", ["q_proj"]),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("self_attn.o_proj", ["self_attn.o_proj"]),
    ],
)
def test_target_modules_as_text_are_names(wanted, listed):
    one, other = LoRA(rank=2, target_modules=wanted), LoRA(rank=2, target_modules=listed)
    models = tiny_lm(), tiny_lm()
    one.apply(models[0])
    other.apply(models[1])
    assert set(one.trained(models[0])) == set(other.trained(models[1]))


def test_target_modules_as_an_expression_stay_one(tmp_path):
    strategy = LoRA(rank=2, target_modules=r".*layers\.1\..*q_proj")
    lm = tiny_lm()
    strategy.apply(lm)
    assert len(strategy.trained(lm)) == 2
    theirs = peft.get_peft_model(plain("llama"), peft.LoraConfig(target_modules=r".*layers\.1\..*q_proj", **LORA))
    theirs.save_pretrained(str(tmp_path))
    assert isinstance(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"], str)
    assert len(load_adapter(tiny_lm(), tmp_path).target_modules) == 1
