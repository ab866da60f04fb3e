"""PPO, GRPO and RLOO learn what is rewarded; with the wrong sign, ratio or mask they do not."""

import json

import lightning as L
import pytest
import torch

from ftlit.data.prompts import PromptData
from ftlit.objectives.advantages import GAE, GRPO, RLOO
from ftlit.objectives.kl import KLPenalty
from ftlit.objectives.policy_gradient import DAPO, GSPO
from ftlit.peft import Full
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


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_what_is_rewarded(tmp_path, kind):
    rows = tmp_path / "rows.jsonl"
    with rows.open("w") as file:
        for number in range(40):
            file.write(json.dumps({"messages": [{"role": "user", "content": f"Say {number}"}]}) + "\n")
    torch.manual_seed(0)
    stage = PPO(
        policy=tiny_lm("llama", vocab_size=259), peft=Full(), reward=some_letters, max_new_tokens=8, lr=1e-2,
        schedule="constant", warmup=0, update_epochs=2, num_minibatches=2, kl=KLPenalty(0.001), **KINDS[kind],
    )  # fmt: skip
    stage.tokenizer = tiny_tokenizer()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=72, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, num_sanity_val_steps=-1,
        val_check_interval=1000, check_val_every_n_epoch=None, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(stage, PromptData(train=str(rows), validation=0.2, batch_size=16))
    before, after = stage.start_metrics["val/reward"], stage.last_metrics["val/reward"]
    print(kind, before, after)
    assert before < 0.2
    assert after > 0.7
