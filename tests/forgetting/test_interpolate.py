"""Interpolate: what is saved, validated and exported is exactly alpha of the way from the start."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ftlit.errors import ConfigError
from ftlit.forgetting import Interpolate
from ftlit.forgetting.interpolate import depth
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.peft.io import save_adapter
from ftlit.testing import tiny_examples, tiny_lm
from tests.e2e.ranks_worker import train
from tests.e2e.test_ranks import on_two_ranks
from tests.forgetting.runs import changes, held_out_loss, run
from tests.forgetting.test_replay import losses
from tests.stages.test_step import LENGTHS, assert_same

STRATEGIES = {
    "Full": Full,
    "LoRA": lambda: LoRA(rank=3, alpha=5),
    "everything": lambda: LoRA(
        rank=3, target_modules=["q_proj", "down_proj", "embed_tokens"], modules_to_save=["norm"], bias="lora_only"
    ),
}


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
def test_after_the_last_step_every_change_is_alpha_of_what_it_was(make):
    plain, _, _ = run(make(), control=Interpolate(alpha=1.0), family="qwen2")
    moved, _, runner = run(make(), control=Interpolate(alpha=0.3), family="qwen2")
    first, second = changes(plain), changes(moved)
    assert first.keys() == second.keys()
    for name, change in first.items():
        assert change.abs().max() > 0
        torch.testing.assert_close(second[name], 0.3 * change, rtol=1e-9, atol=1e-12)
    assert runner.callback_metrics["val/loss"].item() == pytest.approx(held_out_loss(moved), abs=1e-6)


def test_the_share_grows_with_depth():
    """LiNeS: embeddings and first layer, last layer, and what lies behind it."""
    plain, _, _ = run(Full(), control=Interpolate(alpha=1.0), family="llama_untied")
    moved, _, _ = run(Full(), control=Interpolate(alpha=0.2, last_alpha=0.9), family="llama_untied")
    first, second = changes(plain), changes(moved)
    for name, change in first.items():
        shallow = "embed_tokens" in name or ".layers.0." in name
        torch.testing.assert_close(second[name], (0.2 if shallow else 0.9) * change, rtol=1e-9, atol=1e-12)
    names = [f"model.layers.{number}.mlp.up_proj.lora_B" for number in range(5)]
    assert [depth(name, 5) for name in names] == [0, 0.25, 0.5, 0.75, 1]
    assert depth("model.norm.weight", 5) == depth("lm_head.weight", 5) == 1
    assert depth("transformer.wpe.weight", 5) == depth("transformer.h.0.attn.weight", 1) == 0


def test_every_two_steps_is_what_a_loop_does():
    """Plain transformers and AdamW, with the weights set back after steps 2, 4 and 6."""
    stage, options = {"warmup": 0, "schedule": "constant"}, {"gradient_clip_val": None}
    moved, _, _ = run(Full(), control=Interpolate(alpha=0.4, every_n_steps=2), stage=stage, trainer=options)
    torch.manual_seed(0)
    lm = tiny_lm("llama", torch.float64)
    start = copy.deepcopy(lm)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2, weight_decay=0.0)
    rows = tiny_examples(LENGTHS)
    for step in range(1, 7):
        first = 8 * ((step - 1) % 3)
        optimizer.zero_grad()
        torch.cat([losses(lm, row)[0] for row in rows[first : first + 8]]).mean().backward()
        optimizer.step()
        if step % 2 == 0:
            with torch.no_grad():
                for weight, origin in zip(lm.parameters(), start.parameters(), strict=True):
                    weight.copy_(origin + 0.4 * (weight - origin))
    assert_same(moved.policy.lm, lm, 1e-8)


@pytest.mark.parametrize("make", [Full, LoRA], ids=lambda m: m.__name__)
def test_the_last_checkpoint_is_the_moved_one_and_is_not_moved_again(make, tmp_path):
    moved, _, _ = run(make(), control=Interpolate(alpha=0.3), folder=tmp_path)
    ckpt = tmp_path / "checkpoints/last.ckpt"
    saved = torch.load(ckpt, weights_only=True)["state_dict"]
    now = dict(moved.named_parameters())
    assert saved
    for name, tensor in saved.items():
        assert torch.equal(tensor, now[name])
    again, _, _ = run(make(), control=Interpolate(alpha=0.3), folder=tmp_path, ckpt=str(ckpt))
    assert_same(again, moved, 0.0)


@pytest.mark.parametrize("every", [None, 2])
def test_a_run_that_went_on_ends_the_same(every, tmp_path):
    def control():
        return Interpolate(alpha=0.3, every_n_steps=every)

    class StopsAfterFour(L.Callback):
        def on_train_batch_end(self, trainer, stage, outputs, batch, batch_idx):
            if trainer.global_step == 4:
                trainer._signal_connector.received_sigterm = True

    whole, _, _ = run(Full(), control=control())
    with pytest.raises(SIGTERMException):
        run(Full(), control=control(), callbacks=[StopsAfterFour()], folder=tmp_path)
    went_on, _, _ = run(Full(), control=control(), folder=tmp_path, ckpt=str(tmp_path / "checkpoints/last.ckpt"))
    assert_same(went_on, whole, 0.0)


def test_a_run_that_is_stopped_early_is_moved_and_validated_again(tmp_path):
    class Stops(L.Callback):
        def on_validation_end(self, trainer, stage):
            trainer.should_stop = True

    class Sees(L.Callback):
        def __init__(self):
            self.losses = []

        def on_validation_end(self, trainer, stage):
            self.losses.append(trainer.callback_metrics["val/loss"].item())

    sees = Sees()
    moved, _, runner = run(Full(), control=Interpolate(alpha=0.3), callbacks=[Stops(), sees], folder=tmp_path)
    assert runner.global_step == 3
    assert len(sees.losses) == 2
    assert sees.losses[1] == pytest.approx(held_out_loss(moved), abs=1e-6)
    assert sees.losses[1] != pytest.approx(sees.losses[0], abs=1e-4)
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, tensor in saved.items():
        assert torch.equal(tensor, dict(moved.named_parameters())[name])


@pytest.mark.parametrize("make", [Full, LoRA], ids=lambda m: m.__name__)
def test_weight_zero_is_no_control_at_all(make):
    plain, _, _ = run(make())
    none, _, _ = run(make(), control=Interpolate(alpha=0.1, weight=0.0))
    assert_same(none, plain, 0.0)


def test_what_cannot_stand_between_is_refused(tmp_path):
    for strategy in (PrefixTuning(3), PromptTuning(3)):
        with pytest.raises(ConfigError, match="changes no weight"):
            run(strategy, control=Interpolate())
    module, _, _ = run(LoRA(rank=3))
    save_adapter(module.strategy, module.policy.lm, tmp_path, "base")
    with pytest.raises(ConfigError, match="goes on from another adapter"):
        run(LoRA(rank=3, from_adapter=str(tmp_path)), control=Interpolate())
    for settings in ({"alpha": 1.5}, {"last_alpha": -0.1}, {"every_n_steps": 0}, {"weight": -1.0}):
        with pytest.raises(ConfigError, match="Interpolate"):
            Interpolate(**settings)


def test_sharded_weights_are_moved_too(tmp_path):
    jobs = [{"method": method, "alpha": 0.3} for method in ("Full", "LoRA")]
    results = on_two_ranks([{**job, "strategy": "fsdp", "batch_size": 4} for job in jobs], tmp_path)
    for result, job in zip(results, jobs, strict=True):
        for name, tensor in train(**job)["weights"].items():
            torch.testing.assert_close(result["weights"][name], tensor, rtol=0, atol=2e-6)
