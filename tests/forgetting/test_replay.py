"""Replay: the gradient is the one of its formula, however a step is cut, and weight 0 is no replay at all."""

import copy
from types import SimpleNamespace

import pytest
import torch

from ftlit.batch import pack
from ftlit.data.added import AddedRows
from ftlit.errors import ConfigError
from ftlit.forgetting import Replay
from ftlit.models.policy import Policy
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.testing import tiny_examples, tiny_lm
from ftlit.testing.control_suite import TinyData
from tests.stages.test_step import LENGTHS, assert_same, fit

GENERAL = (7, 3, 10, 5, 6, 4, 8)


class Given(Replay):
    """Replays rows made in code."""

    def __init__(self, **arguments):
        super().__init__(**{"name": "replay", **arguments})

    def added_rows(self, stage):
        self._added = AddedRows(self.name, tiny_examples(GENERAL, seed=7), self.ratio, self.seed)
        return self._added


def losses(lm, example):
    """NLL of each trained token and the distributions they are drawn from, one example alone, plain transformers."""
    logps = torch.log_softmax(lm(input_ids=torch.tensor([example.input_ids])).logits[0, :-1], -1)
    chosen = torch.tensor([w != 0 for w in example.weights[1:]])
    ids = torch.tensor(example.input_ids)[1:, None]
    return -logps.gather(1, ids)[:, 0][chosen], logps[chosen]


@pytest.mark.parametrize("make", [LoRA, Full, PrefixTuning, PromptTuning], ids=lambda m: m.__name__)
@pytest.mark.parametrize("objective", ["kl", "ce"])
def test_cut_and_order_do_not_matter_and_weight_zero_is_nothing(make, objective):
    def run(weight=2.0, **options):
        trainer = {"callbacks": [Given(objective=objective, ratio=0.6, weight=weight)], **options.pop("trainer", {})}
        return fit(make(), trainer=trainer, **options)

    whole, reference, _ = run(batch_size=8)
    for batch_size, accumulate, max_tokens in [(4, 2, None), (1, 8, None), (8, 1, 17), (4, 2, 9)]:
        cut, record, _ = run(
            batch_size=batch_size, max_tokens=max_tokens, trainer={"accumulate_grad_batches": accumulate}
        )
        assert_same(cut, whole)
        for ours, theirs in zip(record.steps, reference.steps, strict=True):
            assert ours["forgetting/replay/tokens"] == theirs["forgetting/replay/tokens"]
            for name in ("train/loss", "train/grad_norm", "forgetting/replay/loss"):
                assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-9)
    plain, _, _ = fit(make(), batch_size=4, max_tokens=17)
    none, _, _ = run(weight=0.0, batch_size=4, max_tokens=17)
    assert_same(none, plain, 0.0)
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("objective", ["kl", "ce"])
def test_the_gradient_is_that_of_the_formula(objective):
    """Two steps, so that the second is away from the start; loops over single examples of plain transformers."""
    control = Given(objective=objective, ratio=0.5, weight=3.0)
    trainer = {"callbacks": [control], "max_epochs": 1, "gradient_clip_val": None}
    _, record, _ = fit(
        Full(), batch_size=8, max_tokens=15, trainer=trainer, stage={"warmup": 0, "schedule": "constant"}
    )
    torch.manual_seed(0)
    lm = tiny_lm("llama", torch.float64)
    start = copy.deepcopy(lm)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2, weight_decay=0.0)
    own, general = tiny_examples(LENGTHS), tiny_examples(GENERAL, seed=7)
    before = 0
    for number in range(3):
        rows = own[8 * number : 8 * (number + 1)]
        target = torch.cat([losses(lm, row)[0] for row in rows])
        after = before + len(target)
        total = torch.zeros((), dtype=torch.float64)
        for index in control._added.between(before, after):
            nll, now = losses(lm, general[index])
            if objective == "ce":
                total = total + nll.sum()
            else:
                then = losses(start, general[index])[1].detach()
                total = total + (then.exp() * (then - now)).sum()
        before = after
        optimizer.zero_grad()
        (target.mean() + 3.0 * total / (0.5 * len(target))).backward()
        for name, parameter in lm.named_parameters():
            ours = record.grads[number][f"policy.lm.{name}"]
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-8, atol=1e-10)
        assert record.steps[number]["train/loss"] == pytest.approx(target.mean().item(), abs=1e-9)
        optimizer.step()


def test_at_the_start_the_divergence_is_zero_and_pulls_nowhere():
    control = Given(ratio=1.0, weight=100.0)
    options = {"max_epochs": -1, "max_steps": 1, "gradient_clip_val": None}
    _, record, _ = fit(LoRA(rank=3), trainer={**options, "callbacks": [control]})
    _, plain, _ = fit(LoRA(rank=3), trainer=options)
    assert record.steps[0]["forgetting/replay/loss"] == pytest.approx(0, abs=1e-12)
    for ours, theirs in zip(record.grads[0].values(), plain.grads[0].values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_dropout_does_not_touch_the_start():
    """The start model has no dropout: with rate 0 of the adapter's B the divergence is 0 though the policy drops."""
    control = Given(ratio=1.0)
    _, record, _ = fit(LoRA(rank=3, dropout=0.5), trainer={"max_epochs": -1, "max_steps": 1, "callbacks": [control]})
    assert record.steps[0]["forgetting/replay/loss"] == pytest.approx(0, abs=1e-12)


def test_the_first_rows_of_a_source_are_taken():
    rows = [list(row.input_ids) for row in tiny_examples(GENERAL, seed=7)]
    for num_rows, count in ((None, len(rows)), (3, 3)):
        stage = SimpleNamespace(trainer=SimpleNamespace(datamodule=TinyData()))
        control = Replay("general", num_rows=num_rows)
        added = control.added_rows(stage)
        assert [list(row.input_ids) for row in added.examples] == rows[:count]
        assert f"replay: {count} rows of general, KL to the start" in control.describe()


def test_two_of_a_name_and_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="give each a name"):
        fit(LoRA(rank=3), trainer={"callbacks": [Given(), Replay("sample:general")]})
    for settings in ({"ratio": 0.0}, {"weight": -1.0}, {"objective": "mse"}, {"num_rows": 0}):
        with pytest.raises(ConfigError, match="Replay"):
            Replay(**settings)


@pytest.mark.parametrize("make", [LoRA, Full], ids=lambda m: m.__name__)
def test_rows_of_a_divergence_are_scored_for_nothing_else(make):
    """Alone in a micro-batch or between others; the stage's own rows are scored as ever."""
    lm = tiny_lm(dtype=torch.float64)
    policy = Policy(lm, make())
    policy.strategy.remember_start(lm)
    with torch.no_grad():
        for parameter in policy.strategy.trained(lm).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
    batch = pack(tiny_examples((6, 5, 7), seed=3), sources=(0, 1, 0))
    asked = {"watch": frozenset({"entropy", "choice"})}
    found, whole = policy(batch, kl={1: 1.0}, **asked), policy(batch, **asked)
    own = batch.target_sources == 0
    for name in ("logps", "correct", "entropy", "choice"):
        ours, theirs = getattr(found, name), getattr(whole, name)
        torch.testing.assert_close(ours[own], theirs[own], rtol=1e-12, atol=1e-12)
        assert not ours[~own].any()
    assert not found.kl[own].any()
    assert (found.kl[~own] > 0).all()
    alone = policy(batch.only({1}), kl={1: 1.0})
    torch.testing.assert_close(alone.kl, found.kl[~own], rtol=1e-10, atol=1e-12)
    assert not alone.logps.any()
