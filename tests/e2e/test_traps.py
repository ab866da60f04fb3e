"""Places where Lightning or transformers silently do something else than one thinks; here they do not."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from ftlit.testing import tiny_lm, tiny_tokenizer

from .test_run import state


def test_the_command_line_wins_over_what_a_checkpoint_remembers(ftlit, fit_args):
    assert ftlit(*fit_args, "--run", "r", "--trainer.max_steps", "2") == 0
    args = ["fit", "--config", "r/config.yaml", "--ckpt_path", "last", "--trainer.max_steps", "3"]
    assert ftlit(*args, "--model.peft.rank", "8") == 1  # and not: rank 4, silently
    assert "does not fit this model and strategy" in ftlit.err
    assert "[4, 16]" in ftlit.err
    assert "[8, 16]" in ftlit.err


def test_a_checkpoint_in_bfloat16_is_trained_in_float32(ftlit, rows, tmp_path):
    tiny_lm(dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    args = ["fit", "--config", "sft", "--config", "peft/full", "--config", "trainer/cpu", "--model.policy", "half"]
    assert ftlit(*args, "--data.train", rows, "--model.lr", "1e-5", "--trainer.max_steps", "3", "--run", "r") == 0
    first = dict(tiny_lm(dtype=torch.bfloat16).named_parameters())
    moved = total = 0
    for name, tensor in state("r").items():
        assert tensor.dtype == torch.float32
        before = first[name.removeprefix("policy.lm.")].float()
        if tensor.ndim == 2:
            moved += (tensor != before).sum().item()
            total += tensor.numel()
    assert moved > 0.6 * total  # tokens that never occur have no gradient


def test_another_optimizer_does_not_inherit_the_settings_of_the_first(ftlit, fit_args):
    pytest.importorskip("bitsandbytes")  # has optimizers of the same names
    args = [*fit_args, "--trainer.max_steps", "1", "--run", "r", "--model.weight_decay", "0.1"]
    assert ftlit(*args, "--model.optimizer", "SGD", "--model.optimizer.lr", "0.5") == 0
    (group, *_) = torch.load("r/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == 0.5
    assert "betas" not in group
    settings = yaml.safe_load(Path("r/config.yaml").read_text())["model"]["init_args"]["optimizer"]["init_args"]
    assert settings["weight_decay"] in (0, 0.0)


def test_checkpoints_hold_plain_tensors_and_numbers_only(ftlit, fit_args):
    assert ftlit(*fit_args, "--trainer.max_steps", "2", "--run", "r") == 0
    for name in ("last", "best"):
        checkpoint = torch.load(f"r/checkpoints/{name}.ckpt", weights_only=True)  # refuses anything else
        assert all("lora_" in key for key in checkpoint["state_dict"])
        assert "hyper_parameters" not in checkpoint
    assert Path("r/checkpoints/last.ckpt").stat().st_size < 200_000


def test_every_epoch_has_an_order_of_its_own_also_after_going_on(ftlit, fit_args):
    Path("watch.py").write_text(
        "import json, lightning as L\n"
        "class Watch(L.Callback):\n"
        "    def on_train_batch_start(self, trainer, stage, batch, i):\n"
        "        seen = [e for micro in batch.micro_batches for e in micro.examples]\n"
        "        print(json.dumps({'seen': [trainer.global_step, trainer.current_epoch, *seen]}))\n"
    )
    args = [*fit_args, "--trainer.callbacks+=watch.Watch", "--trainer.max_epochs", "3"]
    seen = lambda: [json.loads(line)["seen"] for line in ftlit.out.splitlines() if line.startswith('{"seen"')]  # noqa: E731
    assert ftlit(*args, "--run", "whole") == 0
    whole = seen()
    epochs = [[e for step in whole[3 * i : 3 * i + 3] for e in step[2:]] for i in range(3)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    for stop in ("3", "4"):
        assert ftlit(*args, "--run", f"cut{stop}", "--trainer.max_steps", stop) == 0
        assert ftlit(*args, "--run", f"cut{stop}", "--ckpt_path", "last") == 0
        assert seen() == whole[int(stop) :]


def test_changed_rows_are_noticed_when_a_run_goes_on(ftlit, fit_args, rows):
    assert ftlit(*fit_args, "--run", "r", "--trainer.max_steps", "2") == 0
    text = Path(rows).read_text()
    Path(rows).write_text(text.replace("of course", "certainly"))
    assert ftlit(*fit_args, "--run", "r", "--trainer.max_steps", "3", "--ckpt_path", "last") == 0
    assert "not those of the checkpoint" in ftlit.out


def test_a_run_without_a_checkpoint_yet_starts_from_its_beginning(ftlit, fit_args):
    assert ftlit(*fit_args, "--run", "r", "--ckpt_path", "last", "--trainer.max_steps", "1") == 1
    assert "there is no" in ftlit.err
    assert ftlit(*fit_args, "--run", "r", "--trainer.max_steps", "1", "--trainer.enable_checkpointing", "false") == 0
    assert ftlit(*fit_args, "--run", "r", "--trainer.max_steps", "1", "--ckpt_path", "last") == 0
    assert "has no checkpoint yet" in ftlit.out
