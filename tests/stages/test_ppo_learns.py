"""PPO, GRPO and RLOO learn what is rewarded; with the wrong sign, ratio or mask they do not."""

import json

import lightning as L
import pytest
import torch

from ftlit.data.prompts import PromptData
from ftlit.models.value import ValueHead
from ftlit.objectives.advantages import GAE, GRPO, RLOO
from ftlit.objectives.kl import KLPenalty
from ftlit.objectives.policy_gradient import DAPO, GSPO
from ftlit.peft import Full
from ftlit.rollout.experience import Experience
from ftlit.stages import PPO
from ftlit.testing import tiny_lm, tiny_tokenizer

KINDS = {
    "gae": {"advantage": GAE(), "num_answers": 4, "value_lr": 0.03},
    "grpo": {"advantage": GRPO(), "loss": DAPO(), "num_answers": 4},
    "rloo": {"advantage": RLOO(), "loss": GSPO(0.2, 0.2, length_normalized=False), "num_answers": 4},
}


def some_letters(prompts, completions, **columns):
    """The share of an answer's eight tokens that are one of sixteen letters, of 259 tokens."""
    return [sum(character in "abcdefghijklmnop" for character in text) / 8 for text in completions]


def turned_around(stage, monkeypatch):
    """Advantages of the wrong sign."""
    right = stage.advantage.__class__.__call__

    def wrong(self, *args):
        found = right(self, *args)
        return found._replace(advantages=-found.advantages)

    monkeypatch.setattr(type(stage.advantage), "__call__", wrong)


def upside_down(stage, monkeypatch):
    """The ratio of old to new."""
    right = stage.policy_loss.__class__.__call__
    monkeypatch.setattr(
        type(stage.policy_loss),
        "__call__",
        lambda self, logps, old, advantages, owners: right(self, old, logps, advantages, owners),
    )


def on_prompts(stage, monkeypatch):
    """A mask that lets tokens of the prompt learn, in the place of the answer's."""
    right = Experience.pack

    def wrong(self, micro):
        packed = right(self, micro)
        where = packed.target_positions % len(self.prompts[0])
        return packed.replace(target_positions=where, target_ids=packed.input_ids[0, where + 1])

    monkeypatch.setattr(Experience, "pack", wrong)


def trained(folder, contents, steps, spoil=None, trainer=None, data=None, **options):
    """A stage that has learned on prompts."""
    rows = folder / "rows.jsonl"
    with rows.open("w") as file:
        for content in contents:
            file.write(json.dumps({"messages": [{"role": "user", "content": content}]}) + "\n")
    torch.manual_seed(0)
    stage = PPO(
        policy=tiny_lm("llama", vocab_size=259), peft=Full(), max_new_tokens=8, lr=1e-2, schedule="constant", warmup=0,
        update_epochs=2, num_minibatches=2, **options,
    )  # fmt: skip
    stage.tokenizer = tiny_tokenizer()
    if spoil is not None:
        spoil(stage)
    runner = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, default_root_dir=folder,
        **(trainer or {}),
    )  # fmt: skip
    runner.fit(stage, PromptData(train=str(rows), batch_size=16, **(data or {})))
    return stage


def held_out_reward(folder, kind, spoil=None):
    """What held-out prompts are worth before and after training."""
    often = {"num_sanity_val_steps": -1, "val_check_interval": 1000, "check_val_every_n_epoch": None}
    stage = trained(
        folder, [f"Say {number}" for number in range(40)], 72, spoil, often, {"validation": 0.2}, reward=some_letters,
        kl=KLPenalty(0.001), **KINDS[kind],
    )  # fmt: skip
    return stage.start_metrics["val/reward"], stage.last_metrics["val/reward"]


def explained(folder):
    """The share of the returns' variance that values explain, where prompts differ in what they are worth."""

    def as_asked(prompts, completions, **columns):
        return [float(turns[0]["content"].startswith("Good")) for turns in prompts]

    contents = [f"{'Good' if number % 2 else 'Bad'} {number}" for number in range(40)]
    options = {"value_lr": 0.03, "value_coef": 1.0, "value_clip": None}
    stage = trained(folder, contents, 60, reward=as_asked, advantage=GAE(), **options)
    return stage.step_metrics["val/explained_variance"]


def test_values_learn_what_a_prompt_is_worth(tmp_path, monkeypatch):
    right = explained(tmp_path)
    print(right)
    assert right > 0.5
    values = ValueHead.forward
    monkeypatch.setattr(ValueHead, "forward", lambda *args: values(*args).flip(0))  # those of other answers
    spoilt = explained(tmp_path)
    print(spoilt)
    assert spoilt < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_is_rewarded(tmp_path, kind):
    before, after = held_out_reward(tmp_path, kind)
    print(kind, before, after)
    assert before < 0.2
    assert after > 0.7


@pytest.mark.parametrize(
    ("kind", "spoil"), [(kind, spoil) for kind in KINDS for spoil in (turned_around, upside_down, on_prompts)]
)
def test_spoilt_it_does_not_learn(tmp_path, monkeypatch, kind, spoil):
    """So that the test above can fail."""
    _, after = held_out_reward(tmp_path, kind, lambda stage: spoil(stage, monkeypatch))
    print(kind, spoil.__name__, after)
    assert after < 0.4
