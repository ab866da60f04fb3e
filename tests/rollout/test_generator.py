import pytest
import torch

from ftlit.batch import pack
from ftlit.errors import ConfigError
from ftlit.models.policy import Policy
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.peft.io import save_adapter
from ftlit.rollout.generator import BatchedGenerator, Sampling, merged
from ftlit.testing import FAMILIES, tiny_examples, tiny_lm, tiny_tokenizer

STRATEGIES = {
    "lora": lambda: LoRA(rank=2),
    "lora_everywhere": lambda: LoRA(
        rank=2, target_modules=["q_proj", "embed_tokens", "lm_head"], modules_to_save=["norm"]
    ),
    "full": Full,
    "prefix": lambda: PrefixTuning(num_virtual_tokens=3, init_std=1.0),
    "prompt": lambda: PromptTuning(num_virtual_tokens=3),
}


def policy_of(strategy, family="llama"):
    policy = Policy(tiny_lm(family, dtype=torch.float64), strategy)
    strategy.remember_start(policy.lm)
    with torch.no_grad():
        for parameter in strategy.trained(policy.lm).values():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return policy


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("merge", [True, False])
def test_merged_and_unmerged_draw_the_same(kind, merge):
    policy = policy_of(STRATEGIES[kind]())
    prompts = [list(example.input_ids) for example in tiny_examples((5, 9, 4))]
    seeds = list(range(6))
    draw = lambda merge: BatchedGenerator(batch_size=4, merge=merge)(  # noqa: E731
        policy.lm, policy.strategy, tiny_tokenizer(), prompts, seeds, Sampling(2, 8, 1.0, 0.95)
    )
    before = {name: (id(p), p.detach().clone()) for name, p in policy.lm.named_parameters()}
    found = draw(merge)
    assert found == draw(False)
    assert len({tuple(one.tokens) for one in found}) > 3
    for name, parameter in policy.lm.named_parameters():  # the very parameters, and bit for bit what they were
        assert before[name][0] == id(parameter)
        assert torch.equal(before[name][1], parameter)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_say_what_the_adapter_says(family):
    policy = policy_of(LoRA(rank=2), family)
    batch = pack(tiny_examples())
    with torch.no_grad():
        expected = policy(batch).logps
        with policy.strategy.start(policy.lm):
            start = policy(batch).logps
        with merged(policy.lm, policy.strategy):
            torch.testing.assert_close(policy(batch).logps, expected, rtol=0, atol=1e-5 if "gemma" in family else 1e-9)
        assert (start - expected).abs().max() > 1e-2
        assert torch.equal(policy(batch).logps, expected)


def test_a_change_below_the_rounding_of_the_weights_is_drawn_from(monkeypatch):
    """Half-precision weights with a young adapter in them would be those of the start."""
    strategy = LoRA(rank=2)
    policy = Policy(tiny_lm("llama", dtype=torch.bfloat16), strategy)
    with torch.no_grad():
        for name, parameter in strategy.trained(policy.lm).items():
            parameter.add_(1e-4 * name.endswith("lora_B"))
        start = {n: p.clone() for n, p in policy.lm.named_parameters() if n.endswith("q_proj.weight")}
        with merged(policy.lm, strategy):
            left = {n: p.clone() for n, p in policy.lm.named_parameters() if n.endswith("q_proj.weight")}
    assert sum((left[name] != start[name]).sum() for name in start) < 0.1 * sum(one.numel() for one in start.values())
    monkeypatch.setattr("ftlit.rollout.generator.merged", None)  # is not asked for
    assert len(BatchedGenerator()(policy.lm, strategy, tiny_tokenizer(), [[5, 6]], [0, 1], Sampling(2, 3))) == 2


def test_an_adapter_that_goes_on_from_another(tmp_path):
    first = policy_of(LoRA(rank=2))
    save_adapter(first.strategy, first.lm, tmp_path, "base")
    policy = policy_of(LoRA(rank=2, from_adapter=str(tmp_path)))
    batch = pack(tiny_examples())
    with torch.no_grad(), merged(policy.lm, policy.strategy):
        inside = policy(batch).logps
    torch.testing.assert_close(inside, policy(batch).logps, rtol=0, atol=1e-7)


def test_the_weights_come_back_after_an_error():
    policy = policy_of(LoRA(rank=2))
    batch = pack(tiny_examples())
    expected = policy(batch).logps
    with pytest.raises(RuntimeError, match="stop"), merged(policy.lm, policy.strategy):
        raise RuntimeError("stop")
    assert torch.equal(policy(batch).logps, expected)


def test_mistakes():
    with pytest.raises(ConfigError, match="batch_size and max_tokens"):
        BatchedGenerator(batch_size=0)
