"""TargetKL: the gradient is that of its formula, with a temperature and with weights."""

import copy

import pytest
import torch

from ftlit.errors import ConfigError
from ftlit.forgetting import TargetKL
from ftlit.peft import Full
from ftlit.stages import SFT
from ftlit.testing import tiny_examples, tiny_lm
from tests.forgetting.runs import run
from tests.stages.test_step import LENGTHS, assert_same

TEMPERATURE = 2.5


def logits_of(lm, row):
    """Logits that predict the trained tokens, one example alone, plain transformers."""
    chosen = torch.tensor([weight != 0 for weight in row.weights[1:]])
    return lm(input_ids=torch.tensor([row.input_ids])).logits[0, :-1][chosen], torch.tensor(row.input_ids)[1:][chosen]


def test_six_steps_are_those_of_the_formula():
    """T^2 KL of the softened distributions, against loops over single examples of plain transformers."""
    control = TargetKL(temperature=TEMPERATURE, weight=0.7)
    module, record, _ = run(Full(), control=control, stage={"warmup": 0, "schedule": "constant"}, max_tokens=17)
    torch.manual_seed(0)
    lm = tiny_lm("llama", torch.float64)
    start = copy.deepcopy(lm)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2, weight_decay=0.0)
    rows = tiny_examples(LENGTHS)
    for step in range(6):
        first = 8 * (step % 3)
        losses, kls = [], []
        for row in rows[first : first + 8]:
            now, targets = logits_of(lm, row)
            then, _ = logits_of(start, row)
            losses.append(torch.nn.functional.cross_entropy(now, targets, reduction="none"))
            soft = torch.distributions.Categorical(logits=then.detach() / TEMPERATURE)
            kls.append(
                TEMPERATURE**2
                * torch.distributions.kl_divergence(soft, torch.distributions.Categorical(logits=now / TEMPERATURE))
            )
        loss, kl = torch.cat(losses).mean(), torch.cat(kls).mean()
        assert record.steps[step]["forgetting/target_kl/loss"] == pytest.approx(kl.item(), abs=1e-7)
        assert record.steps[step]["train/loss"] == pytest.approx(loss.item(), abs=1e-7)
        optimizer.zero_grad()
        (loss + 0.7 * kl).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 0.5)
        optimizer.step()
    assert_same(module.policy.lm, lm, 1e-7)


def test_what_it_cannot_do_is_refused_in_a_sentence():
    with pytest.raises(ConfigError, match="another control already holds the trained tokens"):
        run(Full(), control=TargetKL(), callbacks=[TargetKL(name="second")])

    class NoTokens(SFT):
        predicts_tokens = False

    assert "NoTokens trains no tokens of given rows" in TargetKL().refuse(NoTokens("x"))
    for settings in ({"temperature": 0}, {"weight": -1.0}):
        with pytest.raises(ConfigError, match="TargetKL"):
            TargetKL(**settings)
