"""Every stage beside SFT x every strategy x every control: it holds the model, or says in one sentence why it cannot.

SFT, with every strategy, is the subject of the conformance suite.
"""

import json
import math

import lightning as L
import pytest
import torch

from ftlit.data.added import AddedRows
from ftlit.data.classification import ClassificationData
from ftlit.data.preferences import PreferenceData
from ftlit.errors import ConfigError
from ftlit.forgetting import (
    EWC,
    EarlyStopOnForgetting,
    ForgettingBudget,
    ForgettingProbe,
    Interpolate,
    L2ToInit,
    Replay,
    SampleWeighting,
    TargetKL,
    TokenSelection,
)  # fmt: skip
from ftlit.forgetting.documents import Documents
from ftlit.forgetting.pull import add_gradient
from ftlit.models.policy import Policy
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.stages import Classification, RewardModel
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


class GivenReplay(Replay):
    """Of rows made in code."""

    def added_rows(self, stage):
        self._added = AddedRows(self.name, tiny_examples(GENERAL, vocabulary=200, seed=7), self.ratio, self.seed)
        return self._added


class GivenProbe(ForgettingProbe):
    """On documents made in code, which need no chat template."""

    def refuse(self, stage):
        return None if isinstance(stage.policy, Policy) else super().refuse(stage)

    def _documents(self, stage, data, rows, name):
        self._words[name] = "made in code"
        return Documents(tiny_examples(GENERAL * 2, vocabulary=200, seed=9))


class GivenBudget(ForgettingBudget):
    """On documents made in code."""

    def _documents(self, stage, rows):
        return tuple(Documents(tiny_examples(GENERAL * 2, vocabulary=200, seed=seed)) for seed in (11, 12))


CONTROLS = {
    "Replay": lambda: GivenReplay(ratio=5.0, weight=50.0),
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
MEASURED = {
    "ForgettingProbe": lambda: [GivenProbe(every_n_steps=1)],
    "EarlyStopOnForgetting": lambda: [GivenProbe(every_n_steps=1), EarlyStopOnForgetting(max_increase=1e-6)],
    "ForgettingBudget": lambda: [GivenProbe(), GivenReplay(), GivenBudget(1e-6, documents=14, steering_documents=7)],
}
OF_WEIGHTS = {"Interpolate", "L2ToInit", "coupled L2ToInit", "EWC"}
NOT_WITH = {
    "DPO": {"TokenSelection", "SampleWeighting"},
    "PPO": {"TokenSelection", "SampleWeighting", "TargetKL"},
    "Classification": {"Replay", "TokenSelection", "SampleWeighting", "TargetKL", "EWC"},
    "RewardModel": {"Replay", "TokenSelection", "SampleWeighting", "TargetKL", "EWC"},
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
    rows = [{"text": f"text number {number}", "label": "odd" if number % 2 else "even"} for number in range(12)]
    return with_a_head(Classification, ClassificationData, rows, strategy, control, tmp_path)


def reward(strategy, control, tmp_path):
    rows = [{"prompt": f"Say {number}", "chosen": "yes" * number, "rejected": "no"} for number in range(1, 13)]
    return with_a_head(RewardModel, PreferenceData, rows, strategy, control, tmp_path)


def with_a_head(kind, data, rows, strategy, control, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    torch.manual_seed(0)
    stage = kind(tiny_lm("llama", torch.float64), strategy, lr=1e-2, warmup=0, schedule="constant")
    stage.tokenizer = tiny_tokenizer()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, precision="64-true",
        enable_model_summary=False, max_steps=3, max_epochs=-1, callbacks=control, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(stage, data(str(path), batch_size=4, cache=False))
    return stage


STAGES = {"DPO": dpo, "PPO": ppo, "Classification": classification, "RewardModel": reward}


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
            if name in ("Classification", "RewardModel"):  # its head has no start worth going back to
                trained = [p for n, p in plain.policy.lm.named_parameters() if n.startswith("score")]
                ours = [p for n, p in held.policy.lm.named_parameters() if n.startswith("score")]
                assert trained
                assert all(torch.equal(mine, other) for mine, other in zip(ours, trained, strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("kind", MEASURED)
def test_every_cell_is_measured_or_refused(kind, name, strategy, tmp_path):
    callbacks = MEASURED[kind]()
    if name in ("Classification", "RewardModel"):
        with pytest.raises(
            ConfigError, match=r"cannot be used here: .*(without next tokens|no output layer over tokens).*\.$"
        ):
            STAGES[name](STRATEGIES[strategy](), callbacks, tmp_path)
        return
    stage = STAGES[name](STRATEGIES[strategy](), callbacks, tmp_path)
    values = callbacks[0].last_values
    change = values["forgetting/worst/change"]
    assert change == pytest.approx(values["forgetting/general/change"])
    virtual = strategy in ("PrefixTuning", "PromptTuning")
    if kind == "ForgettingProbe":
        assert change != 0
    elif kind == "EarlyStopOnForgetting":  # the last state within the limit: the start, if nothing else was
        assert math.isfinite(change) if virtual else change <= 1e-5
    else:
        budget = callbacks[2]
        if virtual:  # there is nothing between a prefix and none
            assert budget.outcome["alpha"] == 1
        else:
            ((name_of, first),) = budget._meters["first"].measure(stage.trainer, stage).items()
            assert budget._bound(name_of, first) <= budget.limit + 1e-9
        assert math.isfinite(budget.outcome["verdict"])


def test_a_head_of_its_own_is_not_pulled(tmp_path):
    """It was drawn at random: the start is no place to go back to."""
    stage = classification(Full(), [L2ToInit(weight=0.0)], tmp_path)
    stage.zero_grad()
    add_gradient(stage, lambda change: change.sq_norm(), 1.0)
    for name, parameter in stage.policy.lm.named_parameters():
        assert (parameter.grad is None) == name.startswith("score."), name
