from types import SimpleNamespace

import pytest
from lightning.pytorch.strategies import DDPStrategy

from ftlit.data.templating import ChatTemplate
from ftlit.errors import ConfigError
from ftlit.forgetting import ForgettingProbe
from ftlit.models.policy import Policy
from ftlit.peft import Full, LoRA
from ftlit.stages.fsdp import FSDP2
from ftlit.testing import tiny_lm, tiny_tokenizer


@pytest.mark.parametrize(
    ("strategy", "peft", "refused"), [(FSDP2, Full, True), (FSDP2, LoRA, False), (DDPStrategy, Full, False)]
)
def test_the_start_of_a_sharded_model_that_is_trained_whole_cannot_be_had(strategy, peft, refused):
    policy = Policy(tiny_lm(), peft())
    data = SimpleNamespace(template=ChatTemplate(tiny_tokenizer()))
    stage = SimpleNamespace(
        policy=policy, strategy=policy.strategy, trainer=SimpleNamespace(strategy=strategy(), datamodule=data)
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
