"""L2ToInit: the pull is that of its formula, whatever the rate, the cut and the strategy."""

import copy
import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from ftlit.errors import ConfigError
from ftlit.forgetting import EWC, EarlyStopOnForgetting, L2ToInit
from ftlit.forgetting.l2_to_init import second_moments
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.peft.io import save_adapter
from ftlit.stages import SFT
from ftlit.stages.fsdp import FSDP2
from ftlit.testing import tiny_examples, tiny_lm, tiny_tokenizer
from ftlit.testing.control_suite import TinyData
from tests.forgetting.runs import changes, run
from tests.forgetting.test_replay import GENERAL, losses
from tests.stages.test_step import LENGTHS, assert_same

CONSTANT = {"warmup": 0, "schedule": "constant"}
FREE = {"gradient_clip_val": None}


class Given(L2ToInit):
    """Weighted by rows made in code."""

    def prepare(self, stage):
        self._moments = second_moments(stage, tiny_examples(GENERAL, seed=7))


def by_hand(after_step=None, penalty=None, clip=None, decay=0.0):
    """Six steps of plain transformers and AdamW."""
    torch.manual_seed(0)
    lm = tiny_lm("llama", torch.float64)
    start = copy.deepcopy(lm)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2, weight_decay=decay)
    rows = tiny_examples(LENGTHS)
    for step in range(6):
        optimizer.zero_grad()
        first = 8 * (step % 3)
        loss = torch.cat([losses(lm, row)[0] for row in rows[first : first + 8]]).mean()
        pairs = list(zip(lm.parameters(), start.parameters(), strict=True))
        (loss if penalty is None else loss + penalty(pairs)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(lm.parameters(), clip)
        optimizer.step()
        if after_step is not None:
            with torch.no_grad():
                for weight, origin in pairs:
                    after_step(weight, origin)
    return lm


def test_decoupled_shrinks_the_change_after_each_step():
    def shrink(weight, origin):
        weight.copy_(origin + 2 ** (-2.0 / 3) * (weight - origin))

    module, record, _ = run(Full(), control=L2ToInit(half_life=3, weight=2.0), stage=CONSTANT, trainer=FREE)
    lm = by_hand(shrink)
    assert_same(module.policy.lm, lm, 1e-8)
    start = tiny_lm("llama", torch.float64)
    squares = [(a - b).square().sum().item() for a, b in zip(lm.parameters(), start.parameters(), strict=True)]
    assert record.steps[0].keys() >= {"train/loss"}
    assert module.step_metrics["forgetting/l2_to_init/distance"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-8)


def test_coupled_is_a_term_of_the_loss_and_is_clipped_with_it():
    """Also with clipping: the pull has its part in the norm."""
    module, record, _ = run(
        Full(),
        control=L2ToInit("coupled", strength=5.0, weight=2.0),
        stage=CONSTANT,
        trainer={"gradient_clip_val": 0.5},
    )
    lm = by_hand(penalty=lambda pairs: 2.0 * 5.0 / 2 * sum((a - b.detach()).square().sum() for a, b in pairs), clip=0.5)
    assert_same(module.policy.lm, lm, 1e-8)
    assert module.step_metrics["forgetting/l2_to_init/loss"] > 0
    assert record.steps[0]["train/loss"] > 0


def test_total_pull_is_the_sum_of_rate_times_strength():
    control = L2ToInit("coupled", total_pull=0.3)
    _, record, _ = run(Full(), control=control)
    one = L2ToInit("coupled", strength=0.3 / sum(step["train/lr"] for step in record.steps))
    assert_same(run(Full(), control=control)[0], run(Full(), control=one)[0], 1e-12)


@pytest.mark.parametrize("start", ["zero", "adapter"])
def test_lora_is_pulled_by_the_norm_of_its_product(start, tmp_path):
    """Gradients of the Gram form against autograd through the dense product, also relative to another adapter."""
    options = {"rank": 3, "alpha": 5}
    if start == "adapter":
        first, _, _ = run(LoRA(**options))
        save_adapter(first.strategy, first.policy.lm, tmp_path, "base")
        options["from_adapter"] = str(tmp_path)
    plain, with_it = (
        run(LoRA(**options), control=control, stage=CONSTANT, trainer={**FREE, "max_steps": 2, "max_epochs": -1})
        for control in (None, L2ToInit("coupled", strength=7.0))
    )
    # The first step is from the start, where the pull is zero: both runs are in the same place at the second.
    module, record, _ = with_it
    for ours, theirs in zip(record.grads[0].values(), plain[1].grads[0].values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    one, _, _ = run(LoRA(**options), stage=CONSTANT, trainer={**FREE, "max_steps": 1, "max_epochs": -1})
    layers = one.strategy._adapters(one.policy.lm)
    for name, layer in layers.items():
        down, up = (factor.detach().clone().requires_grad_() for factor in layer.factors)
        product = layer.scale * up @ down
        if start == "adapter":
            product = product - layer.scale * layer.start_lora_B.detach() @ layer.start_lora_A.detach()
        grads = torch.autograd.grad(7.0 / 2 * product.square().sum(), (down, up))
        for part, grad in zip(layer.parts, grads, strict=True):
            key = f"policy.lm.{name}.{part}"
            pulled = record.grads[1][key] - plain[1].grads[1][key]
            assert grad.abs().max() > 0
            torch.testing.assert_close(pulled, grad, rtol=1e-7, atol=1e-10)
    assert module is not one


def test_only_what_general_text_excites_is_pulled_back():
    """Second moments against those of the hidden states of plain transformers; Delta C Delta^T against the dense."""
    control = Given("coupled", strength=1.0)
    module, _, _ = run(LoRA(rank=3), control=control)
    start = tiny_lm("llama", torch.float64)
    sums = {}

    def hook(name):
        def add(layer, args):
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            sums[name] = sums.get(name, 0) + x.t() @ x

        return add

    for name, layer in start.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.register_forward_pre_hook(hook(f"{name}.weight"))
    for row in tiny_examples(GENERAL, seed=7):
        start(input_ids=torch.tensor([row.input_ids]))
    assert control._moments.keys() == sums.keys()
    dense = changes(module)
    total = 0.0
    for name, moment in sums.items():
        expected = moment / moment.diagonal().mean()
        torch.testing.assert_close(control._moments[name], expected)
        total += 0.5 * (dense[name] @ expected * dense[name]).sum().item()
    terms = [control.term(change).item() for change in module.strategy.changes(module.policy.lm)]
    assert sum(terms) == pytest.approx(total, rel=1e-9)
    plain, _, _ = run(LoRA(rank=3), control=L2ToInit("coupled", strength=1.0))
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(module.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
@pytest.mark.parametrize("make", [Full, lambda: LoRA(rank=3)], ids=["Full", "LoRA"])
def test_a_strong_pull_leaves_the_model_where_it_was(make, mode):
    """The limit of both: the model stays, and in between the distance falls."""
    settings = {"half_life": 1} if mode == "decoupled" else {"strength": 1.0}
    distances = []
    for weight in (0.0, 0.1, 10.0):
        sgd = {**CONSTANT, "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.01)}
        control = L2ToInit(mode, **settings, weight=weight)
        module, _, _ = run(make(), control=control, stage=sgd, trainer={**FREE, "max_epochs": 4})
        distances.append(math.sqrt(sum(change.square().sum().item() for change in changes(module).values())))
    assert distances[0] > distances[1] > distances[2]


def test_a_pull_too_small_for_one_step_is_saved_up():
    """In float32, 1 - 2^(-1/h) of a small change is less than half a unit in the last place of a weight: by itself each
    such pull would be lost, and none of it is."""
    torch.manual_seed(0)
    half_life = 2e5
    stage = SFT(policy=tiny_lm("llama"), peft=Full())
    stage.configure_model()
    lm = stage.policy.lm
    stage.strategy.remember_start(lm)
    start = [parameter.detach().clone() for parameter in lm.parameters()]
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(1 + 1e-3)
    before = math.sqrt(sum((p - s).double().square().sum().item() for p, s in zip(lm.parameters(), start, strict=True)))
    naive = [p.detach().clone() for p in lm.parameters()]
    factor = 2 ** (-1 / half_life)
    for now, first in zip(naive, start, strict=True):
        torch.testing.assert_close(first + factor * (now - first), now, rtol=0, atol=0, msg="the trap is none")
        break
    control = L2ToInit(half_life=half_life)
    moves = 0
    for _ in range(int(half_life) // 100):
        control._saved_up += 99 / half_life  # a hundred steps at once, to be quick
        was = control._saved_up
        control.after_step(stage)
        moves += control._saved_up < was
    assert moves > 10
    left = control.step_values["distance"] / before
    assert left * 2**-control._saved_up == pytest.approx(0.5, rel=1e-3)


def test_what_it_cannot_do_is_refused_in_a_sentence(tmp_path):
    for strategy in (PrefixTuning(3), PromptTuning(3)):
        for mode in ("decoupled", "coupled"):
            with pytest.raises(ConfigError, match="changes no weight of the model"):
                run(strategy, control=L2ToInit(mode))
    module, _, _ = run(LoRA(rank=3))
    save_adapter(module.strategy, module.policy.lm, tmp_path, "base")
    with pytest.raises(ConfigError, match="or use mode: coupled"):
        run(LoRA(rank=3, from_adapter=str(tmp_path)), control=L2ToInit())
    sgd = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.01)}
    with pytest.raises(ConfigError, match="total_pull needs the rates"):
        run(Full(), control=L2ToInit("coupled", total_pull=0.1), stage=sgd)
    stage = SFT(policy=tiny_lm("llama", torch.bfloat16), peft=Full())
    stage.configure_model()
    stage._trainer = type("T", (), {"strategy": None})()
    assert "lost in the rounding of weights in bfloat16" in L2ToInit().refuse(stage)
    for settings in (
        {"mode": "sideways"}, {"half_life": 0}, {"strength": 1.0}, {"mode": "coupled", "half_life": 3},
        {"mode": "coupled", "strength": 1.0, "total_pull": 1.0}, {"rows": "self"}, {"weight": -1.0},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            L2ToInit(**settings)


def test_sharded_weights_are_refused():
    stage = SFT(policy=tiny_lm("llama"), peft=Full())
    stage.configure_model()
    stage._trainer = SimpleNamespace(strategy=FSDP2(), callbacks=[])
    for control in (L2ToInit(), L2ToInit("coupled"), EWC(), EarlyStopOnForgetting()):
        assert control.refuse(stage).startswith("its weights are sharded")


def test_what_is_saved_up_is_in_the_state():
    """Stopped between two pulls: the next one comes when it would have come."""
    torch.manual_seed(0)
    stage = SFT(policy=tiny_lm("llama"), peft=Full())
    stage.configure_model()
    stage.strategy.remember_start(stage.policy.lm)
    control = L2ToInit(half_life=3000)
    left = []
    for step in range(12):
        control.after_step(stage)
        left.append(control._saved_up)
        if step == 6:
            assert control._saved_up > 0
            again = L2ToInit(half_life=3000)
            again.load_state_dict(control.state_dict())
            control = again
    assert left == pytest.approx([(step % 5 + 1) % 5 / 3000 for step in range(12)], abs=1e-12)


def test_weight_decay_beside_it_is_said(capsys):
    """Also that of another optimizer, whose own default it may be; an adapter that decays goes to the start as well."""
    by_hand = {"optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-3)}
    for strategy, options, said in [
        (
            Full(),
            {"weight_decay": 0.1},
            "weight_decay 0.1 pulls toward zero and l2_to_init to the start",
        ),
        (Full(), by_hand, "weight_decay 0.01 pulls toward zero"),
        (Full(), {}, None),
        (LoRA(rank=3), {"weight_decay": 0.1}, None),
    ]:
        run(strategy, control=L2ToInit(), stage=options)
        out = capsys.readouterr().out
        assert said in out if said else "toward zero" not in out


@pytest.fixture
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("make", [Full, lambda: LoRA(rank=3)], ids=["Full", "LoRA"])
def test_it_runs_in_half_precision(make, precision):
    def train(control):
        torch.manual_seed(0)
        dtype = torch.float32 if "mixed" in precision else torch.bfloat16
        stage = SFT(tiny_lm("llama", dtype), make(), lr=1e-2, warmup=0)
        stage.tokenizer = tiny_tokenizer()
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=3,
            enable_model_summary=False, max_epochs=-1, precision=precision, callbacks=[control],
        )  # fmt: skip
        trainer.fit(stage, TinyData())
        return stage

    coupled = L2ToInit("coupled", strength=1.0, rows="general")
    train(coupled)
    assert coupled.step_values["loss"] > 0
    assert coupled.step_values["distance"] > 0
    assert all(moment.dtype == torch.float32 for moment in coupled._moments.values())
    stage = train(L2ToInit())  # what is trained is in float32, whatever the model was built in
    assert {parameter.dtype for parameter in stage.parameters() if parameter.requires_grad} == {torch.float32}
