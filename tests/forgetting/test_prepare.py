"""Controls are prepared for every fit, whatever was done with the model, the data or the controls before."""

import logging

import lightning as L
import pytest
import torch

from ftlit.data.store import measure
from ftlit.forgetting import EWC, EarlyStopOnForgetting, L2ToInit, Replay, TokenSelection
from ftlit.peft import LoRA
from ftlit.stages import SFT
from ftlit.testing import tiny_lm, tiny_tokenizer
from ftlit.testing.control_suite import TinyData
from tests.forgetting.test_early_stop import Probe
from tests.stages.test_step import Record, assert_same


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def stage(seed=0):
    made = SFT(tiny_lm("llama", torch.float64, seed), LoRA(rank=3), lr=1e-2, warmup=0)
    made.tokenizer = tiny_tokenizer()
    return made


def trainer(*callbacks, steps=3):
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, precision="64-true",
        enable_model_summary=False, max_steps=steps, max_epochs=-1, callbacks=list(callbacks), num_sanity_val_steps=0,
    )  # fmt: skip


def fit(module, *callbacks, data=None, steps=3):
    record = Record()
    trainer(*callbacks, record, steps=steps).fit(module, data or TinyData())
    return record.steps


def shown(steps):
    return [{key: value for key, value in step.items() if "per_s" not in key} for step in steps]


CONTROLS = {
    "Replay": lambda: Replay("general", ratio=0.6, weight=5.0),
    "EWC": lambda: EWC("general", weight=100.0),
    "L2ToInit": lambda: L2ToInit("coupled", strength=1.0, rows="general"),
    "TokenSelection": lambda: TokenSelection(share=0.3),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_model_that_is_there_already_is_prepared_too(name):
    """As after `trainer.validate(stage, data)`, or a call of `configure_model`."""
    torch.manual_seed(0)
    fresh = stage()
    expected = fit(fresh, CONTROLS[name]())
    torch.manual_seed(0)
    built = stage()
    built.configure_model()
    found = fit(built, CONTROLS[name]())
    assert shown(found) == shown(expected)
    assert_same(built, fresh, 0.0)


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_that_is_used_again_belongs_to_the_new_run(name):
    control = CONTROLS[name]()
    fit(stage(), control)
    torch.manual_seed(0)
    again, anew = stage(seed=1), stage(seed=1)
    found = fit(again, control)
    torch.manual_seed(0)
    expected = fit(anew, CONTROLS[name]())
    assert [step["train/loss"] for step in found] == pytest.approx([step["train/loss"] for step in expected], abs=1e-6)


def test_rows_that_an_earlier_run_added_are_gone():
    data = TinyData()
    fit(stage(), Replay("general", ratio=0.6), data=data)
    assert data.added_rows
    fit(stage(), data=data)
    assert not data.added_rows


def test_rows_are_weighted_once_on_the_same_data():
    data, control = TinyData(), TokenSelection(share=0.3)
    fit(stage(), control, data=data)
    before = measure(data.sets["train"]).targets.tolist()
    fit(stage(), control, data=data)
    assert measure(data.sets["train"]).targets.tolist() == before


def test_a_stop_belongs_to_its_run():
    """A second run with the same callbacks stops by itself."""
    probe, stop = Probe(), EarlyStopOnForgetting(max_increase=1e-9)
    for _ in range(2):
        steps = fit(stage(), probe, stop, steps=20)
        assert len(steps) < 20
