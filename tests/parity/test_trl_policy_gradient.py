"""The losses of TRL's GRPO and RLOO trainers on padded inputs, and ours on the same tokens without padding."""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from ftlit.models.policy import Policy
from ftlit.objectives.advantages import GRPO, RLOO, Outcome
from ftlit.objectives.kl import kl_estimate
from ftlit.objectives.policy_gradient import CISPO, DAPO, GSPO, DrGRPO, PPOClip, reduction_weights
from ftlit.peft import Full
from ftlit.rollout.experience import branches
from ftlit.testing import tiny_lm

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
rloo_trainer = pytest.importorskip("trl.trainer.rloo_trainer")

LENGTHS, MOST = torch.tensor([5, 2, 7, 1, 7, 3]), 9
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])


class Numbers:
    """Token numbers of six answers, padded to the longest for TRL and flat for us."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = (len(LENGTHS), int(LENGTHS.max()))
        self.mask = torch.arange(shape[1])[None] < LENGTHS[:, None]
        self.old = -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
        apart = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.new = (self.old + 0.3 * apart).requires_grad_()
        self.reference = self.old + 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.rewards = torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)
        self.owners = torch.arange(len(LENGTHS)).repeat_interleave(LENGTHS)

    def flat(self, padded):
        return padded[self.mask]


def trl_loss(numbers, module, advantages, **settings):
    """TRL's own `_compute_loss`, with our numbers in the place of the model's."""
    same = lambda tensor, **_: tensor  # noqa: E731
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (numbers.new, torch.zeros_like(numbers.old), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        current_gradient_accumulation_steps=1, max_completion_length=MOST, _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)}, importance_sampling_level="token", beta=0.0,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
        accelerator=SimpleNamespace(gather=same, reduce=same, num_processes=1),
    )  # fmt: skip
    for name, value in settings.items():
        setattr(fake, name, value)
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(LENGTHS), 1, dtype=torch.int64),
        "completion_ids": torch.zeros_like(numbers.mask, dtype=torch.int64),
        "completion_mask": numbers.mask.long(),
        "advantages": advantages,
        "old_per_token_logps": numbers.old,
        "ref_per_token_logps": numbers.reference,
        "old_logps": (numbers.old * numbers.mask).sum(1),
        "num_items_in_batch": numbers.mask.sum(),
    }
    kind = module.GRPOTrainer if module is grpo_trainer else module.RLOOTrainer
    return kind._compute_loss(fake, None, inputs)


def our_loss(numbers, loss, advantages, beta=0.0):
    new, old = numbers.flat(numbers.new), numbers.flat(numbers.old)
    each = loss(new, old, advantages[numbers.owners], numbers.owners).loss
    if beta:
        each = each + beta * kl_estimate(new, numbers.flat(numbers.reference), "k3")
    count = len(numbers.owners)
    weights = reduction_weights(loss.reduction, LENGTHS, numbers.owners, count, len(LENGTHS), MOST)
    return (each * weights).sum() / count


def assert_same(ours, theirs, numbers):
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    first, second = (torch.autograd.grad(one, numbers.new, retain_graph=True)[0] for one in (ours, theirs))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)
    assert first.abs().sum() > 0


SEQUENCE = {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon_low": 0.05, "epsilon_high": 0.08}


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (PPOClip(0.2, reduction="sequence"), {"loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2}),
        (PPOClip(0.1), {"loss_type": "bnpo", "epsilon_low": 0.1, "epsilon_high": 0.1}),
        (DAPO(0.2, 0.28), {"loss_type": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.28}),
        (DrGRPO(0.2), {"loss_type": "dr_grpo", "epsilon_low": 0.2, "epsilon_high": 0.2}),
        (CISPO(1.15), {"loss_type": "cispo", "epsilon_low": 0.2, "epsilon_high": 1.15}),
        (GSPO(0.05, 0.08), SEQUENCE),
    ],
    ids=["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "gspo"],
)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_grpo_losses_equal_trl(loss, settings, beta):
    for seed in range(5):
        numbers = Numbers(seed)
        advantages = torch.randn(len(LENGTHS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        theirs = trl_loss(numbers, grpo_trainer, advantages, beta=beta, **settings)
        assert_same(our_loss(numbers, loss, advantages, beta), theirs, numbers)


def test_the_rloo_loss_equals_trl():
    for seed in range(5):
        numbers = Numbers(seed)
        advantages = torch.randn(len(LENGTHS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        theirs = trl_loss(numbers, rloo_trainer, advantages, epsilon_low=0.2, epsilon_high=0.2)
        assert_same(our_loss(numbers, GSPO(0.2, 0.2, length_normalized=False), advantages), theirs, numbers)


def test_advantages_equal_trl():
    """The few lines of `_generate_and_score_completions` that make them, as TRL 1.16 has them."""
    numbers, beta = Numbers(), 0.1
    per_token_kl = (numbers.old - numbers.reference) * numbers.mask
    flat = -beta * numbers.flat(per_token_kl)
    outcome = Outcome(numbers.rewards, flat, numbers.owners, GROUPS)
    first = torch.cat([torch.zeros(1, dtype=torch.int64), LENGTHS.cumsum(0)[:-1]])
    rewards = (numbers.rewards - beta * per_token_kl.sum(1)).view(2, 3)
    theirs = rewards - (rewards.sum(1, keepdim=True) - rewards) / 2
    torch.testing.assert_close(RLOO()(outcome).advantages[first], theirs.view(-1), rtol=0, atol=1e-12)
    plain = outcome._replace(token_rewards=torch.zeros_like(flat))
    rewards = numbers.rewards.view(2, 3)
    mean = rewards.mean(1, keepdim=True)
    torch.testing.assert_close(GRPO(std=False)(plain).advantages[first], (rewards - mean).view(-1), rtol=0, atol=1e-12)
    scaled = (rewards - mean) / (grpo_trainer.nanstd(rewards, dim=1)[:, None] + 1e-4)
    torch.testing.assert_close(GRPO()(plain).advantages[first], scaled.view(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_log_probabilities_and_entropies_at_a_temperature_equal_trl(temperature):
    """TRL's own scores of left-padded prompts with their answers, and ours of packed branches; with their gradients."""
    prompts, answers, owners = [[5, 6, 7], [8, 9]], [[3, 4], [11], [12, 13, 14]], [0, 0, 1]
    policy = Policy(tiny_lm("llama"), Full())
    scores = policy(
        branches([prompts[owner] for owner in owners], answers, owners, owners), {"entropy"}, temperature=temperature
    )
    lm = tiny_lm("llama")
    grpo_trainer.add_fused_lm_head(lm, outputs=("log_probs", "entropy"), temperature=temperature)
    ids, mask = [], []
    for owner, answer in zip(owners, answers, strict=True):
        before, after = [0] * (3 - len(prompts[owner])), [0] * (3 - len(answer))
        ids.append([*before, *prompts[owner], *answer, *after])
        mask.append([*before, *[1] * (len(prompts[owner]) + len(answer)), *after])
    fake = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext, is_main_process=False))
    logps, entropies, _ = grpo_trainer.GRPOTrainer._get_per_token_logps_and_entropies(
        fake, lm, torch.tensor(ids), torch.tensor(mask), 3, compute_entropy=True
    )
    real = torch.tensor(mask)[:, 3:].bool()
    torch.testing.assert_close(scores.logps, logps[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.entropy, entropies[real], rtol=0, atol=1e-5)
    for ours, theirs in ((scores.logps, logps[real]), (scores.entropy, entropies[real])):
        weights = torch.arange(1.0, 7.0)
        first = torch.autograd.grad((ours * weights).sum(), list(policy.lm.parameters()), retain_graph=True)
        second = torch.autograd.grad((theirs * weights).sum(), list(lm.parameters()), retain_graph=True)
        for one, other in zip(first, second, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))
