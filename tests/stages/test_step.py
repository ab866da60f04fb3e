"""One optimizer step is one gradient, however it is cut; and Lightning's settings keep their meaning."""

import itertools

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.batch import pack
from ftlit.data.packing import StepLoader, StepPlanner
from ftlit.errors import ConfigError
from ftlit.objectives.sft import TokenObjective
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.stages import SFT
from ftlit.testing import tiny_examples, tiny_lm

LENGTHS = (9, 4, 4, 12, 2, 7, 15, 3, 6, 6, 11, 5, 8, 2, 3, 10, 4, 9, 7, 5)


class Data(L.LightningDataModule):
    def __init__(self, examples, **plan):
        super().__init__()
        self.examples, self.options = examples, {"batch_size": 8, "shuffle": False, **plan}
        self.added_rows = []

    def planner(self, accumulate=1, world=1):
        return StepPlanner(
            self.examples, accumulate=accumulate, world=world, added_rows=self.added_rows, **self.options
        )

    def train_dataloader(self):
        stage = self.trainer.lightning_module
        return StepLoader(self.examples, self.planner(stage.accumulate, self.trainer.world_size))


class Record(L.Callback):
    def __init__(self):
        self.steps, self.grads, self.micro = [], [], []

    def on_before_optimizer_step(self, trainer, stage, optimizer):
        self.grads.append({n: p.grad.clone() for n, p in stage.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer, stage, outputs, batch, batch_idx):
        self.steps.append(dict(stage.step_metrics))
        self.micro.append(len(batch.micro_batches))


def fit(strategy=None, *, lengths=LENGTHS, family="llama", stage=None, trainer=None, dtype=torch.float64, **plan):
    torch.manual_seed(0)
    arguments = {"lr": 1e-2, "warmup": 2, **(stage or {})}
    module = SFT(policy=tiny_lm(family, dtype), peft=strategy or LoRA(rank=3), **arguments)
    record = Record()
    options = {"max_epochs": 2, "gradient_clip_val": 0.5, **(trainer or {})}
    callbacks = [record, *options.pop("callbacks", [])]
    runner = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, precision="64-true" if dtype == torch.float64 else "32-true",
        callbacks=callbacks, **options,
    )  # fmt: skip
    runner.fit(module, Data(tiny_examples(lengths), **plan))
    return module, record, runner


def assert_same(first, second, tolerance=1e-9):
    for name, parameter in first.named_parameters():
        torch.testing.assert_close(parameter, dict(second.named_parameters())[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("make", [LoRA, Full, PrefixTuning, PromptTuning], ids=lambda m: m.__name__)
def test_how_a_step_is_cut_does_not_matter(make):
    whole, reference, _ = fit(make(), batch_size=8)
    assert reference.micro == [1, 1, 1] * 2
    for batch_size, accumulate, max_tokens in [(4, 2, None), (2, 4, None), (1, 8, None), (8, 1, 20), (4, 2, 9)]:
        cut, record, _ = fit(
            make(), batch_size=batch_size, max_tokens=max_tokens, trainer={"accumulate_grad_batches": accumulate}
        )
        assert max(record.micro) > 1
        for ours, theirs in zip(record.grads, reference.grads, strict=True):
            for name in theirs:
                torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-9)
        for ours, theirs in zip(record.steps, reference.steps, strict=True):
            assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-9)
            assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], abs=1e-9)
            assert ours["train/lr"] == theirs["train/lr"]
        assert_same(cut, whole)


@given(lengths=st.lists(st.integers(2, 12), min_size=3, max_size=9), max_tokens=st.integers(2, 30), data=st.data())
@settings(max_examples=8, deadline=None)
def test_any_lengths_any_cut(lengths, max_tokens, data):
    batch_size = data.draw(st.integers(1, len(lengths)))
    whole, _, _ = fit(lengths=lengths, batch_size=len(lengths), trainer={"max_epochs": 1})
    accumulate = -(-len(lengths) // batch_size)
    cut, _, runner = fit(
        lengths=lengths, batch_size=batch_size, max_tokens=max_tokens,
        trainer={"max_epochs": 1, "accumulate_grad_batches": accumulate},
    )  # fmt: skip
    assert runner.global_step == 1
    assert_same(cut, whole)


def test_the_gradient_is_the_mean_over_all_trained_tokens_of_the_step():
    _, record, _ = fit(Full(), batch_size=4, trainer={"accumulate_grad_batches": 2, "max_steps": 1, "max_epochs": -1})
    torch.manual_seed(0)
    lm = tiny_lm("llama", torch.float64)
    losses = []
    for example in tiny_examples(LENGTHS)[:8]:
        ids = torch.tensor([example.input_ids])
        logps = torch.log_softmax(lm(input_ids=ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        losses.append(-logps[torch.tensor(example.weights[1:]) != 0])
    loss = torch.cat(losses).mean()
    assert record.steps[0]["train/loss"] == pytest.approx(loss.item(), abs=1e-9)
    named = dict(lm.named_parameters())
    grads = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    for name, grad in grads.items():
        torch.testing.assert_close(record.grads[0][f"policy.lm.{name}"], grad, rtol=0, atol=1e-9)


def test_weights_count_as_often_as_they_say():
    """A target of weight 2 and one of weight 1 stand 2 : 1, also when they lie in different micro-batches."""
    examples = tiny_examples((6, 6))
    doubled = [examples[0]._replace(weights=[2 * w for w in examples[0].weights]), examples[1]]
    torch.manual_seed(0)
    stage = SFT(policy=tiny_lm("llama", torch.float64), peft=Full())
    stage.configure_model()
    batches = [pack([e]) for e in (examples[0], examples[0], examples[1])]
    by_hand = sum(stage.micro_loss(batch, stage.policy(batch)).loss for batch in batches) / 9
    runner = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, precision="64-true", accumulate_grad_batches=2,
    )  # fmt: skip
    runner.fit(stage, Data(doubled, batch_size=1))
    assert stage.step_metrics["train/loss"] == pytest.approx(by_hand.item(), abs=1e-9)


def test_clipping_clips_the_gradient_of_the_whole_step():
    norms = []

    class Norm(L.Callback):
        def on_before_zero_grad(self, trainer, stage, optimizer):
            grads = [p.grad for p in stage.parameters() if p.grad is not None]
            if grads:
                norms.append(torch.nn.utils.get_total_norm(grads).item())

    class AfterClip(torch.optim.SGD):
        def step(self, closure=None):
            loss = closure()
            norms.append(torch.nn.utils.get_total_norm([p.grad for g in self.param_groups for p in g["params"]]).item())
            super().step()
            return loss

    optimizer = lambda p: AfterClip(p, lr=0.1)  # noqa: E731
    _, record, _ = fit(
        batch_size=2, stage={"optimizer": optimizer},
        trainer={"accumulate_grad_batches": 4, "gradient_clip_val": 0.01, "max_epochs": 1},
    )  # fmt: skip
    assert all(step["train/grad_norm"] > 0.01 for step in record.steps)
    assert norms == pytest.approx([0.01] * len(record.steps), rel=1e-3)


def test_clipping_by_value():
    _, record, _ = fit(trainer={"gradient_clip_algorithm": "value", "gradient_clip_val": 1e-3, "max_epochs": 1})
    assert len(record.steps) == 3


def test_sgd_without_a_schedule_is_exactly_sgd():
    """Two steps by hand: the optimizer sees the gradients that a plain loop makes."""
    _, record, _ = fit(
        Full(), batch_size=8, stage={"optimizer": lambda p: torch.optim.SGD(p, lr=0.5)},
        trainer={"gradient_clip_val": None, "max_steps": 2, "max_epochs": -1},
    )  # fmt: skip
    torch.manual_seed(0)
    lm = tiny_lm("llama", torch.float64)
    for step in range(2):
        total, count = 0.0, 0
        for example in tiny_examples(LENGTHS)[8 * step : 8 * step + 8]:
            ids = torch.tensor([example.input_ids])
            logps = torch.log_softmax(lm(input_ids=ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
            chosen = logps[torch.tensor(example.weights[1:]) != 0]
            total, count = total - chosen.sum(), count + len(chosen)
        loss = total / count
        assert record.steps[step]["train/loss"] == pytest.approx(loss.item(), abs=1e-9)
        parameters = list(lm.parameters())
        with torch.no_grad():
            for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter -= 0.5 * grad


def test_max_steps_epochs_and_the_rate_count_optimizer_steps():
    module, record, runner = fit(
        batch_size=2, stage={"lr": 1e-3, "warmup": 2, "schedule": "linear"},
        trainer={"accumulate_grad_batches": 2, "max_epochs": 2},
    )  # fmt: skip
    assert runner.global_step == len(record.steps) == 10  # 20 examples, 4 a step, two epochs
    rates = [step["train/lr"] for step in record.steps]
    expected = [1 / 3, 2 / 3] + [1 - (step - 2) / 8 for step in range(2, 10)]
    assert rates == pytest.approx([1e-3 * share for share in expected])
    assert runner.accumulate_grad_batches == 2  # given back
    assert module.accumulate == 2


@pytest.mark.parametrize(
    ("schedule", "last"), [("cosine", 0.1 + 0.9 * 0.5 * (1 + __import__("math").cos(0.9 * __import__("math").pi))),
                           ("linear", 0.1 + 0.9 * 0.1), ("constant", 1.0)],
)  # fmt: skip
def test_schedules(schedule, last):
    stage = SFT(policy=tiny_lm(), schedule=schedule, warmup=0.0, min_lr=0.1)
    rate = stage.rate(10)
    assert rate(0) == pytest.approx(1.0)
    assert rate(9) == pytest.approx(last)
    assert rate(10) == pytest.approx(1.0 if schedule == "constant" else 0.1)
    warm = SFT(policy=tiny_lm(), warmup=0.4).rate(10)
    assert [warm(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_an_objective_of_ones_own():
    class Square(TokenObjective):
        def __call__(self, scores):
            return scores.logps.square()

    _, record, _ = fit(Full(), stage={"objective": Square()}, trainer={"max_steps": 1, "max_epochs": -1})
    _, plain, _ = fit(Full(), trainer={"max_steps": 1, "max_epochs": -1})
    assert record.steps[0]["train/loss"] == pytest.approx(plain.steps[0]["train/loss"])  # the NLL is logged
    assert record.steps[0]["train/grad_norm"] != pytest.approx(plain.steps[0]["train/grad_norm"], rel=1e-3)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched():
    class Poison(TokenObjective):
        def __call__(self, scores):
            return -scores.logps * float("nan")

    module = SFT(policy=tiny_lm("llama"), peft=LoRA(rank=2), objective=Poison())
    runner = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match=r"optimizer step 1 is nan .*lower model.lr"):
        runner.fit(module, Data(tiny_examples(LENGTHS)))
    assert all((p == 0).all() for n, p in module.named_parameters() if "lora_B" in n)


def test_broken_weights_are_refused_before_training():
    lm = tiny_lm("llama")
    with torch.no_grad():
        lm.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="its weights are broken"):
        SFT(policy=lm, peft=LoRA(rank=2)).configure_model()


def test_models_built_in_python_are_checked_too():
    from transformers import GPTJConfig, GPTJForCausalLM

    lm = GPTJForCausalLM(GPTJConfig(vocab_size=60, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))
    with pytest.raises(ConfigError, match="pack"):
        SFT(policy=lm, peft=Full()).configure_model()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_example_are_refused_where_they_would_show(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
    if kind == "longrope":
        rope |= {"short_factor": [1.0, 1.0], "long_factor": [2.0, 3.0]}
    lm = tiny_lm("llama", rope_parameters=rope, max_position_embeddings=8)
    stage = SFT(policy=lm, peft=Full())
    stage.configure_model()
    stage.policy(pack(tiny_examples((5, 8, 6))))
    with pytest.raises(ConfigError, match=r"set data.max_length to at most 8"):
        stage.policy(pack(tiny_examples((5, 9))))


def test_modes_and_frozen_weights():
    module, _, _ = fit(LoRA(rank=2, dropout=0.5))
    assert all(m.training for m in module.policy.modules())
    reference = tiny_lm("llama", torch.float64)
    for name, weight in reference.named_parameters():
        assert torch.equal(dict(module.policy.lm.named_parameters())[name], weight)


def test_dropout_acts_in_training_and_not_in_validation():
    module, _, _ = fit(LoRA(rank=2, dropout=0.5))
    batch = pack(tiny_examples())
    module.train()
    assert not torch.equal(module.policy(batch).logps, module.policy(batch).logps)
    module.eval()
    assert torch.equal(module.policy(batch).logps, module.policy(batch).logps)


def test_gradient_checkpointing_changes_nothing():
    plain, _, _ = fit()
    again, _, _ = fit(stage={"gradient_checkpointing": True})
    assert_same(plain, again)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mistral"])
def test_families_train_alike_cut_or_whole(family):
    whole, _, _ = fit(family=family, batch_size=8, trainer={"max_epochs": 1})
    cut, _, _ = fit(family=family, batch_size=2, trainer={"max_epochs": 1, "accumulate_grad_batches": 4})
    # These families round to float32 inside; Adam's first steps carry that to the size of the rate.
    assert_same(whole, cut, 1e-3 if family == "gemma2" else 1e-6)


def test_it_learns():
    """Twenty rows by heart: from the entropy of guessing to almost nothing."""
    _, record, _ = fit(Full(), dtype=torch.float32, stage={"lr": 1e-2}, trainer={"max_epochs": 60}, batch_size=10)
    losses = [step["train/loss"] for step in record.steps]
    assert losses[0] > 4
    assert sum(losses[-2:]) / 2 < 0.3
    assert record.steps[-1]["train/accuracy"] > 0.9


def test_steps_do_not_depend_on_how_often_the_loader_is_asked():
    loader = StepLoader(tiny_examples(LENGTHS), StepPlanner(tiny_examples(LENGTHS), batch_size=4))
    first = [step.micro_batches[0].examples for step in itertools.islice(loader, 5)]
    assert len({e for part in first for e in part}) == 20
