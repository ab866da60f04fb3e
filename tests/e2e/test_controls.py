"""Every overlay of a control runs by the command, says what it does, and its numbers reach the CSV."""

import csv

import pytest
import torch

OVERLAYS = {
    "interpolate": ([], "interpolate: after the last step 50% of the change", set()),
    "l2_to_init": ([], "l2_to_init: half of the change is taken back in 25% of the run", {"distance"}),
    "ewc": (["rows=sample:general", "num_rows=5"], "ewc: Fisher matrix of 5 rows of sample:general", {"loss"}),
    "target_kl": ([], "target_kl: KL to the start on the trained tokens, temperature 2", {"loss"}),
    "token_selection": ([], "token_selection: ", set()),
    "sample_weighting": ([], "sample_weighting: 9 examples count by their loss", set()),
    "early_stop": ([], "early_stop_on_forgetting: stops when the perplexity", set()),
}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_runs(overlay, ftlit, fit_args, tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))
    settings, said, logged = OVERLAYS[overlay]
    more = [f"--trainer.callbacks.{setting}" for setting in settings]
    args = [*fit_args, "--config", f"forgetting/{overlay}", *more, "--run", "run", "--trainer.max_steps", "4"]
    assert ftlit(*args) == 0, ftlit.err
    assert f"control    {said}" in ftlit.out
    rows = list(csv.DictReader((tmp_path / "run/metrics.csv").open()))
    for key in logged:
        assert any(row.get(f"forgetting/{overlay}/{key}") for row in rows), rows[0].keys()
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 4 or overlay == "early_stop"


def test_a_stop_listens_to_the_probe_of_the_run(ftlit, fit_args, tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))
    probe = ["--config", "forgetting/probe", "--trainer.callbacks.domains={own: self}"]
    probe += ["--trainer.callbacks.own_rows=32", "--trainer.callbacks.own_new_tokens=4"]
    stop = ["--config", "forgetting/early_stop", "--trainer.callbacks.max_increase=1e-6"]
    args = [*fit_args, *probe, *stop, "--run", "run", "--trainer.max_steps", "20", "--model.lr", "0.05"]
    assert ftlit(*args) == 0, ftlit.err
    assert "measured at steps 2, 5, 10, at validations and at the end" in ftlit.out
    assert "are put back" in ftlit.out


def test_a_refusal_is_one_sentence(ftlit, fit_args):
    args = [*fit_args, "--config", "peft/prefix_tuning", "--config", "forgetting/interpolate", "--run", "run"]
    args = [one for one in args if one not in ("peft/lora", "--model.peft.rank", "4")]
    place = args.index("--config", args.index("trainer/cpu"))
    del args[place]  # the --config of peft/lora
    assert ftlit(*args) == 1
    assert "Interpolate cannot be used here: PrefixTuning changes no weight" in ftlit.err
    assert "Traceback" not in ftlit.err
