"""Attention sinks (gpt-oss): one more column of the softmax, in packed rows as in transformers' eager attention."""

import pytest
import torch
from torch import nn

from ftlit.batch import PackedBatch, Segments, pack
from ftlit.models.attention import segment_attention
from ftlit.models.load import prepare
from ftlit.models.policy import score_packed, use_segment_attention
from ftlit.testing import tiny_examples
from tests.models.every_model import tiny

KINDS = ["gpt_oss", "flint", "granite_swa", "granitemoe_swa", "mimo_v2_flash"]


def pair(kind):
    """A model on packed attention, and the same on transformers' eager attention, in float64."""
    ours, theirs = (tiny(kind, torch.float64).eval() for _ in range(2))
    for lm in (ours, theirs):
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                if name.endswith("sinks"):
                    parameter.copy_(torch.linspace(-1, 2, parameter.numel()))
    use_segment_attention(ours)
    theirs.set_attn_implementation("eager")
    return ours, theirs


def logps_of(lm, ids):
    logits = lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[1:, None])[:, 0]


def gradients(lm, loss):
    found = torch.autograd.grad(loss, list(lm.parameters()), allow_unused=True)
    return {name: grad for (name, _), grad in zip(lm.named_parameters(), found, strict=True)}


def assert_same(ours, theirs, logps, expected):
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-6)  # norms and routers round to float32 inside
    a, b = gradients(ours, logps.sum()), gradients(theirs, expected.sum())
    assert any(name.endswith("sinks") and grad.abs().max() > 1e-4 for name, grad in a.items() if grad is not None)
    for name, grad in b.items():
        if grad is not None:
            torch.testing.assert_close(a[name], grad, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_with_windows_equal_eager(kind):
    ours, theirs = pair(kind)
    examples = tiny_examples((9, 4, 4, 12))
    single = [logps_of(theirs, e.input_ids)[torch.tensor(e.weights[1:]) != 0] for e in examples]
    assert_same(ours, theirs, score_packed(ours, pack(examples)).logps, torch.cat(single))


@pytest.mark.parametrize("kind", KINDS[:3])
def test_branches_equal_eager(kind):
    ours, theirs = pair(kind)
    prompt, first, second = (list(e.input_ids) for e in tiny_examples((8, 3, 6)))
    answers = [first, second]
    batch = PackedBatch(
        input_ids=torch.tensor([prompt + first + second]),
        position_ids=torch.tensor([[*range(8), *range(8, 11), *range(8, 14)]]),
        segments=Segments([8, 3, 6], [-1, 0, 0]),
        target_positions=torch.tensor([7, 8, 9, 7, *range(11, 16)]),
        target_ids=torch.tensor(first + second),
        target_weights=torch.ones(9),
        target_segments=torch.tensor([1] * 3 + [2] * 6),
        examples=(0, 0, 0),
    )
    single = [logps_of(theirs, prompt + answer)[-len(answer) :] for answer in answers]
    assert_same(ours, theirs, score_packed(ours, batch).logps, torch.cat(single))


@pytest.mark.parametrize("kind", KINDS)
def test_generation_sees_the_sinks(kind):
    """Calls without segments: left padding, and a cache."""
    ours, theirs = pair(kind)
    ids = torch.tensor([e.input_ids for e in tiny_examples((11, 11))])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    a, b = (lm.float().generate(ids, **options) for lm in (ours, theirs))
    assert torch.equal(a.sequences, b.sequences)
    torch.testing.assert_close(torch.stack(a.logits), torch.stack(b.logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
def test_prefix_branches_and_windows_by_the_formula(window):
    """Against one dense softmax with the sink as its last column, forward and backward."""
    torch.manual_seed(0)
    segments = Segments([5, 3, 4, 6], [-1, 0, 0, -1])
    total, heads, width, virtual = 18, 4, 6, 3
    make = lambda *shape: torch.randn(shape, dtype=torch.float64, requires_grad=True)  # noqa: E731
    query, key, value = make(1, heads, total, width), make(1, 2, total, width), make(1, 2, total, width)
    past, sinks = (make(2, virtual, width), make(2, virtual, width)), make(heads)
    module = nn.Module()
    module.layer_idx = 0
    ours, _ = segment_attention(
        module, query, key, value, None, sliding_window=window, segments=segments, prefix_kv={0: past}, s_aux=sinks
    )

    line = {0: [0], 1: [0, 1], 2: [0, 2], 3: [3]}
    owner = [s for s, length in enumerate(segments.lengths) for _ in range(length)]
    place = [*range(5), *range(5, 8), *range(5, 9), *range(6)]
    allowed = torch.zeros(total, virtual + total, dtype=torch.bool)
    for q in range(total):
        for k in range(virtual):
            allowed[q, k] = window is None or virtual + place[q] - k < window
        for k in range(total):
            near = window is None or place[q] - place[k] < window
            allowed[q, virtual + k] = owner[k] in line[owner[q]] and place[k] <= place[q] and near
    keys = torch.cat([past[0], key[0]], 1).repeat_interleave(2, 0)
    values = torch.cat([past[1], value[0]], 1).repeat_interleave(2, 0)
    scores = (query[0] @ keys.transpose(1, 2) * width**-0.5).masked_fill(~allowed, float("-inf"))
    weights = torch.cat([scores, sinks[:, None, None].expand(-1, total, 1)], -1).softmax(-1)[..., :-1]
    expected = (weights @ values).transpose(0, 1)[None]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    inputs, above = (query, key, value, *past, sinks), torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, above), torch.autograd.grad(expected, inputs, above), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_loading_checks_it():
    prepare(tiny("gpt_oss"))
