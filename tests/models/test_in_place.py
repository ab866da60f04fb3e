"""What our functions return may be changed in place by the model, as a plain layer's output may."""

import pytest
import torch
from torch import nn

from ftlit.batch import Segments, pack
from ftlit.models.fused import fuse
from ftlit.models.load import prepare
from ftlit.models.policy import Policy
from ftlit.models.tiles import tiled_attention
from ftlit.peft import Full, LoRA
from ftlit.peft.lora_layers import LoRAEmbedding, LoRALinear
from ftlit.testing import tiny_examples, tiny_lm
from tests.models.every_model import tiny


def fused(kind):
    """A module of a Llama with its faster forward."""
    lm = tiny_lm("llama")
    fuse(lm)
    return next(module for module in lm.modules() if type(module).__name__ == kind)


def rotation():
    layer = fused("LlamaAttention")
    angles = torch.randn(1, 4, 4)
    return lambda x: layer(x, position_embeddings=(angles.cos(), angles.sin()), attention_mask=None)[0]


FUNCTIONS = {
    "LoRA": lambda: LoRALinear(nn.Linear(16, 24), 2, 1.0),
    "LoRA with dropout": lambda: LoRALinear(nn.Linear(16, 24), 2, 1.0, 0.5),
    "LoRA that is off": lambda: vars(layer := LoRALinear(nn.Linear(16, 24), 2, 1.0)).update(enabled=False) or layer,
    "MLP": lambda: fused("LlamaMLP"),
    "norm": lambda: fused("LlamaRMSNorm"),
    "rotated attention": rotation,
    "tiles": lambda: lambda x: tiled_attention(*(x.view(1, 4, 4, 4).transpose(1, 2),) * 3, Segments([4])),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_result_may_be_changed_in_place(name):
    function = FUNCTIONS[name]()
    gradients = []
    for in_place in (False, True):
        torch.manual_seed(1)
        x = torch.randn(1, 4, 16, requires_grad=True)
        out = function(x * 1)
        out = out.clamp_(-0.3, 0.3).mul_(3) if in_place else out.clamp(-0.3, 0.3) * 3
        gradients.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_the_result_of_an_embedding_may_be_changed_in_place():
    layer = LoRAEmbedding(nn.Embedding(9, 4), 2, 1.0)
    layer(torch.arange(9)[None]).clamp_(-1, 1).sum().backward()
    assert layer.lora_embedding_A.grad.abs().max() > 0


# Models that change in place what a projection returned.
IN_PLACE = {"olmo": {"clip_qkv": 0.1}, "olmoe": {"clip_qkv": 0.1}, "gemma3n_text": {}, "flex_olmo": {}}


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("strategy", [LoRA, Full])
def test_models_that_do(kind, strategy):
    lm = tiny(kind, **IN_PLACE[kind])
    prepare(lm)
    policy = Policy(lm, strategy())
    batch = pack(tiny_examples())
    policy(batch).logps.sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())
