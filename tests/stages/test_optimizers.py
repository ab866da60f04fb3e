"""Which parameters are decayed, how fast each learns, and the rate over a run."""

import lightning as L
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from ftlit.data.packing import StepLoader, StepPlanner
from ftlit.errors import ConfigError
from ftlit.peft import Full, LoRA
from ftlit.stages import SFT
from ftlit.stages.optimizers import SCHEDULES, layer_factors, parameter_groups, rate
from ftlit.testing import tiny_examples, tiny_lm


class Data(L.LightningDataModule):
    def planner(self, accumulate=1, world=1):
        return StepPlanner(tiny_examples(), batch_size=5, accumulate=accumulate, world=world)

    def train_dataloader(self):
        return StepLoader(tiny_examples(), self.planner())


def fit(steps=2, family="qwen2", peft=None, callbacks=(), **stage):
    module = SFT(policy=tiny_lm(family, torch.float64), peft=peft or Full(), **{"warmup": 0.0, **stage})
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, precision="64-true", callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, Data())
    return module, trainer.optimizers[0]


def names_of(module, optimizer):
    names = {id(p): name.removeprefix("policy.lm.") for name, p in module.named_parameters()}
    return [({names[id(p)] for p in group["params"]}, group) for group in optimizer.param_groups]


def test_norms_and_biases_are_not_decayed():
    module, optimizer = fit(weight_decay=0.1)
    (decayed, first), (plain, second) = names_of(module, optimizer)
    assert first["weight_decay"] == 0.1
    assert second["weight_decay"] == 0.0
    assert plain == {n for n, _ in module.policy.lm.named_parameters() if "norm" in n or n.endswith("bias")}
    assert decayed | plain == {n for n, _ in module.policy.lm.named_parameters()}
    assert second["name"] == "no decay"


def test_everything_may_be_decayed():
    _, optimizer = fit(weight_decay=0.1, decay_all=True)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]


def test_a_step_of_adamw_by_hand():
    """Two first steps: the decayed weights shrink by `lr * weight_decay`, norms and biases do not."""
    moved = {}
    for decay in (0.0, 0.5):
        module, _ = fit(steps=1, weight_decay=decay, lr=1e-2, schedule="constant", gradient_checkpointing=False)
        moved[decay] = dict(module.policy.lm.named_parameters())
    for name, start in tiny_lm("qwen2", torch.float64).named_parameters():
        expected = 0 if start.ndim < 2 else 1e-2 * 0.5 * start
        torch.testing.assert_close(moved[0.0][name] - moved[0.5][name], expected + torch.zeros_like(start))


def test_layers_learn_slower_the_deeper_they_lie():
    rates = {}
    module, optimizer = fit(family="llama_untied", layer_decay=0.5, lr=8e-3, schedule="constant")
    for names, group in names_of(module, optimizer):
        rates |= dict.fromkeys(names, group["lr"])
    for name, lr in rates.items():
        factor = 0.5 if "layers.1." in name else 0.25 if "layers.0." in name else 0.125 if "embed" in name else 1.0
        assert lr == pytest.approx(8e-3 * factor), name
    assert module.step_metrics["train/lr"] == pytest.approx(8e-3)  # that of the top


def test_layer_factors_of_gpt2_and_shared_ends():
    names = ["transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight",
             "transformer.h.11.ln_1.weight", "transformer.ln_f.weight", "lm_head.weight"]  # fmt: skip
    factors = layer_factors(names, 12, 0.9)
    assert list(factors.values()) == pytest.approx([0.9**13, 0.9**13, 0.9**12, 0.9, 1, 1])


def test_the_rates_keep_their_ratio_under_every_schedule():
    for schedule in SCHEDULES:
        _, optimizer = fit(steps=4, layer_decay=0.5, lr=8e-3, schedule=schedule, warmup=1, min_lr=0.1)
        rates = sorted({group["lr"] for group in optimizer.param_groups}, reverse=True)
        assert [rates[0] / one for one in rates] == pytest.approx([1, 2, 4, 8])


def test_loraplus_moves_b_faster():
    module, optimizer = fit(peft=LoRA(rank=2, lr_ratio_b=16), lr=1e-3, schedule="constant")
    (fast, first), (slow, second) = names_of(module, optimizer)
    assert all(name.endswith("lora_B") for name in fast)
    assert all(name.endswith("lora_A") for name in slow)
    assert (first["lr"], second["lr"]) == pytest.approx((1.6e-2, 1e-3))
    assert (first["name"], second["name"]) == ("lr x 16", "all")


def test_ones_own_optimizer_gets_the_groups():
    make = lambda groups: torch.optim.SGD(groups, lr=0.5, weight_decay=0.1)  # noqa: E731
    module, optimizer = fit(layer_decay=0.5, optimizer=make)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    for names, group in names_of(module, optimizer):
        factor = 0.5 if "layers.1." in min(names) else 0.25 if "layers.0." in min(names) else None
        assert factor is None or group["lr"] == pytest.approx(0.5 * factor)


def test_ones_own_optimizer_gets_plain_parameters_where_all_are_alike():
    given = []

    def make(parameters):
        given.extend(parameters)
        return torch.optim.SGD(parameters, lr=0.5)

    fit(peft=LoRA(rank=2), optimizer=make)
    assert all(isinstance(one, torch.nn.Parameter) for one in given)


def test_ones_own_schedule_keeps_the_ratios():
    make = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)  # noqa: E731
    _, optimizer = fit(peft=LoRA(rank=2, lr_ratio_b=4), lr=1e-2, lr_scheduler=make)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([4e-4, 1e-4])


def test_the_names_of_the_groups_are_logged(tmp_path):
    monitor = LearningRateMonitor()
    module = SFT(policy=tiny_lm("qwen2"), peft=Full(), layer_decay=0.5, weight_decay=0.1)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, max_epochs=-1, logger=CSVLogger(tmp_path), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[monitor],
    )  # fmt: skip
    trainer.fit(module, Data())
    assert any("lr x 0.25, no decay" in name for name in monitor.lrs)


def test_epsilon_and_betas_reach_adamw():
    _, optimizer = fit(eps=1e-3, betas=(0.5, 0.6))
    assert optimizer.defaults["eps"] == 1e-3
    assert optimizer.defaults["betas"] == (0.5, 0.6)


@given(st.dictionaries(st.text("ab", min_size=1), st.tuples(st.sampled_from([0.5, 1.0, 2.0]), st.integers(1, 3))))
@settings(max_examples=50, deadline=None)
def test_groups_hold_every_parameter_once(drawn):
    parameters = {name: torch.nn.Parameter(torch.zeros([1] * ndim)) for name, (_, ndim) in drawn.items()}
    factors = {name: factor for name, (factor, _) in drawn.items()}
    groups = parameter_groups(parameters, factors)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, parameters.values()))
    assert [g["lr_factor"] for g in groups] == sorted((g["lr_factor"] for g in groups), reverse=True)
    assert len({g["name"] for g in groups}) == len(groups)
    for name, parameter in parameters.items():
        (group,) = (g for g in groups if any(p is parameter for p in g["params"]))
        assert group["lr_factor"] == factors[name]
        assert (group.get("weight_decay") == 0.0) == (parameter.ndim < 2)


# ---- the rate over a run ---------------------------------------------------------------------------------------------


def test_wsd_by_hand():
    factor = rate(10, "wsd", warmup=2, decay=4, min_lr=0.2)
    expected = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert [factor(step) for step in range(11)] == pytest.approx(expected)
    share = rate(10, "wsd", warmup=0.2, decay=0.4, min_lr=0.2)
    assert [share(step) for step in range(11)] == pytest.approx(expected)


def test_inverse_sqrt_is_that_of_transformers():
    from transformers import get_inverse_sqrt_schedule

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_inverse_sqrt_schedule(optimizer, num_warmup_steps=4).lr_lambdas[0]
    factor = rate(30, "inverse_sqrt", warmup=4)
    assert [factor(step) for step in range(4, 30)] == pytest.approx([theirs(step) for step in range(4, 30)])
    assert min(rate(1000, "inverse_sqrt", warmup=4, min_lr=0.3)(step) for step in range(4, 1000)) == 0.3


@given(
    st.integers(1, 60), st.sampled_from(SCHEDULES), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 1),
)  # fmt: skip
@example(3, "wsd", 0.5, 0.5, 0.0)  # two shares that are both rounded up
@settings(max_examples=200, deadline=None)
def test_every_schedule_rises_then_never_rises(total, schedule, warmup, decay, low):
    factor = rate(total, schedule, warmup, low, decay)
    values = [factor(step) for step in range(total)]
    first = round(warmup * total)
    assert all(0 < value <= 1 for value in values[:first])
    assert values[:first] == sorted(values[:first])
    assert values[first:] == sorted(values[first:], reverse=True)
    if first < total:
        assert values[first] == pytest.approx(1)
    assert min(values[first:], default=1) >= low - 1e-12
    if schedule in ("cosine", "linear"):
        assert factor(total) == pytest.approx(low)


@pytest.mark.parametrize(
    ("total", "warmup", "decay", "last"),
    [(3, 0.5, 0.5, 1), (7, 0.5, 0.5, 3), (11, 0.5, 0.5, 5), (10, 0.25, 0.75, 8), (6, 0.25, 0.75, 4), (1, 0.6, 0.4, 0)],
)
def test_shares_that_add_up_to_one_fit_whatever_is_rounded(total, warmup, decay, last):
    factor = rate(total, "wsd", warmup, 0.0, decay)
    values = [factor(step) for step in range(total)]
    assert sum(value < 1 for value in values[total - last :]) == max(0, last - 1)
    assert values[total - last :] == pytest.approx([(last - k) / last for k in range(last)])


@pytest.mark.parametrize(("warmup", "decay"), [(0.6, 0.5), (2, 0.5), (0.5, 2), (0.99, 0.99)])
def test_shares_that_do_not_fit_are_refused(warmup, decay):
    with pytest.raises(ConfigError, match="are longer than the run"):
        rate(3, "wsd", warmup, 0.0, decay)


def test_parts_that_are_longer_than_the_run_are_refused():
    with pytest.raises(
        ConfigError, match=r"warmup \(6 steps\) and decay \(5 steps\) are longer than the run \(10 steps\)"
    ):
        rate(10, "wsd", warmup=6, decay=5)


@pytest.mark.parametrize(
    "wrong", [{"layer_decay": 0.0}, {"layer_decay": 1.1}, {"decay": -1}, {"weight_decay": -1}, {"eps": 0}]
)
def test_numbers_out_of_range(wrong):
    with pytest.raises(ConfigError, match="layer_decay must be in"):
        SFT(policy=tiny_lm(), **wrong)
