"""Precisions: what is loaded in which type, and steps under half precision and a gradient scaler."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from ftlit.errors import ConfigError
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning, SelectiveStrategy
from ftlit.stages import SFT
from ftlit.stages.fsdp import FSDP2
from ftlit.stages.precision import check_strategy, decided, note_slow, set_precision
from ftlit.testing import tiny_examples, tiny_lm

from .test_step import LENGTHS, Data, Record


def fit(precision=None, *, scale=None, strategy=None, steps=4, batch_size=8, accumulate=1, callbacks=(), lr=0.05):
    torch.manual_seed(0)
    stage = SFT(policy=tiny_lm(), peft=strategy or LoRA(rank=3), lr=lr, warmup=0, schedule="constant")
    record = Record()
    half = {"plugins": MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))}
    runner = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=-1,
        enable_model_summary=False, max_steps=steps, gradient_clip_val=0.5, callbacks=[record, *callbacks],
        accumulate_grad_batches=accumulate, **(half if scale else {"precision": precision}),
    )  # fmt: skip
    runner.fit(stage, Data(tiny_examples(LENGTHS), batch_size=batch_size))
    return stage, record, runner


@pytest.mark.parametrize("make", [LoRA, Full, PrefixTuning])
@pytest.mark.parametrize(
    ("precision", "frozen", "trained"),
    [
        ("32-true", torch.float32, torch.float32), ("64-true", torch.float64, torch.float64),
        ("bf16-mixed", torch.bfloat16, torch.float32), ("16-mixed", torch.float16, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16), ("16-true", torch.float16, torch.float16),
    ],
)  # fmt: skip
def test_the_precision_decides_the_type_whatever_the_checkpoint_holds(tmp_path, make, precision, frozen, trained):
    tiny_lm(dtype=torch.bfloat16).save_pretrained(tmp_path)
    stage = SFT(policy=str(tmp_path), peft=make())
    state = type("State", (), {"fn": "validate"})()
    options = {"precision": precision, "strategy": None, "ckpt_path": None, "state": state}
    stage._trainer = type("Trainer", (), options)()
    stage.configure_model()
    assert stage.policy.training
    for parameter in stage.policy.parameters():
        # Lightning casts the few trained weights too under `-true`; weights that are trained in full stay wide.
        wide = trained if isinstance(stage.strategy, Full) else torch.promote_types(frozen, torch.float32)
        assert parameter.dtype == (wide if parameter.requires_grad else frozen)


@pytest.mark.parametrize(
    "settings", [{"precision": "bf16-mixed"}, {"precision": "bf16-true"}, {"scale": 256.0}], ids=str
)
@pytest.mark.parametrize("make", [LoRA, Full])
def test_half_precision_follows_float32(settings, make):
    # A rate at which a difference of rounding is not blown up by the next step.
    _, reference, _ = fit("32-true", strategy=make(), lr=0.01)
    _, record, _ = fit(**settings, strategy=make(), lr=0.01)
    for ours, theirs in zip(record.steps, reference.steps, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=3e-2)
        assert ours["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=0.2)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(
    "make", [Full, LoRA, PrefixTuning, PromptTuning, lambda: LoRA(modules_to_save=["embed_tokens", "lm_head"])]
)
def test_many_small_steps_follow_float32(make, precision):
    """At a rate whose steps bfloat16 weights would round away: trained tensors and both moments are in float32."""
    stage, record, runner = fit(precision, strategy=make(), steps=30, lr=1e-5)
    whole, reference, _ = fit("32-true", strategy=make(), steps=30, lr=1e-5)
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    states = runner.optimizers[0].state.values()
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert {state[key].dtype for state in states for key in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    assert record.steps[-1]["train/loss"] == pytest.approx(reference.steps[-1]["train/loss"], rel=3e-2)
    torch.manual_seed(0)
    ours, theirs = (torch.cat([p.detach().flatten() for p in one.parameters() if p.requires_grad])
                    for one in (stage, whole))  # fmt: skip
    first = torch.cat([p.detach().flatten() for p in started(make()).parameters() if p.requires_grad])
    moved, wanted = ours - first, theirs - first
    assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.9
    assert moved.norm() == pytest.approx(wanted.norm().item(), rel=0.1)


def started(strategy):
    """The policy that `fit` begins with."""
    torch.manual_seed(0)
    stage = SFT(policy=tiny_lm(), peft=strategy)
    stage.configure_model()
    return stage


def test_float16_weights_are_not_trained():
    with pytest.raises(ConfigError, match=r"16-true rounds small gradients .* use 16-mixed"):
        fit("16-true", steps=1)


@pytest.mark.parametrize(
    "name", ["deepspeed", "deepspeed_stage_2", "fsdp_cpu_offload", "lightning.pytorch.strategies.FSDPStrategy",
             "lightning.pytorch.strategies.DeepSpeedStrategy", "pytorch_lightning.strategies.ModelParallelStrategy"],
)  # fmt: skip
def test_what_shards_in_another_way_is_refused_by_name(name):
    with pytest.raises(ConfigError, match="--config trainer/fsdp"):
        check_strategy(name)


@pytest.mark.parametrize("make", [FSDPStrategy, ModelParallelStrategy])
def test_what_shards_in_another_way_is_refused_in_python(make):
    with pytest.raises(ConfigError, match=f"{make.__name__} is not supported"):
        check_strategy(make())


@pytest.mark.parametrize("name", ["auto", "ddp", "ddp_spawn", "fsdp", "ftlit.stages.fsdp.FSDP2"])
def test_what_is_known_is_not_refused(name):
    check_strategy(name)
    check_strategy(FSDP2())


def test_a_gpu_computes_in_half_precision_and_a_cpu_does_not(monkeypatch):
    assert decided(torch.device("cpu")) == "32-true"
    for has, wanted in ((True, "bf16-mixed"), (False, "16-mixed")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert decided(torch.device("cuda")) == wanted


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "16-mixed"])
def test_a_precision_that_is_set_is_the_one_that_is_said(precision):
    runner = L.Trainer(accelerator="cpu", logger=False)
    set_precision(runner, precision)
    assert runner.precision == precision


@pytest.mark.parametrize(
    ("device", "precision", "decides", "says"),
    [("cuda", "32-true", False, True), ("mps", "32-true", False, True), ("cpu", "32-true", False, False),
     ("cuda", "bf16-mixed", False, False), ("cuda", "64-true", False, False), ("cuda", "32-true", True, False)],
)  # fmt: skip
def test_a_gpu_that_trains_in_float32_unasked_is_said(capsys, monkeypatch, device, precision, decides, says):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    where = SimpleNamespace(root_device=torch.device(device))
    note_slow(SimpleNamespace(strategy=where, precision=precision, decides_precision=decides))
    assert ('L.Trainer(precision="bf16-mixed")' in capsys.readouterr().out) is says


def test_an_evaluation_computes_as_training_did():
    """`bf16-true` holds trained weights in float32 there too."""
    stage = SFT(policy=tiny_lm(), peft=LoRA(rank=3))
    runner = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, precision="bf16-true")
    stage._trainer, runner.state.fn = runner, "validate"
    stage.setup("validate")
    stage.configure_model()
    assert runner.precision == "bf16-mixed"
    assert {p.dtype for p in stage.parameters() if p.requires_grad} == {torch.float32}


class Norms(SelectiveStrategy):
    """Trains the norms of the model alone."""

    def apply(self, model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("make", [LoRA, Full, Norms, PrefixTuning, lambda: LoRA(modules_to_save=["embed_tokens"])])
def test_a_model_built_in_half_precision_trains(precision, make):
    torch.manual_seed(0)
    stage = SFT(policy=tiny_lm(dtype=torch.bfloat16), peft=make(), lr=0.01)
    runner = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, precision=precision,
        enable_model_summary=False, max_steps=2, max_epochs=-1,
    )  # fmt: skip
    runner.fit(stage, Data(tiny_examples(LENGTHS), batch_size=8))
    assert {p.dtype for p in stage.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("settings", [{"precision": "bf16-mixed"}, {"scale": 256.0}], ids=str)
def test_how_a_step_is_cut_does_not_matter_in_half_precision(settings):
    """Every micro-batch is differentiated outside of autocast, the last one by Lightning, the others by ftlit."""
    seen = []

    class Watch(L.Callback):
        def on_before_backward(self, trainer, stage, loss):
            seen.append(torch.is_autocast_enabled("cpu"))

    _, whole, _ = fit(**settings, steps=1)
    _, cut, _ = fit(**settings, steps=1, batch_size=2, accumulate=4, callbacks=[Watch()])
    assert seen == [False] * 4
    for name, grad in whole.grads[0].items():
        torch.testing.assert_close(cut.grads[0][name], grad, rtol=5e-2, atol=2e-3)


def test_a_scaler_passes_over_steps_that_overflow():
    """The step is skipped, the scale halved, the run goes on; clipping sees unscaled gradients."""
    _, record, runner = fit(scale=2.0**40, steps=30)
    assert runner.global_step == 30
    norms = [step["train/grad_norm"] for step in record.steps]
    skipped = sum(not torch.isfinite(torch.tensor(norm)) for norm in norms)
    assert 5 < skipped < 30
    assert runner.precision_plugin.scaler.get_scale() == 2.0 ** (40 - skipped)
    _, plain, _ = fit("32-true", steps=30 - skipped)
    assert norms[skipped] == pytest.approx(plain.steps[0]["train/grad_norm"], rel=0.1)
    assert record.steps[-1]["train/loss"] == pytest.approx(plain.steps[-1]["train/loss"], rel=0.1)


def test_the_fused_step_is_used_where_it_is_right():
    _, _, runner = fit("32-true", steps=1)
    assert runner.optimizers[0].defaults["fused"]
    _, _, runner = fit(scale=256.0, steps=1)
    assert not runner.optimizers[0].defaults["fused"]


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched():
    class Poison(L.Callback):
        def on_after_backward(self, trainer, stage):
            next(p for p in stage.parameters() if p.grad is not None).grad[0] = float("inf")

    torch.manual_seed(0)
    with pytest.raises(FloatingPointError, match=r"gradient norm of optimizer step 1 is inf .*training example 1"):
        fit("32-true", callbacks=[Poison()])
