"""Every faster forward against the module's own: outputs and all gradients."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ftlit.batch import pack
from ftlit.models.fused import _Forward, _GatedMLP, _RMSNorm, _Rotate, fuse, unfuse
from ftlit.models.policy import Policy, recompute_activations
from ftlit.peft import Full, LoRA, PrefixTuning
from ftlit.testing import FAMILIES, tiny_examples, tiny_lm

KNOWN = [family for family in FAMILIES if family != "gpt2"]  # LayerNorm, Conv1D, learned positions
STRATEGIES = {"lora": lambda: LoRA(rank=3), "full": Full, "prefix": lambda: PrefixTuning(4)}


def policy_of(family="llama", strategy="lora", dtype=torch.float64, *, fused=True, checkpointing=False):
    """A policy whose parameters are moved, so that no zero hides a mistake."""
    lm = tiny_lm(family, dtype)
    if fused:
        assert fuse(lm)
    if checkpointing:
        recompute_activations(lm)
    torch.manual_seed(0)
    policy = Policy(lm, STRATEGIES[strategy]()).train()
    with torch.no_grad():
        for parameter in policy.strategy.trained(lm).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return policy


def loss_and_gradients(policy):
    logps = policy(pack(tiny_examples((9, 4, 4, 12, 2, 70)))).logps
    loss = (logps * torch.linspace(0.5, 2, len(logps), dtype=logps.dtype)).sum() / len(logps)
    trained = policy.strategy.trained(policy.lm)
    return loss, dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def same(ours, theirs, rtol, atol):
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=atol)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# ---- each piece ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_normalisation(offset):
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    above = torch.randn(2, 5, 7, dtype=torch.float64)
    ours, theirs = _RMSNorm.apply(x, weight, 1e-5, offset), F.rms_norm(x, (7,), weight + offset, 1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), above), torch.autograd.grad(theirs, (x, weight), above), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-5, offset), (x, weight))


def test_normalisation_in_any_order_of_memory():
    """Norms of queries and keys get both, states and gradients, with heads and tokens exchanged."""
    x, above = (torch.randn(1, 5, 3, 7, dtype=torch.float64).transpose(1, 2) for _ in range(2))
    x.requires_grad_()
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    turned = torch.autograd.grad(_RMSNorm.apply(x, weight, 1e-5, 0.0), (x, weight), above)
    straight = torch.autograd.grad(_RMSNorm.apply(x.contiguous(), weight, 1e-5, 0.0), (x, weight), above.contiguous())
    for a, b in zip(turned, straight, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])  # SiLU, tanh-GELU, SiLU
@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_mlp(family, strategy):
    mlp = policy_of(family, strategy).lm.model.layers[0].mlp
    x = torch.randn(1, 6, 16, dtype=torch.float64, requires_grad=True)
    above = torch.randn(1, 6, 16, dtype=torch.float64)
    inputs = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    assert len(inputs) == (7 if strategy == "lora" else 4)
    ours, theirs = mlp(x), type(mlp).forward(mlp, x)
    assert "GatedMLP" in type(ours.grad_fn).__name__
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, inputs, above), torch.autograd.grad(theirs, inputs, above), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_mlp_gradcheck_with_biases():
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (5,), (2, 3), (5, 2), (5, 3), (5,), (2, 3), (5, 2), (3, 5), (3,), (2, 5), (3, 2)]
    tensors = [torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()
    for activation in ("silu", "gelu_tanh"):
        assert torch.autograd.gradcheck(
            lambda x, *t, a=activation: _GatedMLP.apply(x, a, (0.5, 2.0, 1.5), *t), (x, *tensors)
        )


def test_rotation():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = torch.randn(2, 5, 3, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
    cos, sin = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    ours = _Rotate.apply(x, cos[:, None], sin[:, None])
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    above = torch.randn_like(ours)
    torch.testing.assert_close(
        *(torch.autograd.grad(out, x, above)[0] for out in (ours, theirs)), rtol=1e-12, atol=1e-12
    )
    assert torch.autograd.gradcheck(lambda x: _Rotate.apply(x, cos[:, None], sin[:, None]), (x,))


# ---- whole models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KNOWN)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_whole_model_in_float64(family, strategy):
    # Families that round to float32 inside give rounding of that size in either way of computing.
    tolerance = 1e-10 if family not in ("gemma2", "gemma3") else 1e-4
    same(
        loss_and_gradients(policy_of(family, strategy)),
        loss_and_gradients(policy_of(family, strategy, fused=False)),
        tolerance,
        tolerance,
    )


@pytest.mark.parametrize("family", KNOWN)
def test_whole_model_in_float32(family):
    fused, plain = policy_of(family, dtype=torch.float32), policy_of(family, dtype=torch.float32, fused=False)
    ours, theirs = loss_and_gradients(fused), loss_and_gradients(plain)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    for name, gradient in ours[1].items():
        off = (gradient - theirs[1][name]).norm() / theirs[1][name].norm()
        assert off < 1e-4, f"{name}: {off}"


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_checkpointing_changes_nothing(strategy):
    same(
        loss_and_gradients(policy_of("qwen3", strategy, checkpointing=True)),
        loss_and_gradients(policy_of("qwen3", strategy)),
        1e-12,
        1e-12,
    )


def test_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradients(policy_of(dtype=torch.float32))[0]
        theirs = loss_and_gradients(policy_of(dtype=torch.float32, fused=False))[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)  # nothing of ours runs


def test_in_bfloat16():
    """Only attention computes otherwise than before, and not even that: half precision takes torch's kernel."""
    ours = loss_and_gradients(policy_of(dtype=torch.bfloat16))
    same(ours, loss_and_gradients(policy_of(dtype=torch.bfloat16, fused=False)), 0, 0)


def test_less_is_kept_for_backward():
    kept = {}
    for fused in (True, False):
        policy = policy_of(dtype=torch.float32, fused=fused)
        weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        storages = {}

        def note(tensor, storages=storages, weights=weights):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            scores = policy(pack(tiny_examples((200, 150))))
        kept[fused] = sum(storages.values())
        del scores
    assert kept[True] < 0.8 * kept[False]


def test_generation_is_the_same():
    ids = torch.tensor([tiny_examples((11,))[0].input_ids])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    for family in FAMILIES:
        plain, fused = tiny_lm(family).eval(), tiny_lm(family).eval()
        fuse(fused)
        assert torch.equal(plain.generate(ids, **options), fused.generate(ids, **options))


# ---- what is known, and what is not -------------------------------------------------------------------------------


def test_what_is_fused_in_each_family():
    counts = {family: fuse(tiny_lm(family)) for family in FAMILIES}
    assert counts["llama"] == {"LlamaAttention": 2, "LlamaMLP": 2, "LlamaRMSNorm": 5}
    assert counts["qwen3"] == {"Qwen3Attention": 2, "Qwen3RMSNorm": 9, "Qwen3MLP": 2}
    assert counts["gemma2"] == {"Gemma2Attention": 2, "Gemma2MLP": 2, "Gemma2RMSNorm": 9}
    assert counts["gpt2"] == {}
    assert counts["cohere"] == {"CohereMLP": 2}  # LayerNorm, and pairs of neighbours are rotated


class HalvedRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(6)), 1e-6

    def forward(self, x):
        return F.rms_norm(x, (6,), self.weight, self.eps) / 2


class ClampedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-0.1, 0.1))


class ScaledMLP(ClampedMLP):
    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(1, 1)


class ReluMLP(ClampedMLP):
    def __init__(self):
        super().__init__()
        self.act_fn = nn.ReLU()


@pytest.mark.parametrize("module", [HalvedRMSNorm, ClampedMLP, ScaledMLP, ReluMLP, lambda: nn.RMSNorm(4)])
def test_an_unknown_module_is_left_alone(module):
    model = nn.Sequential(module())
    fuse(model)
    assert "forward" not in model[0].__dict__ or isinstance(model[0], nn.RMSNorm)


def test_a_forward_of_others_is_left_alone():
    lm = tiny_lm("llama")
    lm.model.norm.forward = theirs = lambda x: x
    assert fuse(lm)["LlamaRMSNorm"] == 4
    unfuse(lm)
    assert lm.model.norm.forward is theirs


@pytest.mark.parametrize("case", ["hook", "dropout", "other type", "other forward"])
def test_layers_with_more_in_them_run_as_they_are(case):
    strategy = LoRA(rank=2, dropout=0.5 if case == "dropout" else 0.0)
    lm = tiny_lm("llama")
    fuse(lm)
    Policy(lm, strategy).train()
    mlp, calls = lm.model.layers[0].mlp, []
    if case == "hook":
        mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    elif case == "other type":
        mlp.up_proj = nn.Sequential(nn.Linear(16, 24))
    elif case == "other forward":
        mlp.up_proj.forward = lambda x: calls.append(1) or x.new_zeros(*x.shape[:-1], 24)
    out = mlp(torch.randn(1, 3, 16))
    assert "GatedMLP" not in type(out.grad_fn).__name__
    assert calls or case in ("dropout", "other type")


def test_start_runs_without_the_adapter():
    policy, base = policy_of(), policy_of(strategy="full", fused=False)
    batch = pack(tiny_examples())
    with torch.no_grad():
        base.lm.load_state_dict(tiny_lm("llama", torch.float64).state_dict())
        with policy.strategy.start(policy.lm):
            torch.testing.assert_close(policy(batch).logps, base(batch).logps, rtol=0, atol=1e-10)


def test_copies_and_pickles_run_their_own_weights():
    policy = policy_of()
    batch = pack(tiny_examples())
    before = policy(batch).logps.detach()
    for other in (copy.deepcopy(policy.lm), pickle.loads(pickle.dumps(policy.lm))):
        names = {id(m) for m in other.modules()}
        forwards = [m.__dict__["forward"] for m in other.modules() if "forward" in m.__dict__]
        assert forwards
        assert all(isinstance(f, _Forward) and id(f.module) in names for f in forwards)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
    torch.testing.assert_close(policy(batch).logps, before, rtol=0, atol=0)


def test_names_and_types_stay_and_unfuse_leaves_nothing():
    plain, lm = tiny_lm("llama"), tiny_lm("llama")
    fuse(lm)
    assert fuse(lm) == {}
    assert list(lm.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in lm.modules()] == [type(m) for m in plain.modules()]
    unfuse(lm)
    assert not any("forward" in m.__dict__ for m in lm.modules())


def test_merged_layers_still_agree():
    policy = policy_of()
    batch = pack(tiny_examples())
    adapted = policy(batch).logps
    policy.strategy.merge(policy.lm)
    torch.testing.assert_close(policy(batch).logps, adapted, rtol=0, atol=1e-9)
