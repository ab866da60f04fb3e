"""EarlyStopOnForgetting: the run ends with the last weights that a probe found within the limit."""

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ftlit.batch import Example, pack
from ftlit.errors import ConfigError
from ftlit.forgetting import EarlyStopOnForgetting, ForgettingProbe, Interpolate
from ftlit.forgetting.documents import Documents
from ftlit.peft import Full, LoRA, PrefixTuning
from ftlit.testing import tiny_examples, tiny_lm
from tests.forgetting.runs import run
from tests.forgetting.test_replay import GENERAL
from tests.stages.test_step import assert_same


def _own_words():
    """What the start model itself finds likeliest: training on other rows can only make it less likely."""
    lm, rows = tiny_lm("llama", torch.float64), []
    for row in tiny_examples(GENERAL, seed=7):
        ids = list(row.input_ids[:2])
        for _ in range(6):
            ids.append(int(lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        rows.append(Example(ids, [0.0] * 2 + [1.0] * 6))
    return rows


GENERAL_ROWS = _own_words()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))


class Probe(ForgettingProbe):
    """On documents made in code."""

    def __init__(self, **arguments):
        super().__init__(**{"every_n_steps": 1, "kl": False, **arguments})

    def refuse(self, stage):
        return None  # needs no chat template

    def _target(self, stage, data):
        return None

    def _documents(self, stage, data, rows, name):
        self._words[name] = "made in code"
        return Documents(GENERAL_ROWS)


def test_a_probe_that_measures_at_the_end_only_is_too_late():
    probe = Probe(every_n_steps=None, at_validations=False)
    with pytest.raises(ConfigError, match="probe measures at the end only, which is too late to stop"):
        run(LoRA(rank=3), callbacks=[probe, EarlyStopOnForgetting()])


class Weights(L.Callback):
    """Keeps the trained weights after each step."""

    def __init__(self):
        self.after = {}

    def on_train_start(self, trainer, stage):
        self.on_train_batch_end(trainer, stage, None, None, 0)

    def on_train_batch_end(self, trainer, stage, outputs, batch, batch_idx):
        self.after[trainer.global_step] = {n: p.detach().clone() for n, p in stage.named_parameters()}


def nll(module):
    with torch.no_grad():
        return -torch.cat([module.policy(pack([row])).logps for row in GENERAL_ROWS]).mean().item()


def losses_by_step(make):
    """What a run without a limit has lost after each step, nats a token."""
    probe = Probe()
    changes = {}
    probe.listeners.append(
        lambda trainer, stage: changes.update({trainer.global_step: probe.last_values["forgetting/worst/change"]})
    )
    run(make(), control=probe)
    return changes


@pytest.mark.parametrize("first", ["probe", "stop"])
@pytest.mark.parametrize("make", [Full, lambda: LoRA(rank=3), lambda: PrefixTuning(3)], ids=["Full", "LoRA", "Prefix"])
def test_the_last_weights_within_the_limit_are_put_back(make, first, tmp_path, capsys):
    changes = losses_by_step(make)
    # A limit that is exceeded first by the step that is worse than all before it.
    late = max(step for step in changes if changes[step] > max([0.0, *(changes[i] for i in range(1, step))]))
    limit = (changes[late] + max([0.0, *(changes[i] for i in range(1, late))])) / 2
    kept = late - 1
    weights, probe = Weights(), Probe()
    stop = EarlyStopOnForgetting(max_increase=math.expm1(limit))
    both = [probe, stop] if first == "probe" else [stop, probe]
    capsys.readouterr()
    module, record, runner = run(make(), callbacks=[*both, weights], folder=tmp_path)
    assert runner.global_step == late
    assert f"stopped after step {late}" in capsys.readouterr().out
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, weights.after[kept][name])
    assert probe.last_values["forgetting/general/nll"] == pytest.approx(nll(module), abs=1e-9)
    assert kept == 0 or probe.last_values["forgetting/worst/change"] <= limit
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, tensor in saved.items():
        assert torch.equal(tensor, dict(module.named_parameters())[name])
    assert len(record.steps) == late


def test_within_the_limit_nothing_happens():
    plain, _, _ = run(Full())
    module, record, _ = run(Full(), callbacks=[Probe(), EarlyStopOnForgetting(max_increase=1e6)])
    assert_same(module, plain, 0.0)
    assert len(record.steps) == 6


def test_what_was_kept_survives_a_stop(tmp_path):
    """Kept at step 2, stopped at step 3, gone on, over the limit at step 4: the weights of step 2 are put back."""

    class Says(Probe):
        def _round(self, trainer, stage):
            self.listeners, listeners = [], self.listeners
            values = super()._round(trainer, stage)
            self.listeners = listeners
            change = {1: 0.0, 2: 0.0, 3: None, 4: 1.0}.get(trainer.global_step, 1.0)
            if change is not None:
                self.last_values["forgetting/worst/change"] = change
                for listener in listeners:
                    listener(trainer, stage)
            return values

    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, stage, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                trainer._signal_connector.received_sigterm = True

    weights = Weights()
    with pytest.raises(SIGTERMException):
        run(Full(), callbacks=[Says(), EarlyStopOnForgetting(), weights, Stops()], folder=tmp_path)
    ckpt = str(tmp_path / "checkpoints/last.ckpt")
    module, _, runner = run(Full(), callbacks=[Says(), EarlyStopOnForgetting()], folder=tmp_path, ckpt=ckpt)
    assert runner.global_step == 4
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, weights.after[2][name])


@pytest.mark.parametrize("first", [True, False])
def test_what_is_put_back_is_then_moved_to_the_start(first):
    """In whatever order the two stand."""

    class Late(Probe):
        worst_change = property(lambda self: float(self._last_step > 2))

    weights, stop, half = Weights(), EarlyStopOnForgetting(), Interpolate(alpha=0.5)
    module, _, runner = run(Full(), callbacks=[Late(), *([stop, half] if first else [half, stop]), weights])
    assert stop.stopped_at == runner.global_step == 3
    for name, parameter in module.named_parameters():
        middle = (weights.after[0][name] + weights.after[2][name]) / 2
        torch.testing.assert_close(parameter, middle, rtol=0, atol=1e-12)


def test_what_it_cannot_do_is_refused_in_a_sentence():
    assert [type(one) for one in EarlyStopOnForgetting.default_controls([EarlyStopOnForgetting()])] == [ForgettingProbe]
    assert not EarlyStopOnForgetting.default_controls([EarlyStopOnForgetting(), Probe()])
    with pytest.raises(ConfigError, match="ForgettingProbe called"):
        run(Full(), callbacks=[Probe(), EarlyStopOnForgetting(probe="other")])
    with pytest.raises(ConfigError, match="name exactly one"):
        run(Full(), callbacks=[Probe(), Probe(name="second"), EarlyStopOnForgetting()])
    with pytest.raises(ConfigError, match="must be positive"):
        EarlyStopOnForgetting(max_increase=0)
