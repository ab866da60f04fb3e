"""PPO beside the formula: where a run starts, in which precision, what it logs, and how it goes on."""

import json
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from ftlit.callbacks import RolloutSamples
from ftlit.callbacks.forgetting_report import NLL, _learnt, notes
from ftlit.data.prompts import PromptData
from ftlit.errors import ConfigError
from ftlit.export import scorer as scorer_module
from ftlit.export.scorer import RewardScorer
from ftlit.forgetting import ForgettingProbe
from ftlit.models.policy import Policy, disable_dropout
from ftlit.objectives.advantages import GRPO
from ftlit.objectives.kl import KLPenalty
from ftlit.objectives.policy_gradient import GSPO, PPOClip
from ftlit.peft import Full, LoRA
from ftlit.peft.io import save_adapter
from ftlit.rollout.loader import RolloutLoader
from ftlit.rollout.rewards import RewardShaping
from ftlit.stages.rollouts import dealt
from ftlit.testing import tiny_tokenizer
from ftlit.testing.tiny import tiny_classifier
from tests.stages.test_ppo import odd, rows, train  # noqa: F401


@pytest.mark.parametrize("strategy", [Full, lambda: LoRA(rank=3)])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_first_ratio_is_one_in_half_precision(rows, strategy, precision):  # noqa: F811
    """Scoring and update take one path, under autocast too; and the reference stays the start."""
    options = {"num_minibatches": 1, "update_epochs": 2, "lr": 3e-2, "trainer": {"precision": precision}}
    stage, record, _ = train(rows, strategy(), **options)
    assert {parameter.dtype for parameter in stage.critic.parameters()} == {torch.float32}
    assert [step["val/ratio"] for step in record.steps[::2]] == [1.0] * 4
    assert all(step["policy/approxkl"] == 0 for step in record.steps[::2])
    assert record.steps[0]["objective/kl"] == 0
    assert all(step["objective/kl"] != 0 for step in record.steps[2::2])


def test_the_first_ratio_is_one_where_rare_tokens_are_not_drawn(rows):  # noqa: F811
    _, record, _ = train(rows, top_p=0.5, num_minibatches=1, update_epochs=2)
    assert record.steps[0]["val/ratio"] == record.steps[2]["val/ratio"] == 1.0
    assert record.steps[0]["objective/kl"] == 0
    drawn, free = (
        {token for answer in run[1].found[0].answers for token in answer}
        for run in (train(rows, steps=1, top_p=0.05), train(rows, steps=1))
    )
    assert len(drawn) < len(free)


def test_the_reference_is_the_adapter_that_the_run_started_with(rows, tmp_path):  # noqa: F811
    """Not the model beneath it: after steps too."""
    first, _, _ = train(rows, LoRA(rank=3), steps=8, lr=5e-2)
    save_adapter(first.strategy, first.policy.lm, tmp_path / "adapter", "base")
    stage, record, _ = train(rows, LoRA(rank=3, from_adapter=str(tmp_path / "adapter")), steps=8, lr=5e-2)
    assert record.steps[0]["objective/kl"] == 0
    assert record.steps[4]["objective/kl"] != 0
    last = record.batches[-1].micro_batches[0]
    with torch.no_grad():
        of_start = first.policy(last).logps
        of_now = stage.policy(last).logps
    torch.testing.assert_close(last.extras["reference"], of_start, rtol=0, atol=1e-5)
    assert (last.extras["reference"] - of_now).abs().max() > 1e-3


class Values(L.Callback):
    """What the value head says of each rollout before it learns from it."""

    def __init__(self):
        self.said = []

    def on_train_batch_start(self, trainer, stage, batch, batch_idx):
        if trainer.global_step % 2 == 0:
            with torch.no_grad():
                micro = batch.micro_batches[0]
                self.said.append(stage.critic(micro, stage.policy(micro, needs=frozenset({"states"}))))


def test_values_are_clipped_around_what_they_were(rows):  # noqa: F811
    values = Values()
    options = {"num_minibatches": 1, "update_epochs": 2, "callbacks": [values], "dtype": torch.float64}
    _, record, _ = train(rows, value_clip=1e-4, lr=5e-2, **options)
    for said, batch in zip(values.said, record.batches[::2], strict=True):
        torch.testing.assert_close(batch.micro_batches[0].extras["values"], said, rtol=0, atol=1e-12)
    assert [step["val/clipfrac"] > 0 for step in record.steps] == [False, True] * 4
    for found, step in zip(record.found[::2], record.steps[::2], strict=True):
        left = found.tokens["returns"] - found.tokens["values"]
        expected = 1 - left.var() / found.tokens["returns"].var()
        assert step["val/explained_variance"] == pytest.approx(float(expected), abs=1e-9)
    assert record.steps[-1]["val/explained_variance"] != 0


class Rates(L.Callback):
    """The learning rate of each step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, stage, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_a_schedule_counts_steps_that_were_taken(rows):  # noqa: F811
    """Also where an update is cut short."""
    free, cut = Rates(), Rates()
    options = {"steps": 8, "lr": 0.05, "schedule": "linear", "warmup": 2}
    train(rows, callbacks=[free], **options)
    _, record, _ = train(rows, callbacks=[cut], target_kl=1e-3, **options)
    assert record.found[-1].number > 1
    assert free.seen == cut.seen
    assert free.seen == pytest.approx([0.05 * f for f in (1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])


def test_a_stage_that_is_trained_again_begins_anew(rows):  # noqa: F811
    shaping, kl = RewardShaping(whiten=True), KLPenalty(0.1, target=1e-6, rate=1.0)
    stage, first, runner = train(rows, steps=4, shaping=shaping, kl=kl)
    assert stage.rollouts.kl_coef != 0.1
    again = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=4,
        max_epochs=-1, enable_model_summary=False, callbacks=[type(first)()], default_root_dir=runner.default_root_dir,
    )  # fmt: skip
    again.fit(stage, PromptData(train=rows, batch_size=6))
    second = again.callbacks[0]
    assert second.steps[0]["objective/kl_coef"] == 0.1
    assert second.found[0].rows == first.found[0].rows
    assert stage.rewards.running.count == len(second.found[0].answers)


def test_the_probe_measures_prompts_without_answers(rows, tmp_path, monkeypatch):  # noqa: F811
    """By what the start model says to them."""
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))
    bare = tmp_path / "bare.jsonl"
    bare.write_text("".join(json.dumps({"prompt": f"Say {number}"}) + "\n" for number in range(12)))
    probe = ForgettingProbe({"own": "self"}, own_rows=8, own_new_tokens=4, max_tokens=400, every_n_steps=4)
    _, _, runner = train(str(bare), data={"validation": 0.5}, callbacks=[probe], steps=8, lr=5e-2)
    documents = probe._meter.sets["target"].examples
    prompts = [row.input_ids for row in runner.datamodule.rows["validation:main"]]
    assert len(documents) == 6
    for document, prompt in zip(documents, prompts, strict=True):
        assert document.input_ids[: len(prompt)] == prompt
        assert document.num_targets == len(document.input_ids) - len(prompt) <= 5
    assert probe.last_values["forgetting/target/kl"] > 0
    assert "forgetting/target/change" not in probe.last_values  # nothing is learnt of them
    assert "forgetting/own/change" in probe.last_values
    assert probe.start_values["forgetting/target/kl"] == 0
    assert any(line.startswith("target     on its held-out prompts") for line in notes(probe, 1.0))
    learnt, words = _learnt({"val/reward": [(0, 0.5), (4, 0.75)]}, NLL)
    assert (learnt, words) == ({0: 0.0, 4: 0.25}, "reward of the held-out prompts rose by")


def test_a_reward_model_reads_its_system_turn_and_the_tools(tmp_path, monkeypatch):
    tiny_classifier("llama", labels=1).save_pretrained(tmp_path / "rm")
    template = (
        "{% for tool in tools or [] %}{{ tool['function']['name'] }}|{% endfor %}"
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
    )
    tiny_tokenizer(template).save_pretrained(tmp_path / "rm")
    turns, tools = [[{"role": "user", "content": "hi"}]] * 2, [[{"name": "look"}], None]
    scorer = RewardScorer(str(tmp_path / "rm"))
    bare = scorer(turns, ["a", "a"])
    assert bare[0] == bare[1]
    known = scorer(turns, ["a", "a"], tools=tools)
    assert known[0] != bare[0]
    assert scorer(turns, ["a", "a"], tools=[json.dumps(tools[0]), "[]"]) == known
    assert scorer(turns, ["a", "a"], tools=["hammer", ["saw"]]) == bare
    assert known[1] == pytest.approx(bare[1], abs=1e-6)
    opening = scorer_module.open_classifier
    monkeypatch.setattr(  # as a run with data.system is opened
        scorer_module, "open_classifier", lambda *args, **more: opening(*args, **more)._replace(system="be kind")
    )
    scorer = RewardScorer(str(tmp_path / "rm"))
    asked = [[{"role": "system", "content": "be kind"}, *turns[0]]]
    assert scorer(turns[:1], ["a"]) == pytest.approx(scorer(asked, ["a"]), abs=1e-6)
    assert scorer(turns[:1], ["a"])[0] != bare[0]


def test_rewards_compare_answers_with_references_alike(tmp_path):
    """Both as they are, with the space before them."""
    path, seen = tmp_path / "rows.jsonl", {}
    path.write_text("".join(json.dumps({"prompt": f"{n} + 2 =", "completion": f" {n + 2}"}) + "\n" for n in range(6)))

    def check(prompts, completions, reference, **columns):
        seen["reference"] = list(reference)
        return odd(prompts, completions)

    train(str(path), steps=1, reward=check)
    assert sorted(seen["reference"]) == sorted(f" {n + 2}" for n in range(6))


class Seen:
    """A trainer with another logger."""

    def __init__(self, trainer, logger):
        self.trainer, self.loggers = trainer, [logger]

    def __getattr__(self, name):
        return getattr(self.trainer, name)


class Tables:
    """A logger that takes tables."""

    def __init__(self):
        self.tables = []

    def log_table(self, key, columns, data, step):
        self.tables.append((key, columns, data, step))


def test_a_rollout_and_a_validation_have_tables_of_their_own(rows, monkeypatch):  # noqa: F811
    logger, known = Tables(), RolloutSamples._keep
    monkeypatch.setattr(RolloutSamples, "_keep", lambda self, trainer, stage: known(self, Seen(trainer, logger), stage))
    more = {"val_check_interval": 1, "check_val_every_n_epoch": None}
    data = {"validation": 0.25}
    train(rows, steps=1, reward=[odd, lambda completions: [0.5 for _ in completions]], data=data, trainer=more,
          callbacks=[RolloutSamples(4)])  # fmt: skip
    assert [(key, len(rows), step) for key, _, rows, step in logger.tables] == [
        ("rollouts/main", 4, 0),
        ("rollouts/train", 4, 1),
        ("rollouts/main", 4, 1),
    ]
    for _, columns, data, _ in logger.tables:
        assert columns[:4] == ["step", "set", "prompt", "answer"]
        assert len(columns) == len(data[0]) == 9
        assert sum(name.startswith("reward/") for name in columns) == 2


@pytest.mark.parametrize("loss", [GSPO(0.2, 0.2, length_normalized=False), PPOClip()])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_ratios_do_not_overflow(loss, advantage):
    logps = torch.zeros(50, requires_grad=True)
    out = loss(logps, torch.full((50,), -200.0), torch.full((50,), advantage), torch.zeros(50, dtype=torch.int64))
    out.loss.sum().backward()
    assert torch.isfinite(out.loss).all()
    assert torch.equal(logps.grad, torch.zeros(50))


def test_every_dropout_is_switched_off():
    """Whatever a model calls it."""
    config = Starcoder2Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, residual_dropout=0.5, embedding_dropout=0.5, attention_dropout=0.5,
        attn_implementation="eager",
    )  # fmt: skip
    lm = Starcoder2ForCausalLM(config)
    policy = Policy(lm, Full()).train()
    ids = torch.arange(8)[None]
    assert not torch.equal(lm(ids, use_cache=False).logits, lm(ids, use_cache=False).logits)
    assert disable_dropout(policy)
    assert torch.equal(lm(ids, use_cache=False).logits, lm(ids, use_cache=False).logits)
    assert not disable_dropout(policy)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 17))
def test_prompts_are_dealt_evenly(world, parts, prompts):
    cut = [list(range(prompts))[m::parts] for m in range(parts)]
    shares = [dealt(cut, rank, world) for rank in range(world)]
    for number, part in enumerate(cut):
        assert sorted(one for share in shares for one in share[number]) == part
    sizes = [sum(map(len, share)) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_run_that_begins_a_rollout_knows_what_was_trained():
    loader = RolloutLoader(lambda number: None, lambda: 6, 4, 2, first=3, before=70)
    assert loader.trained == 70
    assert loader.next == 3


def test_a_checkpoint_of_another_stage_is_refused(rows):  # noqa: F811
    stage, _, runner = train(rows, steps=1, advantage=GRPO(), num_answers=2)
    checkpoint = runner._checkpoint_connector.dump_checkpoint()
    stage.on_load_checkpoint(checkpoint)
    del checkpoint["ppo"]
    with pytest.raises(ConfigError, match="not of PPO"):
        stage.on_load_checkpoint(checkpoint)


def test_the_weight_of_the_penalty_is_what_is_given_unless_it_is_steered(rows):  # noqa: F811
    for target in (None, 5.0):
        stage, _, runner = train(rows, steps=1, kl=KLPenalty(0.1, target=target))
        checkpoint = runner._checkpoint_connector.dump_checkpoint()
        assert checkpoint["ppo"]["steered"] == (target is not None)
        for steered in (False, True):
            checkpoint["ppo"] |= {"kl_coef": 0.1, "steered": steered}
            stage.rollouts.kl_coef = 0.2
            stage.on_load_checkpoint(checkpoint)
            assert stage.rollouts.kl_coef == (0.1 if steered and target else 0.2)


def test_a_run_between_two_rollouts_goes_on_there(rows):  # noqa: F811
    """As after another number of ranks, before the first rollout is drawn."""
    stage, _, runner = train(rows, steps=4)
    stage.loader.experience, stage.loader.next, stage.loader._before = None, 3, 70
    checkpoint = runner._checkpoint_connector.dump_checkpoint()
    assert stage.loader.state_dict() == {"rollout": 2}
    stage.on_load_checkpoint(checkpoint)
    assert stage._resumed == (None, 3, 70)
    stage.loader = None
    assert stage.rollout_loader().trained == 70


def test_the_answers_of_all_ranks_are_kept_in_the_order_of_the_rows(tmp_path):
    ranks = [[{"set": "main", "row": row} for row in range(rank, 5, 2)] for rank in range(2)]
    ranks[0].append({"set": "other", "row": 0})
    rollouts = SimpleNamespace(samples=ranks[0], gather=lambda mine: ranks)
    trainer = SimpleNamespace(
        is_global_zero=True, default_root_dir=str(tmp_path), state=SimpleNamespace(fn=SimpleNamespace(value="test"))
    )
    RolloutSamples()._write_all(trainer, SimpleNamespace(rollouts=rollouts))
    kept = [json.loads(line) for line in (tmp_path / "test-answers.jsonl").read_text().splitlines()]
    assert [(one["set"], one["row"]) for one in kept] == [*(("main", row) for row in range(5)), ("other", 0)]
