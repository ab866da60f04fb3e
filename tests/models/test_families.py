"""Models of every kind: the loss is transformers' own, and what text runs through is what is trained."""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from ftlit.batch import pack
from ftlit.errors import ConfigError
from ftlit.models.load import load_lm, prepare
from ftlit.models.policy import Policy, check_packing, head_of, ignored_loss
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.peft.prompt_tuning import VirtualTokens
from ftlit.rollout.generate import answer
from ftlit.testing import tiny_examples, tiny_lm, tiny_tokenizer
from tests.models.every_model import tiny

# One or two of each kind: several inputs (their text only), experts, gates, sinks, narrow values, clipped projections,
# layers that differ, shared keys, a multiplier here and there.
KINDS = {
    "several inputs": ["gemma3", "mistral3", "smolvlm", "qwen2_5_vl", "qwen3_vl_moe", "fuyu", "got_ocr2", "glm4v"],
    "experts": ["mixtral", "qwen2_moe", "qwen3_moe", "phimoe", "jetmoe", "gpt_oss", "granitemoe", "ernie4_5_moe"],
    "latent keys": ["deepseek_v3", "minicpm3", "youtu"],
    "changed in place": ["olmo", "olmoe", "gemma3n_text"],
    "others": ["mimo_v2_flash", "hunyuan_v1_dense", "smollm3", "ministral3", "gpt_bigcode", "opt", "biogpt", "glm4"],
}
FAST = [kind for kinds in KINDS.values() for kind in kinds]
EVERY = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
MORE = {"olmo": {"clip_qkv": 0.1}, "olmoe": {"clip_qkv": 0.1}}
# The last correction of Gemma 3n's is made before the states that it would correct are used.
UNUSED = "altup.correction_coefs"


def make(kind):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    return tiny(kind, **MORE.get(kind, {}))


def own_loss(lm, examples):
    """Mean over the trained tokens by the model's own forward, one example at a time."""
    total = count = 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        labels = ids.masked_fill(torch.tensor([example.weights]) == 0, -100)
        with torch.no_grad():
            logits = lm(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
        total, count = total + loss.item(), count + int((labels[0, 1:] != -100).sum())
    return total / count


def step(lm, strategy, examples):
    """Loss before one step of SGD and after it; every trained weight must have a gradient."""
    prepare(lm)
    policy, batch, losses = Policy(lm, strategy).train(), pack(examples), []
    for _ in range(2):
        policy.zero_grad()
        loss = -(policy(batch).logps * batch.target_weights).sum() / batch.target_weights.sum()
        loss.backward()
        losses.append(loss.item())
        without = [n for n, p in policy.named_parameters() if p.requires_grad and p.grad is None and UNUSED not in n]
        assert all("bias" in name for name in without), without  # biases of routers are not learnt by the gradient
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad / max(1, parameter.grad.norm())
    return losses


@pytest.mark.parametrize("kind", FAST)
def test_the_loss_is_transformers_own_and_falls(kind):
    lm, examples = make(kind), tiny_examples((9, 4, 12))
    expected = own_loss(lm, examples)
    for strategy in (LoRA(rank=8), Full()):
        before, after = step(copy.deepcopy(lm), strategy, examples)
        assert before == pytest.approx(expected, abs=1e-5)
        assert after < before


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl", "smolvlm"])
def test_a_model_of_several_inputs_is_loaded_for_its_text(kind, tmp_path):
    lm = make(kind)
    lm.save_pretrained(tmp_path)
    loaded = load_lm(str(tmp_path))
    assert type(loaded) is type(lm)
    notes = Full().notes(loaded)
    assert len(notes) == 1
    assert notes[0].startswith("frozen, as text does not run through it: model.vis")
    policy = Policy(loaded, LoRA())
    assert not any("vis" in name for name in policy.strategy.trained(loaded))


@pytest.mark.parametrize(
    ("kind", "gates", "reached"),
    [
        ("qwen2_moe", "mlp.shared_expert_gate", "mlp.shared_expert.up_proj"),
        ("phimoe", "mlp.router", "self_attn.q_proj"),
        ("gemma3n_text", "altup.correction_coefs", "laurel.linear_left"),
        ("doge", "self_attn.dt_proj", "self_attn.q_proj"),
    ],
)
def test_all_linear_leaves_gates_and_routers(kind, gates, reached):
    lm, strategy = make(kind), LoRA(rank=8)
    strategy.apply(lm)
    adapted = {name.split(".", 3)[-1] for name in strategy._adapters(lm)}
    assert gates not in adapted
    assert reached in adapted
    (note,) = strategy.notes(lm)
    assert f"all-linear leaves as they are: gates and routers ({gates}" in note


def test_a_rank_beyond_a_whole_layer_is_refused_still():
    """What is as wide as an attention head is no gate."""
    with pytest.raises(ConfigError, match=r"rank 64 exceeds the smaller side of 'model.layers.0.self_attn.q_proj'"):
        LoRA(rank=64).apply(tiny_lm())
    with pytest.raises(ConfigError, match=r"exceeds the smaller side of"):  # named: as it was asked
        LoRA(rank=8, target_modules=["shared_expert_gate"]).apply(make("qwen2_moe"))


@pytest.mark.parametrize(
    ("kind", "weight"),
    [
        ("mixtral", "router_aux_loss_coef 0.001"),
        ("olmoe", "router_aux_loss_coef 0.01"),
        ("jetmoe", "aux_loss_coef 0.01"),
        ("gpt_oss", "router_aux_loss_coef"),
    ],
)
def test_experts_and_the_loss_of_their_router_are_said(kind, weight):
    lm = make(kind)
    assert weight in ignored_loss(lm)
    strategy = LoRA(rank=8)
    strategy.apply(lm)
    assert "experts (mlp." in strategy.notes(lm)[0]


def test_plain_models_need_no_note():
    lm, strategy = tiny_lm(), LoRA(rank=2)
    strategy.apply(lm)
    assert strategy.notes(lm) == [] == Full().notes(lm)
    assert ignored_loss(lm) is None


def test_a_scale_of_the_text_inside_of_a_model_of_several_inputs_is_read():
    lm = make("gemma3")
    lm.config.get_text_config().final_logit_softcapping = 3.0
    assert head_of(lm).softcap == 3.0


@pytest.mark.parametrize("kind", ["paligemma", "bert", "xlnet", "big_bird"])
def test_models_whose_tokens_see_what_follows_are_refused(kind):
    """PaliGemma's own text attention looks both ways where nothing says which part is the prompt."""
    lm = make(kind)
    lm.config.is_decoder = False
    for part in lm.modules():
        if getattr(part, "is_causal", None) is True:
            part.is_causal = False
    with pytest.raises(ConfigError, match=r"is no causal language model: its tokens see those that follow|cannot run"):
        check_packing(lm)


@pytest.mark.parametrize("kind", ["doge"])
def test_a_mask_of_the_models_own_is_refused(kind):
    with pytest.raises(ConfigError, match=r"makes a mask of its own"):
        prepare(make(kind))


@pytest.mark.parametrize("kind", ["gpt_bigcode", "gemma3", "mistral3", "qwen3", "gpt_oss", "llama"])
def test_a_prefix_has_the_size_of_the_keys(kind):
    lm = make(kind)
    prepare(lm)
    policy, batch = Policy(lm, PrefixTuning(3)), pack(tiny_examples((9, 4)))
    assert policy.strategy._sizes[1] == (1 if kind == "gpt_bigcode" else 2)
    policy(batch).logps.sum().backward()
    assert lm.prompt_embeddings.grad.abs().max() > 0
    lm.eval()
    answers = answer(lm, policy.strategy, tiny_tokenizer(), [[5, 6, 7]], max_new_tokens=3)
    assert len(answers) == 1


@pytest.mark.parametrize("kind", ["deepseek_v3", "jetmoe", "mimo_v2_flash", "minicpm3", "gemma4_text", "gemma3n_text"])
def test_a_prefix_is_refused_where_layers_differ_or_share_keys(kind):
    more = {"num_kv_shared_layers": 1, "num_hidden_layers": 4} if kind == "gemma3n_text" else {}
    lm = tiny(kind, **more) if kind in CONFIG_MAPPING else pytest.skip(kind)
    with pytest.raises(ConfigError, match=r"cannot be trained with PrefixTuning.*use PromptTuning or LoRA"):
        PrefixTuning(3).apply(lm)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EVERY)
def test_every_model_of_transformers_is_right_or_refused(kind):
    """Nothing in between: the loss is transformers' own, or one sentence says why not."""
    examples = tiny_examples((9, 4, 12))
    try:
        lm = tiny(kind, **MORE.get(kind, {}))
        expected = own_loss(lm, examples)
    except Exception as error:
        pytest.skip(f"not to be built tiny, or it cannot run on text alone: {str(error)[:80]}")
    sentences = []
    for strategy in (LoRA(rank=8), Full(), PrefixTuning(3), PromptTuning(3)):
        try:
            model = copy.deepcopy(lm)
            prepare(model)
            policy, batch = Policy(model, strategy).train(), pack(examples)
        except ConfigError as error:
            sentences.append(str(error))
            continue
        loss = -(policy(batch).logps * batch.target_weights).sum() / batch.target_weights.sum()
        loss.backward()
        if not isinstance(strategy, VirtualTokens):
            assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert all(sentence.endswith(".") for sentence in sentences), sentences


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4"])
def test_virtual_embeddings_are_refused_where_layers_look_at_the_tokens(kind):
    lm = make(kind)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)  # a new model's norms let nothing of these embeddings through
    with pytest.raises(ConfigError, match=r"cannot be trained with PromptTuning: its layers look at the tokens"):
        PromptTuning(3).apply(lm)


def test_virtual_embeddings_of_a_model_that_scales_inside_its_embedding():
    PromptTuning(3).apply(make("gemma3"))
    PromptTuning(3).apply(tiny_lm("gpt2"))
