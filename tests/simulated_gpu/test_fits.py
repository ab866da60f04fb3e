"""Every stage, strategy and control on a simulated GPU, under bf16-mixed and inside of Lightning's device context."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._device import _device_constructors

from ftlit.batch import Example, pack
from ftlit.errors import ConfigError
from ftlit.forgetting import Replay
from ftlit.models import divergence, fused, tiles
from ftlit.models.divergence import logits_of, token_kl
from ftlit.models.load import load_lm
from ftlit.models.score import Head
from ftlit.peft import Full, LoRA
from ftlit.rollout import generate
from ftlit.stages import SFT
from ftlit.testing import tiny_lm, tiny_tokenizer
from tests.simulated_gpu import fits
from tests.simulated_gpu.device import NAME, simulated

# Strategies and controls side by side with as few runs as can be: every strategy with every stage that is unlike the
# others on a device, and every control with a strategy that changes weights and one that does not, where it may.
DAILY = [
    ("sft", "full", "target_kl l2 probe"),
    ("sft", "full", "replay tokens l2_rows"),
    ("sft", "full", "interpolate early_stop generation"),
    ("sft", "lora", "replay_ce samples ewc"),
    ("sft", "lora", "target_kl interpolate probe"),
    ("sft", "lora", "budget l2"),
    ("sft", "prefix", "replay tokens generation"),
    ("sft", "prompt", "target_kl probe"),
    ("sft", "prompt", "replay_ce samples early_stop"),
    ("dpo", "full", "replay ewc"),
    ("dpo", "lora", "l2_rows probe"),
    ("dpo", "prefix", ""),
    ("dpo", "prompt", "replay"),
    ("kto", "lora", ""),
    ("cached", "lora", ""),
    ("reward", "full", "l2"),
    ("reward", "lora", "interpolate"),
    ("reward", "prefix", ""),
    ("classification", "full", ""),
    ("classification", "prompt", ""),
    ("ppo", "full", "probe"),
    ("ppo", "lora", "replay"),
    ("ppo", "prefix", ""),
    ("ppo", "prompt", ""),
    ("ppo_values", "lora", ""),
    ("grpo", "lora", "generation"),
    ("remax", "full", ""),
]


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    tiny_lm("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    fits.write_rows(folder)
    return fits.Kit(folder / "model", folder)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))


def fit(kit, folder, stage, strategy, controls="", **options):
    """One run on the device; returns its stage."""
    torch.manual_seed(0)
    with simulated():
        module, data = fits.STAGES[stage](kit, fits.STRATEGIES[strategy]())
        callbacks = [callback for name in controls.split() for callback in fits.CONTROLS[name](kit)]
        callbacks.append(fits.Where())
        fits.trainer(folder, callbacks=callbacks, **options).fit(module, datamodule=data)
    return module


@pytest.mark.parametrize(("stage", "strategy", "controls"), DAILY)
def test_it_fits(kit, tmp_path, stage, strategy, controls):
    module = fit(kit, tmp_path, stage, strategy, controls)
    assert module.trainer.global_step == 2
    assert module.seen == {NAME}
    assert {parameter.dtype for parameter in module.parameters() if parameter.requires_grad} == {torch.float32}


def test_the_daily_runs_leave_nothing_out():
    strategies = {strategy for _, strategy, _ in DAILY}
    controls = {control for _, _, some in DAILY for control in some.split()}
    kinds = {stage: {strategy for one, strategy, _ in DAILY if one == stage} for stage in ("sft", "dpo", "ppo")}
    assert strategies == set(fits.STRATEGIES)
    assert controls == set(fits.CONTROLS)
    assert set(fits.STAGES) - {"rloo"} == {stage for stage, _, _ in DAILY}  # RLOO differs from GRPO in a formula
    assert all(found == strategies for found in kinds.values())


@pytest.mark.slow  # the whole product
@pytest.mark.parametrize("control", [None, *fits.CONTROLS])
@pytest.mark.parametrize("strategy", fits.STRATEGIES)
@pytest.mark.parametrize("stage", fits.STAGES)
def test_everything_fits(kit, tmp_path, stage, strategy, control):
    try:
        fit(kit, tmp_path, stage, strategy, control or "")
    except ConfigError as error:
        if "cannot be used here" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "ppo"])
def test_a_run_there_is_the_run_here(kit, tmp_path, stage):
    """The simulation computes what it should: in float32 the numbers are those of a CPU."""
    there = fit(kit, tmp_path, stage, "lora", precision="32-true").step_metrics
    torch.manual_seed(0)
    module, data = fits.STAGES[stage](kit, LoRA())
    fits.trainer(tmp_path, precision="32-true", on_cpu=True).fit(module, datamodule=data)
    assert there.keys() == module.step_metrics.keys()
    for name, value in module.step_metrics.items():
        if "_per_s" not in name and "time" not in name:
            assert there[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_run_there_goes_on(kit, tmp_path):
    whole = fit(kit, tmp_path, "sft", "lora", steps=4).step_metrics
    with simulated():
        for steps in (2, 4):
            torch.manual_seed(0)
            module, data = kit.sft(LoRA())
            runner = fits.trainer(tmp_path, steps=steps)
            module.rate = lambda total, given=module.rate: given(4)  # the schedule of the whole run
            runner.fit(module, datamodule=data, ckpt_path=tmp_path / "at.ckpt" if steps == 4 else None)
            runner.save_checkpoint(tmp_path / "at.ckpt")
    assert module.step_metrics["train/loss"] == pytest.approx(whole["train/loss"], rel=1e-6)


def test_a_model_built_in_python_fits(kit, tmp_path):
    """It is prepared on the CPU while new tensors come to lie on the GPU."""
    with simulated():
        stage = SFT(policy=tiny_lm("mistral"), peft=LoRA())
        stage.tokenizer = tiny_tokenizer()
        fits.trainer(tmp_path, callbacks=[Replay(num_rows=4, max_new_tokens=4)]).fit(stage, datamodule=kit.sft(None)[1])
    assert stage.trainer.global_step == 2


# ---- faults that were: planted again they are found -----------------------------------------------------------------


def _careless_numbers(like, *shape):
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return numbers.to(like.device, like.dtype)


def test_planted_a_generator_of_the_cpu_for_a_tensor_of_the_gpu(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(fused, "_random", _careless_numbers)
    with pytest.raises(RuntimeError, match="device type for generator"):
        fit(kit, tmp_path, "sft", "lora")


def test_planted_a_generator_in_what_controls_prepare(kit, tmp_path, monkeypatch):
    """Controls are prepared outside of Lightning's context; inside of it this draw would raise."""

    def careless(seed, count):
        return torch.rand(count, generator=torch.Generator().manual_seed(seed)).double()

    monkeypatch.setattr(generate, "_draws", careless)
    fit(kit, tmp_path, "sft", "prompt", "replay")
    with simulated() as device, device, pytest.raises(RuntimeError, match="device type for generator"):
        careless(0, 3)


def test_planted_tiles_that_lie_where_new_tensors_lie(kit, tmp_path, monkeypatch):
    own = tiles._plan

    def careless(*args):
        with torch.device(NAME):
            return own(*args)

    monkeypatch.setattr(tiles, "_plan", careless)
    stage = SFT(policy=tiny_lm(), peft=LoRA())
    stage.tokenizer = tiny_tokenizer()
    with simulated(), pytest.raises(ConfigError, match="same device"):
        fits.trainer(tmp_path).fit(stage, datamodule=kit.sft(None)[1])


def _careless_divergence(hidden, head, start_hidden, start_head, temperature):
    with torch.no_grad():
        start = torch.log_softmax(logits_of(start_hidden, start_head) / temperature, dim=-1)
    now = torch.log_softmax(logits_of(hidden, head) / temperature, dim=-1)
    return temperature**2 * torch.einsum("nv,nv->n", start.exp(), start - now)


@pytest.mark.parametrize("control", ["replay", "target_kl"])
def test_planted_a_divergence_that_autocast_sums(kit, tmp_path, monkeypatch, control):
    monkeypatch.setattr(divergence, "_divergence", _careless_divergence)
    with pytest.raises(RuntimeError) as caught:
        fit(kit, tmp_path, "sft", "full", control)
    raised = [caught.value]  # what Lightning does after an error may raise, too
    while raised[-1].__context__ is not None:
        raised.append(raised[-1].__context__)
    assert any("index_copy" in str(error) for error in raised)


@pytest.mark.parametrize("planted", [False, True])
def test_planted_logits_that_are_rounded(monkeypatch, planted):
    """A divergence of a few steps is smaller than what rounding the logits to bfloat16 adds."""
    make = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=make).bfloat16() for shape in ((64, 64), (1500, 64)))
    moved = hidden + (0.02 * torch.randn(64, 64, generator=make)).bfloat16()
    head = Head(weight.double() / 4)
    exact = token_kl(moved.double(), head, hidden.double(), head).mean().item()
    if planted:
        monkeypatch.setattr(divergence, "product", lambda left, right, exact: (left @ right).float())
    with simulated() as device, torch.autocast(NAME, dtype=torch.bfloat16):
        head = Head((weight / 4).to(device))
        found = token_kl(moved.to(device), head, hidden.to(device), head).mean().item()
    assert (found == pytest.approx(exact, rel=1e-3)) is not planted


# ---- the device itself ----------------------------------------------------------------------------------------------


def test_the_device_is_as_strict_as_cuda():
    with simulated() as device:
        there, here = torch.ones(4, 4, device=device), torch.ones(4, 4)
        for wrong in (
            lambda: there + here,
            lambda: here.index_select(0, torch.arange(2, device=device)),
            lambda: torch.cat([there, here]),
            lambda: F.embedding(torch.arange(2), there),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device=device, generator=torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert (there + torch.tensor(1.0)).device == device  # a number of the CPU is taken along
        assert there[torch.arange(2)].shape == (2, 4)  # and indices are
        with device:
            made = [torch.zeros(2), torch.tensor([1]), torch.arange(2), torch.as_tensor([1.0])]
        assert {one.device.type for one in made} == {NAME}
        assert pack([Example([1, 2], [0, 1])]).to(device).input_ids.device == device
    assert torch.tensor([1]).device.type == "cpu"
    assert not torch.accelerator.is_available()


def test_what_comes_first_does_not_matter(kit):
    """A model that is loaded on the CPU after the first one on the device is whole."""
    _device_constructors.cache_clear()  # as in a process that has not used a device's context
    with simulated() as device, device:
        load_lm(kit.model)
    with torch.device("meta"):
        assert torch.tensor([1]).device.type == "meta"
    frequencies = load_lm(kit.model).model.rotary_emb.inv_freq
    assert torch.equal(frequencies, tiny_lm("llama").model.rotary_emb.inv_freq)


def test_its_autocast_has_the_lists_of_cuda():
    with simulated() as device, torch.autocast(NAME, dtype=torch.bfloat16):
        x = torch.ones(4, 4, device=device)
        half = (x @ x, F.linear(x, x), torch.einsum("nv,nv->n", x, x))
        assert {one.dtype for one in half} == {torch.bfloat16}
        full = (torch.softmax(half[0], -1), half[0].sum(), F.layer_norm(half[0], (4,)), half[0].exp(), x * x)
        assert {one.dtype for one in full} == {torch.float32}
        assert torch.addcmul(x, half[0], half[0]).dtype == torch.float32
        assert (x.double() @ x.double()).dtype == torch.float64
        with pytest.raises(RuntimeError, match="dtype"):
            x.index_copy(0, torch.arange(2, device=device), half[0][:2])


def test_full_goes_with_text_of_its_own_alone(kit, tmp_path):
    """Nothing else had asked for the start weights."""
    assert isinstance(fit(kit, tmp_path, "sft", "full", "replay_ce").strategy, Full)
