"""Answers as branches of one prompt give what whole sequences give, one at a time: log-probabilities and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.batch import Answers, Example, Pair, pack
from ftlit.models.policy import Policy
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.testing import FAMILIES, tiny_lm


def tree(prompt, answers, seed=0):
    """A random prompt with answers of some lengths, all trained."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 250, (prompt + sum(answers),), generator=generator).tolist()
    weights = [0.0] * prompt + [1.0] * sum(answers)
    return Example(ids, weights, 0.0, Answers(tuple(answers), (Pair(0, -1),)))


def singly(example):
    """Its answers as examples of their own, each with the prompt."""
    prompt = len(example.input_ids) - sum(example.answers.lengths)
    begin, examples = prompt, []
    for length in example.answers.lengths:
        ids = [*example.input_ids[:prompt], *example.input_ids[begin : begin + length]]
        examples.append(Example(ids, [0.0] * prompt + [1.0] * length))
        begin += length
    return examples


def policy_of(family="llama", strategy=None):
    policy = Policy(tiny_lm(family, torch.float64), strategy or Full())
    if isinstance(strategy, LoRA):
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return policy


def gradients(policy, batches, factors):
    """Log-probabilities of all targets, and the gradients of their sum with some factors."""
    policy.zero_grad()
    logps = torch.cat([policy(batch).logps for batch in batches])
    (logps * factors).sum().backward()
    return logps.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def compare(policy, examples):
    whole = pack(examples)
    factors = torch.linspace(-1, 1, len(whole.target_ids), dtype=torch.float64)
    ours, ours_grads = gradients(policy, [whole], factors)
    theirs, theirs_grads = gradients(policy, [pack([one]) for example in examples for one in singly(example)], factors)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert ours_grads.keys() == theirs_grads.keys()
    for name, gradient in theirs_grads.items():
        torch.testing.assert_close(ours_grads[name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    assert sum(float(g.abs().sum()) for g in ours_grads.values()) > 0


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, count):
    """Prompts longer than the sliding windows of the families that have them (5), and shorter ones."""
    examples = [tree(9, (4, 7, 1, 12)[:count]), tree(2, (3, 3, 8, 2)[:count], seed=1)]
    compare(policy_of(family), examples)


@pytest.mark.parametrize("strategy", [LoRA(rank=3), PrefixTuning(3), PromptTuning(3)], ids=lambda s: type(s).__name__)
def test_every_strategy(strategy):
    compare(policy_of("llama", strategy), [tree(6, (4, 7)), tree(3, (2, 5), seed=1)])


SHAPE = st.tuples(st.integers(1, 8), st.lists(st.integers(1, 9), min_size=1, max_size=4))


@settings(max_examples=25, deadline=None)
@given(st.lists(SHAPE, min_size=1, max_size=4))
def test_any_lengths(shapes):
    compare(policy_of("mistral"), [tree(prompt, answers, seed) for seed, (prompt, answers) in enumerate(shapes)])


def test_the_prompt_is_there_once():
    batch = pack([tree(6, (4, 7)), tree(3, (2,), seed=1)], [5, 9])
    assert batch.num_tokens == 6 + 4 + 7 + 3 + 2
    assert batch.segments.parents == (-1, 0, 0, -1, 3)
    assert batch.position_ids[0].tolist() == [*range(6), *range(6, 10), *range(6, 13), *range(3), 3, 4]
    assert batch.examples == (5, 5, 5, 9, 9)
    assert batch.target_segments.tolist() == [1] * 4 + [2] * 7 + [4] * 2
    # The first token of either answer is predicted by the last one of the prompt.
    assert batch.target_positions.tolist() == [5, 6, 7, 8, 5, 10, 11, 12, 13, 14, 15, 19, 20]
    assert batch.segments.longest == 13


def test_pairs_name_segments_and_fillers_weigh_nothing():
    pairs = (Pair(0, 1, 0.5, 2.0), Pair(0, 2), Pair(-1, 2))
    example = tree(2, (1, 1, 1))._replace(answers=Answers((1, 1, 1), pairs))
    batch = pack([tree(2, (3,)), example], [0, -1])
    assert batch.pairs == (Pair(1, -1), Pair(3, 4, 0.0, 2.0), Pair(3, 5, 0.0), Pair(-1, 5, 0.0))
    assert batch.target_weights.tolist() == [1] * 3 + [0] * 3
    left = pack([tree(2, (3,)), example], [0, 1], [1, 0]).only({0})
    assert left.pairs == (Pair(1, 2, 0.5, 2.0), Pair(1, 3), Pair(-1, 3))
