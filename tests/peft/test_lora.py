"""LoRA beyond the conformance suite: settings, refusals, precision, what is kept for backward, going on."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftlit.batch import pack
from ftlit.errors import ConfigError
from ftlit.models.policy import Policy
from ftlit.peft import LoRA
from ftlit.peft.copies import copies
from ftlit.peft.io import load_adapter, read_config, save_adapter
from ftlit.peft.lora_layers import LoRALayer, LoRALinear
from ftlit.peft.matching import layer_of, pattern_key, shortest
from ftlit.testing import tiny_examples, tiny_lm


def moved(lm, size=0.2):
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    return lm


def adapted(lm):
    return {name: module for name, module in lm.named_modules() if isinstance(module, LoRALayer)}


# ---- settings --------------------------------------------------------------------------------------------------------


def test_patterns_name_whole_components_and_the_first_counts():
    pattern = {"q_proj": 1, r"layers\.1\..*": 4, "up": 9}
    assert pattern_key(pattern, "model.layers.1.self_attn.q_proj") == "q_proj"
    assert pattern_key(pattern, "model.layers.1.mlp.up_proj") == r"layers\.1\..*"
    assert pattern_key(pattern, "model.layers.11.mlp.up_proj") is None
    assert pattern_key(pattern, "model.layers.0.mlp.q_proj_extra") is None
    assert pattern_key({"proj": 2}, "model.layers.0.self_attn.q_proj") is None


def test_layers_are_the_first_number():
    assert layer_of("model.layers.3.mlp.experts.7.up_proj") == 3
    assert layer_of("transformer.h.0.attn.c_attn") == 0
    assert layer_of("lm_head") is None


def test_the_shortest_endings_select_exactly_the_names():
    every = ["a.0.q", "a.1.q", "a.0.k", "a.1.k"]
    assert shortest(["a.0.q", "a.1.q"], every) == ["q"]
    assert shortest(["a.0.q", "a.1.k"], every) == ["a.0.q", "a.1.k"]


def test_ranks_and_scales_by_module():
    lm = tiny_lm()
    LoRA(rank=2, alpha=6, rank_pattern={"q_proj": 4}, alpha_pattern={"layers.1.*": 1.0}, rslora=True).apply(lm)
    for name, layer in adapted(lm).items():
        rank = 4 if name.endswith("q_proj") else 2
        assert layer.lora_A.shape[0] == layer.lora_B.shape[1] == rank
        assert layer.scale == pytest.approx((1.0 if "layers.1." in name else 6.0) / math.sqrt(rank))


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]}, lambda n: "k_proj" not in n and "0.mlp.up" not in n),
        ({"exclude_modules": r".*layers\.0\..*"}, lambda n: "layers.1." in n),
        ({"layers_to_transform": 1}, lambda n: "layers.1." in n),
        ({"layers_to_transform": [0], "target_modules": ["q_proj"]}, lambda n: "0.self_attn.q" in n),
        ({"modules_to_save": ["layers.0.mlp"]}, lambda n: "layers.0.mlp" not in n),
    ],
)  # fmt: skip
def test_which_modules_are_adapted(settings, left):
    lm = tiny_lm()
    every = [n for n, m in lm.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    LoRA(rank=2, **settings).apply(lm)
    assert list(adapted(lm)) == [name for name in every if left(name)]


def test_first_values():
    lm = tiny_lm("llama_untied", vocab_size=4000)
    torch.manual_seed(0)
    LoRA(rank=8, init="gaussian", target_modules=["q_proj", "lm_head", "embed_tokens"]).apply(lm)
    layers = adapted(lm)
    assert layers["lm_head"].lora_A.std().item() == pytest.approx(1 / 8, rel=0.3)
    assert layers["model.embed_tokens"].lora_embedding_B.std().item() == pytest.approx(1, rel=0.3)
    assert not layers["model.embed_tokens"].lora_embedding_A.any()
    assert not layers["lm_head"].lora_B.any()
    uniform = tiny_lm()
    LoRA(rank=8).apply(uniform)
    bound = 1 / math.sqrt(16)
    for name, layer in adapted(uniform).items():
        if "down_proj" not in name:
            assert layer.lora_A.abs().max() <= bound
            assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.3)


REFUSALS = {
    "rank": ({"rank": 0}, "rank must be at least 1, got 0"),
    "pattern rank": ({"rank_pattern": {"q_proj": 0}}, "rank for 'q_proj' in rank_pattern must be at least 1"),
    "dropout": ({"dropout": 1.0}, "dropout must be in"),
    "bias": ({"bias": "some"}, "bias is none, all or lora_only"),
    "ratio": ({"lr_ratio_b": 0}, "lr_ratio_b must be positive"),
    "layers": ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform goes with a list"),
    "expression": ({"rank_pattern": {"(": 2}}, r"'\(' is not a regular expression"),
    "target": ({"target_modules": ["q_projj"]}, "target_modules 'q_projj' matches no linear layer or embedding"),
    "exclusion": ({"exclude_modules": ["kproj"]}, "exclude_modules 'kproj' matches no module"),
    "saved": ({"modules_to_save": ["head"]}, "modules_to_save 'head' matches no module; this model has: .*lm_head"),
    "pattern": ({"rank_pattern": {"lm_head": 2}}, "rank_pattern 'lm_head' matches no module"),
    "alphas": ({"alpha_pattern": {"q": 2}}, "alpha_pattern 'q' matches no module"),
    "layer": ({"layers_to_transform": [0, 2]}, "layers_to_transform 2 is no layer"),
    "too large": ({"rank_pattern": {"k_proj": 9}}, "rank 9 exceeds the smaller side of .*k_proj"),
    "nothing": ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "nothing to adapt"),
    "no weights": ({"modules_to_save": ["act_fn"]}, "names '.*act_fn', which has no weights"),
    "no biases": ({"bias": "lora_only"}, "finds no bias in this model"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    settings, says = REFUSALS[name]
    with pytest.raises(ConfigError, match=says):
        LoRA(**settings).apply(tiny_lm())


@pytest.mark.parametrize("kind", [nn.Embedding, nn.Linear])
def test_layers_that_do_more_are_refused(kind):
    class Shifted(kind):
        def forward(self, x):
            return super().forward(x) + 1

    lm = tiny_lm()
    name = "model.embed_tokens" if kind is nn.Embedding else "model.layers.0.self_attn.q_proj"
    lm.get_submodule(name).__class__ = Shifted
    with pytest.raises(ConfigError, match=f"cannot adapt '{name}': a Shifted does more"):
        LoRA(rank=2, target_modules=["q_proj", "embed_tokens"]).apply(lm)


# ---- precision -------------------------------------------------------------------------------------------------------

EVERYTHING = {
    "target_modules": ["q_proj", "embed_tokens", "lm_head"],
    "modules_to_save": ["model.norm", "layers.1.mlp"],
    "bias": "lora_only",
}


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("settings", [EVERYTHING, {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}])
def test_a_half_precision_model_trains_in_float32(settings, autocast):
    """What is trained is float32, frozen weights stay, and scores are close to those in float32."""
    examples = tiny_examples()
    reference = Policy(tiny_lm("qwen2"), LoRA(rank=2, **settings))
    moved(reference.lm)
    policy = Policy(tiny_lm("qwen2", torch.bfloat16), LoRA(rank=2, **settings))
    policy.strategy.load(policy.lm, reference.strategy.state(reference.lm))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logps = policy(pack(examples)).logps
        logps.sum().backward()
    for name, parameter in policy.lm.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
        assert (parameter.grad is not None) == parameter.requires_grad
    expected = reference(pack(examples)).logps
    assert (logps - expected).abs().mean() < 0.15
    ids = torch.tensor([examples[0].input_ids])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.isfinite(policy.lm(input_ids=ids, use_cache=False).logits).all()
    policy.strategy.merge(policy.lm)
    assert {p.dtype for p in policy.lm.parameters()} == {torch.bfloat16}
    merged = Policy(policy.lm, LoRA(rank=1))(pack(examples)).logps
    assert (merged - expected).abs().mean() < 0.3


def test_biases_of_frozen_half_precision_layers_are_refused():
    with pytest.raises(ConfigError, match="use bias: lora_only"):
        LoRA(rank=2, target_modules=["o_proj"], bias="all").apply(tiny_lm("qwen2", torch.bfloat16))


# ---- what is kept for backward ---------------------------------------------------------------------------------------


class Shared(nn.Module):
    """Three layers on one input, as q, k and v are."""

    def __init__(self, dtype, dropout=0.0):
        super().__init__()
        make = lambda: LoRALinear(nn.Linear(64, 64, bias=False, dtype=dtype), 2, 1.0, dropout)  # noqa: E731
        self.layers = nn.ModuleList([make() for _ in range(3)])
        for layer in self.layers:
            layer.weight.requires_grad_(False)

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True), (torch.bfloat16, True)],
)
def test_layers_that_share_an_input_keep_it_once(dtype, autocast):
    model = Shared(dtype)
    x = torch.randn(1, 50, 64, dtype=dtype, requires_grad=True)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = model(x)  # fmt: skip
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    extra = [t for place, t in kept.items() if place not in own]
    large = [t for t in extra if t.numel() >= x.numel()]
    assert [t.untyped_storage().data_ptr() for t in large] == [x.untyped_storage().data_ptr()]
    assert sum(t.numel() for t in extra) == x.numel() + 3 * 50 * 2  # the input, and a product of width 2 a layer
    out.float().sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("trained_bias", [False, True])
def test_the_function_has_the_gradients_of_its_formula(transposed, trained_bias):
    base = Conv1D(5, 7) if transposed else nn.Linear(7, 5)
    layer = LoRALinear(base.double(), 2, 1.5)
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(trained_bias)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    matrix = layer.weight.t() if transposed else layer.weight
    expected = x @ (matrix + 1.5 * layer.lora_B @ layer.lora_A).t() + layer.bias
    torch.testing.assert_close(layer(x), expected)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(layer(x), inputs, upstream)
    for mine, other in zip(ours, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_small_product_survives_half_precision(transposed, bias, autocast):
    """A product far below the rounding of its layer's output is kept on average, and gradients likewise.

    Added to an output that is rounded already, most of it would be rounded away (the PEFT library loses it).
    """
    torch.manual_seed(0)
    layer = Conv1D(96, 64) if transposed else nn.Linear(64, 96, bias=bias)
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.normal_() if bias else layer.bias.zero_()
    adapted = LoRALinear(layer if autocast else layer.to(torch.bfloat16), rank=4, scale=2.0)
    x = torch.randn(2, 2000, 64).bfloat16()
    x = x.float() if autocast else x

    def outputs() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return adapted(x)

    before = outputs()
    adapted.enabled = False
    assert torch.equal(before, outputs())  # an adapter that is zero changes no bit
    adapted.enabled = True
    with torch.no_grad():
        adapted.lora_B.normal_(std=1e-4)
    product = 2.0 * x.double() @ adapted.lora_A.double().T @ adapted.lora_B.double().T
    assert product.abs().median() < 2**-9 * before.abs().median()
    kept = ((outputs().double() - before.double()) * product).sum() / product.square().sum()
    assert kept.item() == pytest.approx(1.0, abs=0.2)
    output = (before + product.to(before.dtype)).double()
    lost = ((output - before.double()) * product).sum() / product.square().sum()
    assert lost.item() < 0.8


def test_dropout_drops_inputs_of_a_only():
    torch.manual_seed(0)
    plain = nn.Linear(4, 4, dtype=torch.float64)
    layer = LoRALinear(copy.deepcopy(plain), 2, 1.0, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(6, 4, dtype=torch.float64)
    torch.manual_seed(1)
    out = layer(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(out, plain(x) + dropped @ layer.lora_A.t() @ layer.lora_B.t())
    torch.testing.assert_close(layer.eval()(x), plain(x) + x @ layer.lora_A.t() @ layer.lora_B.t())


def test_the_output_layer_drops_too():
    """In training the token-score head uses the same dropout as the layer itself would; in validation none."""
    policy = Policy(tiny_lm(), LoRA(rank=2, dropout=0.5, target_modules=["lm_head"]))
    moved(policy.lm)
    batch = pack(tiny_examples())
    assert not torch.equal(policy(batch).logps, policy(batch).logps)
    policy.eval()
    assert torch.equal(policy(batch).logps, policy(batch).logps)


# ---- tied weights ----------------------------------------------------------------------------------------------------


def test_an_adapter_of_the_embedding_leaves_the_output_layer():
    lm = tiny_lm()
    policy = Policy(lm, LoRA(rank=2, target_modules=["embed_tokens"]))
    moved(lm)
    weight = lm.lm_head.weight.clone()
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    policy.strategy.merge(lm)
    assert torch.equal(lm.lm_head.weight, weight)
    assert not torch.equal(lm.model.embed_tokens.weight, weight)
    assert not lm.config.tie_word_embeddings


def test_a_merge_that_touches_neither_end_leaves_them_tied():
    lm = tiny_lm()
    policy = Policy(lm, LoRA(rank=2))
    policy.strategy.merge(moved(lm) and lm)
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    assert lm.config.tie_word_embeddings


# ---- going on from an adapter ----------------------------------------------------------------------------------------

SAVED = {**EVERYTHING, "rank": 3, "alpha": 5, "rank_pattern": {"lm_head": 2}}


@pytest.fixture
def saved(tmp_path):
    policy = Policy(tiny_lm("qwen2", torch.float64), LoRA(**SAVED))
    moved(policy.lm)
    save_adapter(policy.strategy, policy.lm, tmp_path / "first", "base")
    return policy, tmp_path / "first"


def test_a_run_goes_on_from_an_adapter(saved, tmp_path):
    """It starts where the adapter ends; `start` stays there, and the changes are those since."""
    first, folder = saved
    examples = tiny_examples()
    policy = Policy(tiny_lm("qwen2", torch.float64), LoRA(**SAVED, from_adapter=str(folder)))
    began = first(pack(examples)).logps
    torch.testing.assert_close(policy(pack(examples)).logps, began, rtol=0, atol=1e-12)
    assert policy.strategy.trained(policy.lm).keys() == first.strategy.trained(first.lm).keys()
    moved(policy.lm)
    now = policy(pack(examples)).logps
    assert (now - began).abs().max() > 1e-2
    with policy.strategy.start(policy.lm):
        torch.testing.assert_close(policy(pack(examples)).logps, began, rtol=0, atol=1e-12)
    torch.testing.assert_close(policy(pack(examples)).logps, now, rtol=0, atol=0)
    changes = {change.name: change for change in policy.strategy.changes(policy.lm)}
    save_adapter(policy.strategy, policy.lm, tmp_path / "second", "base")
    again = tiny_lm("qwen2", torch.float64)
    strategy = load_adapter(again, tmp_path / "second")
    for which, lm in ((strategy, again), (policy.strategy, policy.lm), (first.strategy, first.lm)):
        which.merge(lm)
    before = dict(first.lm.named_parameters(remove_duplicate=False))
    for name, weight in policy.lm.named_parameters(remove_duplicate=False):
        torch.testing.assert_close(weight, dict(again.named_parameters(remove_duplicate=False))[name])
        delta = changes[name].materialize() if name in changes else torch.zeros_like(weight)
        torch.testing.assert_close(weight - before[name], delta.detach(), rtol=0, atol=1e-12)
        if name in changes:
            torch.testing.assert_close(changes[name].sq_norm(), delta.square().sum())
    assert not list(copies(policy.lm))
    assert "from_adapter" not in read_config(tmp_path / "second")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank": 4}, r"has rank 3 and scale 1.66667 for .*, and this config rank 4 and scale 1.25; give"),
        ({"alpha": 6}, "this config rank 3 and scale 2; give"),
        ({"rank": 6, "alpha": 10}, "this config rank 6 and scale 1.66667; give"),
        ({"rslora": True}, "this config rank 3 and scale 2.88675; give"),
        ({"target_modules": ["q_proj", "lm_head"]}, "cannot go on from .* have no place"),
        ({"target_modules": ["q_proj", "k_proj", "lm_head", "embed_tokens"]}, "cannot go on from .* are missing"),
        ({"modules_to_save": None}, "cannot go on from"),
    ],
)
def test_going_on_with_other_settings_is_refused(saved, change, says):
    settings = {**SAVED, **change, "from_adapter": str(saved[1])}
    with pytest.raises(ConfigError, match=says):
        LoRA(**settings).apply(tiny_lm("qwen2", torch.float64))


def test_going_on_from_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not an adapter folder"):
        LoRA(from_adapter=str(tmp_path)).apply(tiny_lm())
