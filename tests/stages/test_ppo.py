"""PPO and its relatives: what a step is, what it computes, and that it learns."""

import json
import random
from collections import Counter
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from ftlit.callbacks import RolloutSamples
from ftlit.callbacks.report import _KEPT_FULL, estimate
from ftlit.data.prompts import PromptData
from ftlit.errors import ConfigError
from ftlit.export.scorer import RewardScorer
from ftlit.forgetting import Replay
from ftlit.objectives.advantages import GAE, GRPO, RLOO, ReMax
from ftlit.objectives.kl import KLPenalty
from ftlit.objectives.policy_gradient import CISPO, DAPO, GSPO, DrGRPO
from ftlit.objectives.scores import TokenScores
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.rollout.generate import Answer
from ftlit.rollout.generator import BatchedGenerator
from ftlit.rollout.rewards import RewardShaping
from ftlit.rollout.verifiers import Verifier
from ftlit.stages import PPO, SFT
from ftlit.testing import tiny_lm, tiny_tokenizer
from ftlit.testing.tiny import tiny_classifier

STRATEGIES = {
    "full": Full,
    "lora": lambda: LoRA(rank=3, dropout=0.5),
    "prefix": lambda: PrefixTuning(num_virtual_tokens=3),
    "prompt": lambda: PromptTuning(num_virtual_tokens=3),
}


def odd(prompts, completions, **columns):
    """How many characters have an odd code."""
    return [sum(ord(character) % 2 for character in text) / 8 for text in completions]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for number in range(14):
            turns = [{"role": "user", "content": "Say " + "so " * (number % 4) + str(number)}]
            turns += [{"role": "assistant", "content": "abc"}] if number % 2 else []
            file.write(json.dumps({"messages": turns, "number": number}) + "\n")
    return str(path)


def answered_rows(rows):
    path = Path(rows).with_name("sft.jsonl")
    with path.open("w") as file:
        for number in range(9):
            turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi " * (number % 3 + 1)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return str(path)


class Record(L.Callback):
    """What happened at each step."""

    def __init__(self):
        self.steps, self.grads, self.batches, self.found, self.coefs = [], [], [], [], []

    def on_before_optimizer_step(self, trainer, stage, optimizer):
        self.grads.append({name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer, stage, outputs, batch, batch_idx):
        self.steps.append(dict(stage.step_metrics))
        self.batches.append(batch)
        self.found.append(stage.loader.experience)


def train(
    rows, strategy=None, *, steps=8, dtype=torch.float32, data=None, callbacks=(), trainer=None, lm=None, **options
):
    torch.manual_seed(0)
    options = {
        "reward": odd, "max_new_tokens": 6, "lr": 1e-2, "schedule": "constant", "warmup": 0, **options
    }  # fmt: skip
    stage = PPO(policy=lm or tiny_lm("llama", dtype, vocab_size=259), peft=strategy or Full(), **options)
    stage.tokenizer = tiny_tokenizer()
    prompts = PromptData(train=rows, **{"batch_size": 6, **(data or {})})
    record = Record()
    precision = "64-true" if dtype == torch.float64 else "32-true"
    settings = {
        "max_steps": steps, "max_epochs": -1, "gradient_clip_val": 1.0, "precision": precision, **(trainer or {})
    }  # fmt: skip
    runner = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[record, *callbacks], default_root_dir=rows.rsplit("/", 1)[0], **settings,
    )  # fmt: skip
    runner.fit(stage, prompts)
    return stage, record, runner


KINDS = {
    "gae": {"advantage": GAE(), "num_answers": 1},
    "gae_several": {"advantage": GAE(), "num_answers": 3, "value_detached": True, "kl": KLPenalty(0.2, "loss", "k3")},
    "grpo": {"advantage": GRPO(), "loss": DAPO(), "num_answers": 3, "kl": KLPenalty(0.1, "loss", "k2")},
    "dr_grpo": {"advantage": GRPO(std=False), "loss": DrGRPO(), "num_answers": 3, "entropy_coef": 0.1},
    "rloo": {"advantage": RLOO(), "loss": GSPO(0.2, 0.2, length_normalized=False), "num_answers": 2},
    "remax": {"advantage": ReMax(), "loss": CISPO(), "num_answers": 2},
    "gae_cool": {"advantage": GAE(), "temperature": 0.7, "entropy_coef": 0.1, "kl": KLPenalty(0.2, "loss", "k3")},
    "grpo_cool": {"advantage": GRPO(), "num_answers": 3, "temperature": 0.7, "kl": KLPenalty(0.1, "loss", "k2")},
}


# ---- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["gae", "grpo", "grpo_cool"])
def test_the_first_ratio_of_every_rollout_is_exactly_one(rows, strategy, kind):
    """Same path, same packs, no dropout: bit for bit; and before anything is learned the divergence is 0."""
    options = {**KINDS[kind], "num_minibatches": 1, "update_epochs": 2}
    _, record, _ = train(rows, STRATEGIES[strategy](), data={"max_tokens": 120}, **options)
    assert len(record.batches[0].micro_batches) > 1
    for number, step in enumerate(record.steps):
        if number % 2 == 0:
            assert step["val/ratio"] == 1.0
            assert step["policy/approxkl"] == 0.0
            assert step["policy/clipfrac"] == 0.0
        else:
            assert step["policy/approxkl"] > 0
    if strategy in ("full", "lora"):  # virtual tokens are there from the start
        assert record.steps[0]["objective/kl"] == 0.0
    assert record.steps[2]["objective/kl"] != 0.0


def logps_of(lm, prompt, answer, temperature=1.0):
    """One answer at a time through the model's own logits: log-probabilities, entropies, last hidden states."""
    ids = torch.tensor([[*prompt, *answer]])
    out = lm(input_ids=ids, output_hidden_states=True, use_cache=False)
    before = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
    logps = torch.log_softmax(out.logits[0, before] / temperature, -1)
    return (
        logps.gather(1, torch.tensor(answer)[:, None])[:, 0],
        -(logps.exp() * logps).sum(-1),
        out.hidden_states[-1][0, before],
    )


def text_of(stage, answer):
    return stage.tokenizer.decode([token for token in answer if token != 2], skip_special_tokens=True).strip()


@torch.no_grad()
def greedy(lm, prompt, new=6):
    """The greedy answer, by transformers."""
    was, _ = lm.training, lm.eval()
    out = lm.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=new, eos_token_id=2, pad_token_id=2)
    lm.train(was)
    return out[0, len(prompt) :].tolist()


def mean_reward(rewards, found):
    """Over tokens."""
    return sum(r * len(answer) for r, answer in zip(rewards, found.answers, strict=True)) / found.num_tokens


def textbook_advantages(kind, rewards, found, size, greedy_of, stage):
    """The advantages of each answer's tokens; for GAE before they are whitened (values are all the mean reward)."""
    out, level = [], mean_reward(rewards, found)
    for i, answer in enumerate(found.answers):
        group = rewards[i // size * size : (i // size + 1) * size]
        mean, count = sum(group) / size, len(answer)
        if kind.startswith("gae"):
            each = [(rewards[i] - level) * 0.95 ** (count - 1 - t) for t in range(count)]
        elif kind == "remax":
            each = [rewards[i] - odd(None, [text_of(stage, greedy_of(found.prompts[i // size]))])[0]] * count
        elif kind == "rloo":
            each = [rewards[i] - (sum(group) - rewards[i]) / (size - 1)] * count
        else:
            std = torch.tensor(group).double().std().item() + 1e-4 if kind != "dr_grpo" else 1.0
            each = [(rewards[i] - mean) / std] * count
        out.append(torch.tensor(each, dtype=torch.float64))
    return out


@pytest.mark.usefixtures("norms_in_float64")
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_the_textbook_gradient(rows, kind):
    """The second step of a run, whose ratios are not 1, from the definitions: no packing, no flat tensors, float64."""
    options = {**KINDS[kind], "num_minibatches": 1, "update_epochs": 2, "value_clip": None, "value_coef": 0.3}
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.05)  # noqa: E731
    more = {"optimizer": sgd, "dtype": torch.float64, "trainer": {"gradient_clip_val": None}}
    stage, record, _ = train(rows, steps=2, data={"max_tokens": 70}, **more, **options)
    found, kl, loss = record.found[0], stage.kl, stage.policy_loss
    assert any(answer[-1] == 2 for answer in found.answers) or len(found.answers) > 5
    torch.manual_seed(0)
    start = tiny_lm("llama", torch.float64, vocab_size=259)
    torch.manual_seed(0)
    lm = tiny_lm("llama", torch.float64, vocab_size=259)
    size, warmth = stage.num_answers, options.get("temperature", 1.0)
    with torch.no_grad():
        old = [logps_of(start, found.prompts[i // size], answer, warmth)[0] for i, answer in enumerate(found.answers)]
    texts = [text_of(stage, answer) for answer in found.answers]
    # At the first rollout the divergence is 0: the penalty changes no advantage.
    given = textbook_advantages(kind, odd(None, texts), found, size, lambda p: greedy(start, p), stage)
    level = mean_reward(odd(None, texts), found)
    advantages, returns = given, [one + level for one in given]
    if kind.startswith("gae"):
        every = torch.cat(given)
        advantages = [(one - every.mean()) / (every.var() + 1e-8).sqrt() for one in given]
    torch.testing.assert_close(
        found.tokens["advantages"],
        torch.tensor([one for answer in advantages for one in answer]).double(),
        rtol=1e-6,
        atol=1e-7,
    )  # rewards are float32
    head = [
        torch.zeros(16, dtype=torch.float64, requires_grad=True),
        torch.full((1,), level, dtype=torch.float64, requires_grad=True),
    ]

    def total_loss():
        number = sum(map(len, found.answers))
        terms = []
        for i, answer in enumerate(found.answers):
            logps, entropies, states = logps_of(lm, found.prompts[i // size], answer, warmth)
            a = advantages[i]
            ratios = (logps - old[i]).exp()
            if kind == "rloo":
                ratios = (logps - old[i]).sum().exp().expand(len(answer))
            if kind == "remax":
                each = -ratios.detach().clamp(max=5.0) * a * logps
            else:
                low, high = loss.low, loss.high
                each = -torch.minimum(ratios * a, ratios.clamp(low, high) * a)
            if kl.place == "loss":
                apart = logps - old[i]  # the start is the policy that drew
                each = each + kl.coef * (apart**2 / 2 if kl.estimator == "k2" else torch.exp(-apart) - 1 + apart)
            each = each - stage.entropy_coef * entropies
            if kind.startswith("gae"):
                states = states.detach() if stage.value_detached else states
                each = each + 0.3 * 0.5 * (states @ head[0] + head[1] - returns[i]) ** 2
            if loss.reduction == "sequence":
                terms.append(each.mean() / len(found.answers))
            elif loss.reduction == "constant":
                terms.append(each.sum() / (len(found.answers) * 6))
            else:
                terms.append(each.sum() / number)
        return sum(terms)

    names = dict(lm.named_parameters())
    for step in range(2):
        value = total_loss()
        assert record.steps[step]["train/loss"] == pytest.approx(value.item(), abs=1e-9)
        inputs = [*names.values(), *(head if kind.startswith("gae") else [])]
        grads = torch.autograd.grad(value, inputs, allow_unused=True)
        for name, grad in zip(
            [f"policy.lm.{n}" for n in names] + ["critic.weight", "critic.bias"], grads, strict=False
        ):
            size_of = max(1.0, grad.abs().max().item())
            torch.testing.assert_close(record.grads[step][name], grad, rtol=0, atol=1e-9 * size_of)
        with torch.no_grad():
            for parameter, grad in zip(inputs, grads, strict=True):
                parameter -= 0.05 * grad


@pytest.mark.usefixtures("norms_in_float64")
@pytest.mark.parametrize("kind", KINDS)
def test_how_a_step_is_cut_does_not_matter(rows, kind):
    options = {**KINDS[kind], "dtype": torch.float64, "steps": 6}
    whole, first, _ = train(rows, data={"max_tokens": None}, **options)
    cut, second, _ = train(rows, data={"max_tokens": 45}, **options)
    assert len(first.batches[0].micro_batches) == 1 < len(second.batches[0].micro_batches)
    halves, third, _ = train(rows, data={"batch_size": 3}, trainer={"accumulate_grad_batches": 2}, **options)
    for other, record in ((cut, second), (halves, third)):
        for ours, theirs in zip(record.steps, first.steps, strict=True):
            for key, value in theirs.items():
                if not key.startswith(("time", "train/tokens", "train/trained")):
                    assert ours[key] == pytest.approx(value, rel=1e-9, abs=1e-9), key
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(dict(other.named_parameters())[name], parameter, rtol=0, atol=1e-6)


def test_exactly_the_drawn_tokens_are_trained(rows):
    """The end token too, which is also the padding token; no token of a prompt."""
    lm = tiny_lm("llama", vocab_size=259)
    lm.generation_config.eos_token_id = list(range(2, 259, 6))  # many answers end
    stage, record, _ = train(rows, lm=lm, steps=2, num_answers=2, num_minibatches=2, update_epochs=1, max_new_tokens=9)
    ends, found = set(lm.generation_config.eos_token_id), record.found[0]
    assert 0 < sum(answer[-1] in ends for answer in found.answers) < len(found.answers)
    seen = []
    for batch in record.batches:
        for micro in batch.micro_batches:
            for segment in micro.target_segments.unique().tolist():
                at = micro.target_segments == segment
                answer = micro.target_ids[at].tolist()
                seen.append(answer)
                parent = micro.segments.parents[segment]
                offset, length = micro.segments.offsets[parent], micro.segments.lengths[parent]
                prompt = micro.input_ids[0, offset : offset + length].tolist()
                assert prompt == stage.data.rows["train"][micro.examples[segment]].input_ids
                assert all(token not in ends for token in answer[:-1])
                assert answer[-1] in ends or len(answer) == 9
    assert sorted(seen) == sorted(found.answers)
    assert record.steps[0]["answers/ended"] == sum(a[-1] in ends for a in found.answers) / len(found.answers)
    assert record.batches[0].totals.weight + record.batches[1].totals.weight == sum(map(len, found.answers))


# ---- what the steps mean --------------------------------------------------------------------------------------------


def test_steps_epochs_and_rollouts(rows):
    """14 prompts, 6 a rollout: 3 rollouts an epoch, 2 x 2 steps each; prompts go on across the end of an epoch."""
    stage, record, runner = train(rows, steps=-1, trainer={"max_epochs": 2})
    assert runner.global_step == stage.num_steps == 2 * 3 * 2 * 2
    firsts = [found.first_step for found in record.found]
    assert firsts == [step // 4 * 4 for step in range(24)]
    assert [found.number for found in record.found] == [step // 4 for step in range(24)]
    drawn = [row for found in record.found[::4] for row in found.rows]
    assert set(Counter(drawn).values()) == {2, 3}  # 36 in all, and none a third time before all came twice
    assert [row for number in range(3) for _, row in stage.order.rollout(6 * number)][:14] != list(range(14))
    assert "24 optimizer steps: 2 x 2 for each rollout of 6 prompts x 1 answers" in stage.steps_in_words(stage.data)
    # A rollout's own numbers stand beside each of its steps.
    scores = [step["objective/scores"] for step in record.steps]
    assert scores == [scores[step // 4 * 4] for step in range(24)]
    assert len(set(scores)) > 3
    assert all("policy/approxkl" in step and "loss/value" in step for step in record.steps)


def test_the_memory_of_answers_and_of_a_value_model_is_counted(rows):
    more = {"steps": 1, "data": {"max_tokens": None}}
    short, long, valued = (
        estimate(stage, stage.data)
        for stage in (
            train(rows, **more)[0],
            train(rows, num_answers=4, max_new_tokens=9, **more)[0],
            train(rows, value_model=tiny_lm("llama", vocab_size=259), **more)[0],
        )
    )
    per_token = 16 * 2 * _KEPT_FULL * 4  # width, layers, what is kept of each, bytes
    assert long - short == pytest.approx(6 * (4 * 9 - 6) * per_token)
    own = sum(p.numel() for p in tiny_lm("llama", vocab_size=259).model.parameters())
    assert valued - short == pytest.approx(4 * 4 * own, rel=0.01)


def test_a_loader_that_is_asked_for_again_goes_on(rows):
    settings = {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}
    stage, record, _ = train(rows, steps=-1, trainer=settings)
    assert [found.number for found in record.found] == [step // 4 for step in range(24)]
    again = Record()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet["default_root_dir"] = str(Path(rows).parent)
    trainer = L.Trainer(accelerator="cpu", max_steps=2, max_epochs=-1, callbacks=[again], **quiet)
    trainer.fit(stage, PromptData(train=rows, batch_size=6))  # another run of the same stage begins anew
    assert [found.number for found in again.found] == [0, 0]
    assert again.steps[0]["val/ratio"] == pytest.approx(1.0, abs=1e-6)


def test_a_filler_counts_nothing(rows):
    """Even where its token could hardly be less likely."""
    stage, record, _ = train(rows, steps=1, kl=KLPenalty(0.1, "loss", "k3"), advantage=GRPO(), num_answers=2)
    batch = record.found[0].pack(())
    logps = torch.full((1,), -200.0, requires_grad=True)
    result = stage.micro_loss(batch, TokenScores(logps, torch.tensor([False])))
    (grad,) = torch.autograd.grad(result.loss, logps)
    assert result.loss == 0
    assert grad == 0
    assert all(value == 0 for value in result.sums.values())


def test_the_value_head_has_its_own_rate(rows):
    stage, record, runner = train(rows, steps=2, lr=1e-2, value_lr=0.03)
    rates = {id(p): group["lr"] for group in runner.optimizers[0].param_groups for p in group["params"]}
    assert {rates[id(p)] for p in stage.critic.parameters()} == {0.03}
    assert {rates[id(p)] for p in stage.policy.parameters()} == {0.01}
    assert record.steps[0]["train/lr"] == 0.01


def test_a_value_model_of_its_own(rows):
    """A reward model keeps its head; values and gradients are those of one answer at a time, the policy's its own."""
    critic = tiny_classifier("llama", labels=1, vocab_size=259)
    options = {"steps": 1, "num_minibatches": 1, "value_lr": 0.03, "value_coef": 0.3, "value_clip": None}
    stage, record, runner = train(rows, data={"max_tokens": 70}, value_model=critic, **options)
    found = record.found[0]
    values = []
    for prompt, answer in zip(found.prompts, found.answers, strict=True):
        states = critic.model(input_ids=torch.tensor([[*prompt, *answer]])).last_hidden_state
        values.append(critic.score(states)[0, len(prompt) - 1 : -1, 0])
    values = torch.cat(values)
    torch.testing.assert_close(found.tokens["values"], values.detach(), rtol=0, atol=1e-5)
    loss = 0.3 * 0.5 * (values - found.tokens["returns"]).square().mean()
    names = dict(critic.named_parameters())
    for name, grad in zip(names, torch.autograd.grad(loss, list(names.values())), strict=True):
        torch.testing.assert_close(record.grads[0][f"critic.lm.{name}"], grad, rtol=0, atol=1e-5)
    rates = {id(p): group["lr"] for group in runner.optimizers[0].param_groups for p in group["params"]}
    assert {rates[id(p)] for p in stage.critic.parameters()} == {0.03}
    _, alone, _ = train(rows, data={"max_tokens": 70}, value_model=critic, **{**options, "value_coef": 0.0})
    for name, grad in alone.grads[0].items():
        assert torch.equal(record.grads[0][name], grad) or not name.startswith("policy.")


def test_a_new_value_head_starts_at_the_mean_reward_and_learns_from_there(rows):
    stage, record, _ = train(rows, lr=1e-3)
    both = record.found[0], record.found[-1]
    levels = [mean_reward(odd(None, [text_of(stage, answer) for answer in one.answers]), one) for one in both]
    first, last = (found.tokens["values"] for found in both)
    torch.testing.assert_close(first, torch.full_like(first, levels[0]), rtol=1e-6, atol=0)
    assert last.std() > 0
    assert stage.critic.bias.item() == pytest.approx(levels[0], abs=8.1e-3)  # eight steps of Adam away
    assert abs(levels[1] - levels[0]) > 0.01


def test_the_level_of_a_new_value_head_is_discounted_like_its_returns(rows):
    stage, record, _ = train(rows, steps=1, advantage=GAE(gamma=0.8))
    found = record.found[0]
    rewards = odd(None, [text_of(stage, answer) for answer in found.answers])
    each = [
        reward * 0.8**back for reward, answer in zip(rewards, found.answers, strict=True) for back in range(len(answer))
    ]
    values = found.tokens["values"]
    torch.testing.assert_close(values, torch.full_like(values, sum(each) / len(each)), rtol=1e-6, atol=0)


def test_a_value_model_from_a_language_model_starts_at_zero(rows):
    """A copy, even of the policy itself, with its own strategy; added rows and learning go on beside it."""
    lm = tiny_lm("llama", vocab_size=259)
    replay = Replay(answered_rows(rows), objective="ce", ratio=0.5)
    more = {"value_lr": 0.02, "kl": KLPenalty(0.0), "update_epochs": 4}
    own = LoRA(rank=3, lr_ratio_b=4.0)
    stage, record, runner = train(
        rows, LoRA(rank=2), lm=lm, steps=8, value_model=lm, value_peft=own, callbacks=[replay], **more
    )
    assert record.steps[0]["val/explained_variance"] == 0.0
    assert not record.found[0].tokens["values"].any()
    errors = [step["loss/value"] for step in record.steps[:8]]
    assert sum(errors[-2:]) < 0.7 * sum(errors[:2])
    trained = {name for name, parameter in stage.critic.named_parameters() if parameter.requires_grad}
    assert all("lora" in name or name == "lm.score.weight" for name in trained)
    rates = {id(p): group["lr"] for group in runner.optimizers[0].param_groups for p in group["params"]}
    assert {rates[id(p)] for name, p in stage.critic.named_parameters() if name.endswith("lora_B")} == {0.08}
    assert {rates[id(p)] for name, p in stage.policy.named_parameters() if p.requires_grad} == {0.01}
    assert stage.critic.lm.model is not lm.model
    assert stage.critic.lm.model.layers[0].mlp.up_proj.lora_A.shape[0] == 3


def test_every_minibatch_comes_once_in_each_pass_in_changing_order(rows):
    _, record, _ = train(rows, steps=12, update_epochs=4, num_minibatches=3, lr=1e-5)
    passes = [[batch.micro_batches[0].examples for batch in record.batches[i : i + 3]] for i in range(0, 12, 3)]
    assert all(sorted(one) == sorted(passes[0]) for one in passes)
    assert any(one != passes[0] for one in passes)


def test_an_update_that_goes_too_far_is_cut_short(rows):
    """The step count, and with it schedules and the end of the run, stay what they are."""
    free, whole, _ = train(rows, steps=8, lr=0.05)
    cut, record, runner = train(rows, steps=8, lr=0.05, target_kl=1e-3)
    assert runner.global_step == 8
    assert record.found[-1].number > whole.found[-1].number
    for step, found, after in zip(record.steps, record.found, record.found[1:], strict=False):
        if step["policy/approxkl"] > 1e-3:
            assert after.number == found.number + 1
    assert free.rollouts.seconds["rollout"] > 0
    assert cut.rollouts.seconds["update"] > 0


def test_validation_counts_optimizer_steps_and_is_greedy(rows):
    seen = []

    class Seen(L.Callback):
        def on_validation_end(self, trainer, stage):
            values = stage.start_metrics if trainer.sanity_checking else stage.last_metrics
            seen.append((trainer.global_step, values, stage.policy.lm.state_dict()["model.norm.weight"].clone()))

    more = {"num_sanity_val_steps": -1, "val_check_interval": 3, "check_val_every_n_epoch": None}
    stage, _, _ = train(rows, steps=7, data={"validation": 0.25}, callbacks=[Seen()], trainer=more)
    assert [step for step, *_ in seen] == [0, 3, 6, 7]
    assert set(seen[0][1]) == {"val/reward", "val/kl", "val/length", "val/ended"}
    assert seen[0][1]["val/kl"] == 0.0
    assert seen[-1][1]["val/kl"] > 0.0
    # The last validation again by hand: greedy answers of the model as it is.
    held_out = stage.data.rows["validation:main"]
    assert len(held_out) == 4
    texts = [text_of(stage, greedy(stage.policy.lm, row.input_ids)) for row in held_out]
    total = sum(odd(None, texts))
    assert seen[-1][1]["val/reward"] == pytest.approx(total / 4, abs=1e-6)


# ---- rewards --------------------------------------------------------------------------------------------------------


def test_rewards_see_turns_answers_and_columns(rows):
    calls = []

    def reward(prompts, completions, number, reference, **columns):
        calls.append((prompts, completions, number, reference))
        return [float(n) for n in number]

    def other(prompts, completions, **columns):
        return [1.0] * len(completions)

    options = {
        "reward": [reward, other],
        "reward_weights": [2.0, -1.0],
        "num_answers": 2,
        "shaping": RewardShaping(clip=9.0),
    }
    _, record, _ = train(rows, steps=1, **options)
    assert record.steps[0]["objective/alike"] == 1.0  # both answers to a prompt have one reward
    prompts, completions, numbers, references = calls[0]
    assert len(prompts) == len(completions) == 12
    assert numbers[::2] == numbers[1::2]
    for prompt, number, reference in zip(prompts, numbers, references, strict=True):
        assert [turn["role"] for turn in prompt] == ["user"]
        assert prompt[0]["content"].endswith(str(number))
        assert reference == ("abc" if number % 2 else None)
    mean = sum(2.0 * number - 1 for number in numbers) / 12
    assert record.steps[0]["objective/scores"] == pytest.approx(mean)
    assert record.steps[0]["rewards/reward"] == pytest.approx(sum(numbers) / 12)
    assert record.steps[0]["objective/rlhf_reward"] == pytest.approx(sum(min(2.0 * n - 1, 9.0) for n in numbers) / 12)
    kept = [json.loads(line) for line in Path(rows).with_name("rollouts.jsonl").read_text().split("\n") if line]
    assert [one["reward"] for one in kept] == [2.0 * number - 1 for number in numbers]


def test_whitened_baselines_are_those_of_their_rollout(rows):
    """By the statistics that the answers themselves were whitened by."""
    options = {
        "advantage": ReMax(),
        "shaping": RewardShaping(whiten=True),
        "reward": lambda completions: [5.0 + len(t) for t in completions],
    }
    stage, record, _ = train(rows, steps=1, num_answers=2, **options)
    found = record.found[0]
    texts = [text_of(stage, answer) for answer in found.answers]
    rewards = torch.tensor([5.0 + len(text) for text in texts])
    torch.manual_seed(0)
    start = tiny_lm("llama", vocab_size=259)
    greedy_rewards = torch.tensor([5.0 + len(text_of(stage, greedy(start, prompt))) for prompt in found.prompts])
    expected = (rewards - greedy_rewards.repeat_interleave(2)) / rewards.std()
    torch.testing.assert_close(found.tokens["advantages"], expected[found.token_owners], rtol=0, atol=1e-5)
    assert stage.rollouts.seconds["rewards"] > 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_rewards_have_a_precision_of_their_own(rows, precision):
    """The same in a rollout and in a validation, which Lightning runs in that of the run."""
    seen = []

    def exact(prompts, completions, **columns):
        seen.append((torch.get_default_dtype(), torch.is_autocast_enabled("cpu")))
        return [1.0009765625 for _ in completions]  # bfloat16 would say 1

    more = {"precision": precision, "num_sanity_val_steps": -1}
    stage, record, _ = train(rows, steps=1, reward=exact, data={"validation": 0.25}, trainer=more)
    assert len(seen) >= 3
    assert set(seen) == {(torch.float32, False)}
    assert stage.last_metrics["val/reward"] == record.steps[0]["objective/scores"] == 1.0009765625


@pytest.mark.parametrize("whiten", [False, True])
def test_rewards_of_single_tokens(rows, whiten):
    """Each counts from its token on; what shaping does lies on the last. Other advantages see their sum."""

    def odd_tokens(completion_ids, **columns):
        return [[float(token % 2) for token in answer] for answer in completion_ids]

    shaping = RewardShaping(whiten=whiten, missing_end_penalty=0.5)
    options = {"reward": odd_tokens, "shaping": shaping, "steps": 1}
    _, record, _ = train(rows, advantage=GAE(lam=1.0, whiten=False), **options)
    found = record.found[0]
    totals = torch.tensor([float(sum(token % 2 for token in answer)) for answer in found.answers])
    mean, std = (totals.mean(), totals.std()) if whiten else (0.0, 1.0)
    expected = []
    for answer in found.answers:
        each = [token % 2 / std for token in answer]
        last = -mean / std - 0.5 * (answer[-1] != 2)
        expected += [sum(each[place:]) + last for place in range(len(answer))]
    level = sum(expected) / len(expected)  # what a new head says of every token
    torch.testing.assert_close(found.tokens["values"], torch.full((len(expected),), level), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.tokens["advantages"], torch.tensor(expected) - level, rtol=0, atol=1e-5)
    assert record.steps[0]["objective/scores"] == pytest.approx(totals.mean().item())
    summed = lambda completion_ids: [float(sum(token % 2 for token in answer)) for answer in completion_ids]  # noqa: E731
    options |= {"advantage": GRPO(), "num_answers": 3}
    _, ours, _ = train(rows, **options)
    _, theirs, _ = train(rows, **{**options, "reward": summed})
    torch.testing.assert_close(ours.found[0].tokens["advantages"], theirs.found[0].tokens["advantages"])


def test_the_weight_of_the_penalty_is_steered(rows):
    options = {"kl": KLPenalty(coef=0.1, target=1e-3), "lr": 0.05, "update_epochs": 1, "num_minibatches": 1}
    _, record, _ = train(rows, steps=6, **options)
    coef = 0.1
    for step in record.steps:
        assert step["objective/kl_coef"] == pytest.approx(coef)
        coef *= 1 + 0.1 * min(max(step["objective/kl"] / 1e-3 - 1, -0.2), 0.2)
    assert coef > 0.1


def test_replay_beside_the_rollouts(rows):
    """Added rows are counted against the trained tokens, reach the loss, and weight 0 is as if they were not there."""
    sft = answered_rows(rows)
    make = lambda weight: Replay(sft, objective="ce", ratio=0.5, weight=weight)  # noqa: E731
    plain, first, _ = train(rows, steps=8)
    none, _, _ = train(rows, steps=8, callbacks=[make(0.0)])
    _, record, _ = train(rows, steps=8, callbacks=[make(1.0)])
    for name, parameter in plain.named_parameters():
        assert torch.equal(dict(none.named_parameters())[name], parameter), name
    tokens = sum(step["forgetting/replay/tokens"] for step in record.steps)
    own = sum(batch.totals.targets for batch in record.batches)
    assert abs(tokens - 0.5 * own) < 12
    losses = [step["forgetting/replay/loss"] for step in record.steps if "forgetting/replay/loss" in step]
    assert losses[-1] < losses[0]
    assert record.steps[0]["loss/policy"] == pytest.approx(first.steps[0]["loss/policy"], abs=1e-6)
    at_one, at_three = (
        train(rows, steps=1, callbacks=[make(1.0)], temperature=temperature, max_new_tokens=1, num_minibatches=1)[1]
        for temperature in (1.0, 3.0)
    )  # the same rows are replayed, at temperature 1
    loss = at_one.steps[0]["forgetting/replay/loss"]
    assert at_three.steps[0]["forgetting/replay/loss"] == pytest.approx(loss, abs=1e-6)
    assert at_three.steps[0]["policy/entropy"] != pytest.approx(at_one.steps[0]["policy/entropy"], abs=1e-3)


@pytest.mark.parametrize("kind", ["gae", "grpo", "rloo", "remax"])
@pytest.mark.parametrize("level", [1000.1, 0.1, -7 / 3])
def test_rewards_that_are_all_alike_move_nothing(rows, kind, level):
    """To the last bit: an optimizer that divides by the size of gradients makes a step of any rest."""
    options = {**KINDS[kind], "kl": KLPenalty(0.0), "reward": lambda completions: [level] * len(completions)}
    if kind == "gae":
        options["advantage"] = GAE(lam=1.0)
    _, record, _ = train(rows, steps=1, trainer={"gradient_clip_val": None}, **options)
    for name, grad in record.grads[0].items():
        assert not name.startswith("policy.lm") or grad.abs().max() <= (1e-4 if kind == "gae" else 0.0), name
    assert record.found[0].tokens["advantages"].abs().max() == 0.0
    assert record.steps[0].get("objective/alike", 1.0) == 1.0


@pytest.mark.parametrize("place", ["reward", "loss"])
def test_alike_is_what_the_advantage_sees(rows, place):
    """Not what the rewards say alone: a bound makes them alike, and a penalty tells them apart."""
    options = {**KINDS["grpo"], "kl": KLPenalty(0.1, place, "k2"), "steps": 1}
    counting = {"reward": lambda completions: [float(n) for n in range(len(completions))]}
    _, record, _ = train(rows, shaping=RewardShaping(clip=0.5), **counting, **options)
    assert record.steps[0]["objective/alike"] == 5 / 6  # only 0 is below the bound
    longer = {"reward": lambda completions: [1.0] * len(completions), "max_new_tokens": 30}
    lm = tiny_lm("llama", vocab_size=259)
    lm.generation_config.eos_token_id = list(range(2, 259, 6))
    _, record, _ = train(rows, shaping=RewardShaping(length_penalty=0.1), lm=lm, **longer, **options)
    assert record.steps[0]["objective/alike"] < 1


def many_ends():
    """A model whose answers end now and then."""
    lm = tiny_lm("llama", vocab_size=259)
    lm.generation_config.eos_token_id = list(range(2, 259, 16))
    return lm


@pytest.mark.parametrize("kind", ["gae", "grpo", "dr_grpo", "rloo", "remax", "grpo_cool"])
def test_masked_answers_teach_nothing(rows, kind, capsys):
    """Whatever they are worth, the step is that of the others; they do not count in its mean either."""
    ends = set(many_ends().generation_config.eos_token_id)
    made = {}
    for worth in (0.0, 50.0):

        def reward(completions, completion_ids, worth=worth):
            texts = zip(odd(None, completions), completion_ids, strict=True)
            return [value if ids[-1] in ends else worth for value, ids in texts]

        shaping = RewardShaping(cut_answers="mask", whiten=kind == "rloo")
        options = {**KINDS[kind], "num_answers": 3, "num_minibatches": 1, "shaping": shaping, "steps": 2}
        made[worth] = train(rows, lm=many_ends(), reward=reward, **options)[1]
    found = made[0.0].found[0]
    cut = [number for number, answer in enumerate(found.answers) if answer[-1] not in ends]
    assert 0 < len(cut) < len(found.answers)
    assert sorted(found.masked) == cut
    kept = [answer for number, answer in enumerate(found.answers) if number not in cut]
    totals = made[0.0].batches[0].totals
    assert (totals.weight, totals.targets, totals.examples) == (sum(map(len, kept)), sum(map(len, kept)), len(kept))
    weights = torch.cat([micro.target_weights for micro in made[0.0].batches[0].micro_batches])
    assert int(weights.sum()) == totals.targets
    for first, second in zip(made[0.0].grads, made[50.0].grads, strict=True):
        for name, grad in first.items():
            assert torch.equal(grad, second[name]), name
    assert made[0.0].steps[0]["train/loss"] == made[50.0].steps[0]["train/loss"]
    assert "answers cut at 6 tokens are not trained" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["gae", "grpo", "dr_grpo", "rloo"])
def test_a_step_of_masked_answers_alone_is_none(rows, kind):
    lm = tiny_lm("llama", vocab_size=259)
    options = {**KINDS[kind], "num_answers": 2, "shaping": RewardShaping(cut_answers="mask"), "max_new_tokens": 2}
    _, record, _ = train(rows, lm=lm, steps=2, **options)
    assert record.steps[0]["answers/ended"] == record.steps[0]["train/loss"] == 0
    assert sum(grad.abs().sum() for grads in record.grads for grad in grads.values()) == 0


def test_what_becomes_of_cut_answers_is_said(rows, capsys):
    train(rows, steps=1)
    assert "rewards    odd; answers cut at 6 tokens are worth what the rewards say of them" in capsys.readouterr().out
    train(rows, steps=1, reward=[odd, odd], reward_weights=[1.0, 0.5], shaping=RewardShaping(missing_end_penalty=2.0))
    assert "rewards    odd_1, 0.5 x odd_2; answers cut at 6 tokens lose 2\n" in capsys.readouterr().out


OPENS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_rewards_see_what_was_said(rows, monkeypatch):
    """Every character of it, what the template began it with, and whether it was cut."""
    seen = {}
    drawn = ["  indented\n\tcode\n", "a . b , c n't\n\n", " ", ""]

    def check(completions, completion_ids, truncated, prefilled, number, **columns):
        seen.update(said=completions, truncated=truncated, prefilled=prefilled)
        return [0.0] * len(completions)

    class Says(BatchedGenerator):
        def __call__(self, lm, strategy, tokenizer, prompts, seeds, sampling, quiet=False):
            texts = [drawn[place % 4] for place in range(len(seeds))]
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            return [Answer(one, place % 2 == 0 or not one, 2 if place % 2 == 0 or not one else None)
                    for place, one in enumerate(ids)]  # fmt: skip

    for template, begun in ((None, ""), (OPENS, "<think>\n")):
        train(rows, steps=1, reward=check, generator=Says(), data={"chat_template": template}, max_new_tokens=30)
        assert seen["said"] == [drawn[place % 4] for place in range(6)]
        assert seen["truncated"] == [place % 4 == 1 for place in range(6)]
        assert seen["prefilled"] == [begun] * 6
    kept = [json.loads(line) for line in Path(rows).with_name("rollouts.jsonl").read_text().split("\n") if line]
    assert [one["answer"] for one in kept[:4]] == drawn


def test_columns_have_their_own_names_and_those_they_are_given(tmp_path):
    path, seen = tmp_path / "rows.jsonl", {}
    line = {"asked": "Say 1", "told": "one", "grade": 3}
    path.write_text("".join(json.dumps(line) + "\n" for _ in range(6)))

    def check(completions, asked, told, prompt, completion, grade, reference):
        seen.update(asked=asked, told=told, prompt=prompt, completion=completion, grade=grade, reference=reference)
        return [0.0] * len(completions)

    train(str(path), steps=1, reward=check, data={"columns": {"prompt": "asked", "completion": "told"}})
    assert {name: set(values) for name, values in seen.items()} == {
        "asked": {"Say 1"}, "prompt": {"Say 1"}, "told": {"one"}, "completion": {"one"}, "grade": {3},
        "reference": {"one"},
    }  # fmt: skip
    path.write_text(json.dumps({"prompt": "Say 1", "completion": "one"}))
    with pytest.raises(ConfigError, match="check: the rows have no column 'asked'"):
        train(str(path), steps=1, reward=check)


@pytest.mark.parametrize("kind", ["gae", "grpo", "rloo", "remax"])
def test_answers_of_which_no_reward_says_anything_are_not_trained(rows, kind):
    def half(completions, number, **columns):
        return [None if n % 2 else value for n, value in zip(number, odd(None, completions), strict=True)]

    def bonus(completions, number, **columns):
        return [None if n % 3 else 0.5 for n in number]

    options = {**KINDS[kind], "num_answers": 2, "num_minibatches": 1, "reward": [half, bonus], "steps": 2}
    stage, record, _ = train(rows, **options)
    found = record.found[0]
    numbers = [stage.data.rows["train"][found.rows[owner]].columns["number"] for owner in found.owners]
    masked = [place for place, n in enumerate(numbers) if n % 2 and n % 3]
    assert sorted(found.masked) == masked
    assert 0 < len(masked) < len(numbers)
    step = record.steps[0]
    assert step["answers/trained"] == pytest.approx(1 - len(masked) / len(numbers))
    assert record.batches[0].totals.examples == len(numbers) - len(masked)
    texts = [text_of(stage, answer) for answer in found.answers]
    first = [value for n, value in zip(numbers, odd(None, texts), strict=True) if n % 2 == 0]
    assert step["rewards/half"] == pytest.approx(sum(first) / len(first))
    assert step["rewards/bonus"] == 0.5
    total = sum(first) + 0.5 * sum(n % 3 == 0 for n in numbers)
    assert step["objective/scores"] == pytest.approx(total / (len(numbers) - len(masked)))
    kept = [json.loads(line) for line in Path(rows).with_name("rollouts.jsonl").read_text().split("\n") if line]
    assert [place for place, one in enumerate(kept) if one["reward"] is None] == masked
    assert [one["reward/bonus"] for one in kept] == [None if n % 3 else 0.5 for n in numbers]


def test_validation_is_the_mean_of_what_was_said(rows):
    say = lambda completions, number: [None if n % 2 else 2.0 for n in number]  # noqa: E731
    data = {"validation": rows, "batch_size": 3}
    stage, _, _ = train(rows, steps=1, reward=say, data=data)
    assert stage.last_metrics["val/reward"] == 2.0
    stage, record, _ = train(rows, steps=1, reward=lambda completions: [None] * len(completions), data=data)
    assert np.isnan(stage.last_metrics["val/reward"])
    assert np.isnan(record.steps[0]["objective/scores"])
    assert all(torch.isfinite(grad).all() for grad in record.grads[0].values())


def test_an_error_in_a_reward_names_the_row(rows):
    def fails(completion, number):
        return 1 / (number - 5)

    with pytest.raises(ZeroDivisionError) as error:
        train(rows, steps=8, reward=fails)
    assert error.value.__notes__[0].startswith(f"reward fails failed at {rows}, row 6: ")


def test_answers_stop_at_texts(rows, capsys):
    """They end, are rewarded and trained with the token that completes one; no end token is put there."""
    seen = {}

    def check(completions, completion_ids, truncated, **columns):
        seen.update(said=completions, ids=completion_ids, truncated=truncated)
        return odd(None, completions)

    options = {"reward": check, "max_new_tokens": 12, "steps": 1, "num_answers": 2, "num_minibatches": 1}
    train(rows, **options)
    free = seen["said"]
    letters = [letter for text in free for letter in text[1:-1] if letter.isascii() and letter.isalnum()]
    stop = [letters[0], letters[-1]]
    _, record, _ = train(rows, stop=stop, shaping=RewardShaping(missing_end_penalty=1.0), **options)
    found = record.found[0]
    assert found.answers == seen["ids"]
    stopped = [text for text in seen["said"] if any(one in text for one in stop)]
    assert 1 < len(stopped) < len(free)
    assert all(any(text.endswith(one) for one in stop) for text in stopped)
    for text, whole, ids, cut in zip(seen["said"], free, seen["ids"], seen["truncated"], strict=True):
        assert whole.startswith(text.rstrip("\ufffd"))
        assert cut == (len(ids) == 12 and ids[-1] != 2 and text not in stopped)
        assert text not in stopped or ids[-1] != 2
    assert record.batches[0].totals.targets == sum(map(len, found.answers))
    out = capsys.readouterr().out
    assert f"sampling   answers also end with {stop[0]!r}, {stop[1]!r}, and have no end token then" in out


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"min_p": 0.9}, {"top_k": 9, "top_p": 0.5, "min_p": 0.1}])
def test_the_first_ratio_is_one_where_the_distribution_is_cut(rows, cut, capsys):
    """Old and new probabilities are both those before the cut."""
    options = {**KINDS["grpo"], "num_minibatches": 1, "update_epochs": 1, "steps": 2}
    _, record, _ = train(rows, **cut, **options)
    assert all(step["val/ratio"] == 1.0 and step["policy/approxkl"] == 0.0 for step in record.steps)
    _, whole, _ = train(rows, **options)
    assert record.found[0].answers != whole.found[0].answers
    assert "probabilities of the update are those before this cut" in capsys.readouterr().out


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reward": None}, "model.reward is missing"),
        ({"reward_weights": [1.0, 2.0]}, "one number for each of 1 rewards"),
        ({"reward": "nowhere.check"}, "no module 'nowhere'"),
        ({"advantage": GRPO()}, "num_answers must be at least 2 with GRPO, got 1"),
        ({"update_epochs": 0}, "update_epochs must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_k": 0}, "model needs top_k of at least 1"),
        ({"min_p": 1.5}, r"min_p in \[0, 1\], got None and 1.5"),
        ({"stop": ["a", ""]}, "model.stop must be texts of at least one character"),
        ({"value_clip": 0.0}, "value_clip must be positive or left out"),
        ({"entropy_coef": -1.0}, "entropy_coef must be at least 0"),
        ({"value_lr": 0.0}, "value_lr must be positive or left out"),
        ({"advantage": GRPO(), "num_answers": 2, "value_model": "x"}, "GRPO has no use for values"),
        ({"value_model": "x", "value_detached": True}, "value_detached is for a value head"),
        ({"value_peft": LoRA()}, "model.value_model, which is missing"),
    ],
)
def test_settings_out_of_range(options, says):
    with pytest.raises(ConfigError, match=says):
        PPO(policy=tiny_lm(), **{"reward": odd, **options})


def test_settings_that_do_not_go_together(rows):
    with pytest.raises(ConfigError, match="num_minibatches is 9, but a rollout has 6 prompts"):
        train(rows, num_minibatches=9)
    for family, limit in (("llama", 512), ("gpt2", 512)):
        with pytest.raises(
            ConfigError, match=f"longest prompt has 34 tokens and the model takes {limit} .* at most 475"
        ):
            train(rows, PromptTuning(3), lm=tiny_lm(family, vocab_size=259), max_new_tokens=476)
    stage = SFT(policy=tiny_lm())
    stage.tokenizer = tiny_tokenizer()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=1, **quiet)
    with pytest.raises(ConfigError, match="goes with PPO, not with SFT"):
        trainer.fit(stage, PromptData(train=rows))


# ---- what a user gives ----------------------------------------------------------------------------------------------


def test_as_many_answers_are_kept_as_is_said(rows):
    _, _, runner = train(rows, steps=8, callbacks=[RolloutSamples(rows=2)])
    assert sum(isinstance(one, RolloutSamples) for one in runner.callbacks) == 1
    kept = [json.loads(line) for line in Path(rows).with_name("rollouts.jsonl").read_text().splitlines()]
    assert Counter(one["step"] for one in kept) == {0: 2, 4: 2}


def test_a_reward_that_draws_says_something_else_in_every_rollout_and_the_same_in_the_same_run(rows):
    said = []

    def noise(prompts, completions, **columns):
        said.append([random.random() + np.random.rand() + float(torch.rand(())) for _ in completions])
        return said[-1]

    for _ in range(2):
        random.seed(len(said))
        train(rows, steps=8, reward=noise)
    assert said[:2] == said[2:]
    assert not set(said[0]) & set(said[1])


@pytest.mark.parametrize("spoil", [lambda answers: answers[1:], lambda answers: [*answers[:-1], Answer([], False)]])
def test_a_generator_that_brings_something_else_is_refused(rows, spoil):
    class Spoilt(BatchedGenerator):
        def __call__(self, *args, **kwargs):
            return spoil(super().__call__(*args, **kwargs))

    with pytest.raises(ConfigError, match="Spoilt brought"):
        train(rows, generator=Spoilt())


def test_the_weight_of_the_penalty_that_is_logged_is_the_one_that_counts(rows):
    kl = KLPenalty(0.2, "loss", "k3", target=1e-6, rate=1.0)
    stage, record, _ = train(rows, steps=8, advantage=GRPO(), num_answers=3, kl=kl, dtype=torch.float64)
    assert record.steps[0]["objective/kl_coef"] == 0.2
    assert record.steps[-1]["objective/kl_coef"] != stage.rollouts.kl_coef  # the next rollout's
    batch = record.batches[-1].micro_batches[0]
    with torch.no_grad():
        scores = stage.policy(batch, **stage.scoring(batch))
        first = stage.micro_loss(batch, scores).loss
        stage.rollouts.kl_coef *= 100
        assert stage.micro_loss(batch, scores).loss == first
        stage.rollouts.metrics["objective/kl_coef"] *= 100
        assert stage.micro_loss(batch, scores).loss > first


def test_a_reward_model_reads_texts_as_they_are(tmp_path):
    """A prompt without a template gets none in the reward model either; other rewards see turns everywhere."""
    path, seen = tmp_path / "rows.jsonl", {}
    path.write_text("".join(json.dumps({"prompt": f"{n} + 2 ="}) + "\n" for n in range(6)))

    class Model(Verifier):
        reads_plain = True

        def __call__(self, prompts, completions, **columns):
            seen["model"] = (list(prompts), list(completions))
            return odd(prompts, completions)

    def check(prompts, completions, **columns):
        seen["check"] = (list(prompts), list(completions))
        return odd(prompts, completions)

    train(str(path), steps=4, reward=[Model(), check])
    (texts, answers), (turns, stripped) = seen["model"], seen["check"]
    assert sorted(texts) == [f"{n} + 2 =" for n in range(6)]
    assert [[{"role": "user", "content": text}] for text in texts] == turns
    assert [answer.strip() for answer in answers] == stripped
    assert RewardScorer.reads_plain
