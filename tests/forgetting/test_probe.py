from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from ftlit.batch import Example
from ftlit.data.templating import ChatTemplate
from ftlit.errors import ConfigError
from ftlit.forgetting import ForgettingProbe
from ftlit.forgetting.documents import Documents
from ftlit.models.policy import Policy
from ftlit.peft import Full, LoRA
from ftlit.stages import SFT
from ftlit.stages.fsdp import FSDP2
from ftlit.testing import tiny_lm, tiny_tokenizer
from ftlit.testing.control_suite import TinyData
from tests.forgetting.runs import run
from tests.forgetting.test_early_stop import GENERAL_ROWS, Probe


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("strategy", "peft", "refused"), [(FSDP2, Full, True), (FSDP2, LoRA, False), (DDPStrategy, Full, False)]
)
def test_the_start_of_a_sharded_model_that_is_trained_whole_cannot_be_had(strategy, peft, refused):
    policy = Policy(tiny_lm(), peft())
    data = SimpleNamespace(template=ChatTemplate(tiny_tokenizer()))
    stage = SimpleNamespace(
        policy=policy,
        strategy=policy.strategy,
        trainer=SimpleNamespace(strategy=strategy(), datamodule=data),
        controls=[],
    )
    reason = ForgettingProbe().refuse(stage)
    assert (reason is not None) == refused
    if refused:
        assert reason.endswith("use ddp.")
    stage.trainer.datamodule = None
    assert "no chat template" in ForgettingProbe().refuse(stage)
    stage.policy = tiny_lm()
    assert "without next tokens" in ForgettingProbe().refuse(stage)


def test_it_says_what_it_does():
    probe = ForgettingProbe({"code": "code.jsonl"}, at_steps=[5, 2], every_n_steps=50)
    probe._words = {"code": "7 of 9 documents, 100 scored tokens"}
    assert probe.describe() == (
        "forgetting_probe: code (code.jsonl): 7 of 9 documents, 100 scored tokens; measured at steps 2, 5, every 50 "
        "steps, at validations and at the end"
    )


def test_it_is_no_term_of_the_loss():
    probe = ForgettingProbe()
    assert probe.weight == 0
    assert not probe.in_loss


@pytest.mark.parametrize("domain", ["target", "worst", "weights", "a/b", ""])
def test_names_that_are_taken(domain):
    with pytest.raises(ConfigError, match="cannot call a domain"):
        ForgettingProbe({domain: "rows.jsonl"})


class Few(Probe):
    """Other documents than those of the first probe."""

    def _documents(self, stage, data, rows, name):
        self._words[name] = "made in code"
        return Documents(GENERAL_ROWS[:3])


class Logged(L.Callback):
    def on_validation_end(self, trainer, stage):
        self.values = {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_two_probes_do_not_mix_their_numbers():
    first, second = Probe(every_n_steps=None), Few(domains={"few": "made in code"}, every_n_steps=None, name="large")
    logged = Logged()
    run(LoRA(rank=3), callbacks=[first, second, logged])
    assert first.worst_change != second.worst_change
    assert logged.values["forgetting/worst/change"] == pytest.approx(first.measured["general"].change, abs=1e-6)
    assert logged.values["forgetting/large_worst/change"] == pytest.approx(second.measured["few"].change, abs=1e-6)
    assert "forgetting/worst/change" not in second.last_values
    assert "forgetting/weights/change" not in second.last_values
    assert "another probe measures 'general' too" in ForgettingProbe.refuse(first, _with(first, Few(name="large")))


def _with(*probes):
    """A stage as a probe sees it that asks whether it can be used."""
    data = SimpleNamespace(template=ChatTemplate(tiny_tokenizer()))
    policy = Policy(tiny_lm(), LoRA())
    trainer = SimpleNamespace(strategy=DDPStrategy(), datamodule=data)
    return SimpleNamespace(policy=policy, strategy=policy.strategy, trainer=trainer, controls=list(probes))


def test_a_probe_that_joins_a_run_that_goes_on_knows_where_it_started(tmp_path):
    def three(callbacks, ckpt=None, epochs=1):
        run(LoRA(rank=3), callbacks=callbacks, folder=tmp_path, ckpt=ckpt, trainer={"max_epochs": epochs})

    three([])
    late, always = Probe(), Probe()
    three([late], ckpt=tmp_path / "checkpoints/last.ckpt", epochs=2)
    run(LoRA(rank=3), callbacks=[always])
    assert late.start_values == always.start_values
    assert late.rounds == 3


@pytest.mark.parametrize("make", [Full, lambda: LoRA(rank=3)], ids=["Full", "LoRA"])
def test_in_half_precision_nothing_is_forgotten_before_anything_is_learnt(make):
    """The start is scored before Lightning casts the model, whose positions must stay what they were."""
    text = torch.randint(3, 300, (6, 120), generator=torch.Generator().manual_seed(0)).tolist()

    class Long(Probe):
        def _documents(self, stage, data, rows, name):
            self._words[name] = "made in code"
            return Documents([Example(ids, [0.0] + [1.0] * 119) for ids in text])

    probe = Long(kl=True)
    stage = SFT(tiny_lm(dtype=torch.bfloat16), make(), lr=1e-12, warmup=0)
    stage.tokenizer = tiny_tokenizer()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=1,
        enable_model_summary=False, max_epochs=-1, precision="bf16-true", callbacks=[probe],
    )  # fmt: skip
    trainer.fit(stage, TinyData())
    found = probe.measured["general"]
    assert found.nll == found.start_nll
    assert found.agreement == 1
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert all(buffer.dtype == torch.float32 for buffer in stage.policy.lm.buffers())
