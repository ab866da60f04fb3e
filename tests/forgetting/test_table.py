"""Every stage beside SFT x every strategy x every control: it holds the model, or says in one sentence why it cannot.

SFT, with every strategy, is the subject of the conformance suite.
"""

import json

import lightning as L
import pytest
import torch

from ftlit.data.classification import ClassificationData
from ftlit.errors import ConfigError
from ftlit.forgetting import EWC, Interpolate, L2ToInit, SampleWeighting, TargetKL, TokenSelection
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.stages import Classification
from ftlit.testing import tiny_examples, tiny_lm, tiny_tokenizer
from tests.forgetting.test_replay import GENERAL
from tests.stages import test_dpo, test_ppo


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))


class GivenEWC(EWC):
    """On rows made in code."""

    def examples(self, stage):
        return tiny_examples(GENERAL, vocabulary=200, seed=7)


CONTROLS = {
    "Interpolate": lambda: Interpolate(alpha=0.0),
    "L2ToInit": lambda: L2ToInit(half_life=1, weight=20),
    "coupled L2ToInit": lambda: L2ToInit("coupled", strength=10.0),
    "EWC": lambda: GivenEWC(weight=100.0),
    "TargetKL": lambda: TargetKL(weight=10.0),
    "TokenSelection": TokenSelection,
    "SampleWeighting": SampleWeighting,
}
STRATEGIES = {
    "Full": Full,
    "LoRA": lambda: LoRA(rank=3),
    "PrefixTuning": lambda: PrefixTuning(3),
    "PromptTuning": lambda: PromptTuning(3),
}
OF_WEIGHTS = {"Interpolate", "L2ToInit", "coupled L2ToInit", "EWC"}
NOT_WITH = {
    "DPO": {"TokenSelection", "SampleWeighting"},
    "PPO": {"TokenSelection", "SampleWeighting", "TargetKL"},
    "Classification": {"TokenSelection", "SampleWeighting", "TargetKL", "EWC"},
}


def dpo(strategy, control, tmp_path):
    return test_dpo.fit(strategy, trainer={"max_epochs": 1, "callbacks": control})[0]


def ppo(strategy, control, tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"Say {number}"}]} for number in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    options = {"num_minibatches": 1, "update_epochs": 2, "num_answers": 1}
    return test_ppo.train(str(path), strategy, steps=4, dtype=torch.float64, callbacks=control, **options)[0]


def classification(strategy, control, tmp_path):
    path = tmp_path / "labels.jsonl"
    rows = [{"text": f"text number {number}", "label": "odd" if number % 2 else "even"} for number in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    torch.manual_seed(0)
    stage = Classification(tiny_lm("llama", torch.float64), strategy, lr=1e-2, warmup=0, schedule="constant")
    stage.tokenizer = tiny_tokenizer()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, precision="64-true",
        enable_model_summary=False, max_steps=3, max_epochs=-1, callbacks=control, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(stage, ClassificationData(str(path), batch_size=4, cache=False))
    return stage


STAGES = {"DPO": dpo, "PPO": ppo, "Classification": classification}


def size(stage):
    """Norm of the changes, without those of a head of its own."""
    head = tuple(getattr(stage.policy, "head", ()))
    changes = stage.strategy.changes(stage.policy.lm)
    squares = [one.sq_norm() for one in changes if not one.name.startswith(head or "?")]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", STAGES)
def test_every_cell_holds_the_model_or_is_refused(name, strategy, tmp_path):
    plain = None
    for control, make in CONTROLS.items():
        virtual = strategy in ("PrefixTuning", "PromptTuning")
        if control in NOT_WITH[name] or (control in OF_WEIGHTS and virtual):
            with pytest.raises(ConfigError) as error:
                STAGES[name](STRATEGIES[strategy](), [make()], tmp_path)
            text = str(error.value)
            assert text.endswith(".")
            assert "\n" not in text
            assert "cannot be used here: " in text
            continue
        held = STAGES[name](STRATEGIES[strategy](), [make()], tmp_path)
        assert all(torch.isfinite(parameter).all() for parameter in held.parameters())
        if plain is None:  # remembers its start: a control of weight 0
            plain = STAGES[name](STRATEGIES[strategy](), [L2ToInit(weight=0.0)] if not virtual else [], tmp_path)
        if virtual:
            pairs = zip(held.parameters(), plain.parameters(), strict=True)
            assert any(not torch.equal(ours, theirs) for ours, theirs in pairs)
        else:
            assert size(held) < 0.99 * size(plain), control
        if control == "Interpolate":
            assert size(held) == 0
            if name == "Classification":  # its head has no start worth going back to
                trained = [p for n, p in plain.policy.lm.named_parameters() if n.startswith("score")]
                ours = [p for n, p in held.policy.lm.named_parameters() if n.startswith("score")]
                assert trained
                assert all(torch.equal(mine, other) for mine, other in zip(ours, trained, strict=True))
