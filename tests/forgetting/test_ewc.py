"""EWC: the Fisher matrix is that of the start model, an example at a time, and the pull is on the change of weights."""

import copy

import pytest
import torch

from ftlit.errors import ConfigError
from ftlit.forgetting import EWC, ewc
from ftlit.models.score import Head
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.peft.io import save_adapter
from ftlit.stages import SFT
from ftlit.testing import tiny_examples, tiny_lm
from tests.forgetting.runs import changes, run
from tests.forgetting.test_replay import GENERAL, losses
from tests.stages.test_step import LENGTHS, assert_same

CONSTANT = {"warmup": 0, "schedule": "constant"}
ROWS = tiny_examples(GENERAL, seed=7)


class Given(EWC):
    """On rows made in code."""

    def examples(self, stage):
        return ROWS


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))


class OneRank:
    global_rank, world_size = 0, 1


def stage_of(strategy=None, **config):
    stage = SFT(policy=tiny_lm("llama", torch.float64, **config), peft=strategy or Full())
    stage.configure_model()
    stage.strategy.remember_start(stage.policy.lm)
    stage.policy.eval()
    stage._trainer = OneRank()
    return stage


def names_of(stage):
    return sorted(change.name for change in stage.strategy.changes(stage.policy.lm))


def plain_fisher(lm, rows, labels, names):
    """Squared gradients of single examples, plain transformers; labels: of each example."""
    sums = dict.fromkeys(names, 0.0)
    tokens = 0
    for row, drawn in zip(rows, labels, strict=True):
        ids = torch.tensor([row.input_ids])
        logps = torch.log_softmax(lm(input_ids=ids).logits[0, :-1], -1)
        chosen = torch.tensor([weight != 0 for weight in row.weights[1:]])
        total = logps[chosen].gather(1, drawn[:, None]).sum()
        grads = torch.autograd.grad(total, [lm.get_parameter(name) for name in names])
        for name, grad in zip(names, grads, strict=True):
            sums[name] = sums[name] + grad.square()
        tokens += len(drawn)
    return {name: one / tokens for name, one in sums.items()}


@pytest.mark.parametrize("kind", ["Full", "LoRA", "moved LoRA", "everything"])
def test_the_square_is_taken_for_each_example_of_the_start_model(kind, monkeypatch):
    """Also of frozen weights, also when the adapter has been trained: it is the start model's."""
    if kind == "Full":
        strategy = Full()
    elif kind == "everything":
        strategy = LoRA(rank=3, target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"])
    else:
        strategy = LoRA(rank=3)
    stage = stage_of(strategy)
    if kind == "moved LoRA":
        with torch.no_grad():
            for parameter in strategy.trained(stage.policy.lm).values():
                parameter.normal_()
    generator = torch.Generator().manual_seed(1)
    labels = [torch.randint(0, 300, (row.num_targets,), generator=generator) for row in ROWS]
    monkeypatch.setattr(ewc, "_drawn", lambda hidden, head, seed, number: labels[number])
    before = {name: p.requires_grad for name, p in stage.policy.lm.named_parameters()}
    found = ewc.fisher(stage, ROWS, names_of(stage))
    assert {name: p.requires_grad for name, p in stage.policy.lm.named_parameters()} == before
    assert all(p.grad is None for p in stage.policy.lm.parameters())
    lm = tiny_lm("llama", torch.float64, tie_word_embeddings=kind != "everything")
    if kind == "everything":  # an adapter on one of two tied weights changes that one
        lm.lm_head.weight = torch.nn.Parameter(lm.model.embed_tokens.weight.detach().clone())
    expected = plain_fisher(lm.eval(), ROWS, labels, names_of(stage))
    for name, one in expected.items():
        assert one.max() > 0
        torch.testing.assert_close(found[name], one, rtol=1e-8, atol=1e-12, msg=name)


def test_labels_are_drawn_from_the_model():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0, -50.0]], dtype=torch.float64).expand(20000, -1)
    head = Head(torch.eye(5, dtype=torch.float64), None)
    drawn = ewc._drawn(logits, head, 0, 3)
    share = torch.bincount(drawn, minlength=5) / len(drawn)
    torch.testing.assert_close(share.double(), torch.softmax(logits[0], -1), rtol=0, atol=0.01)
    assert torch.equal(drawn, ewc._drawn(logits, head, 0, 3))
    assert torch.equal(drawn[:100], ewc._drawn(logits[:100], head, 0, 3))  # however many are held at once
    assert not torch.equal(drawn, ewc._drawn(logits, head, 0, 4))


def test_it_is_the_curvature_of_the_divergence_a_token():
    """KL(start || start + e in one coordinate) = F e^2 / 2, by finite steps of plain transformers."""
    stage = stage_of(vocab_size=40)
    row = tiny_examples((9,), vocabulary=40, seed=3)[0]
    name = "model.norm.weight"
    found = sum(ewc.fisher(stage, [row], [name], seed)[name] for seed in range(300)) / 300
    lm = copy.deepcopy(stage.policy.lm)
    lm.set_attn_implementation("eager")
    _, start = losses(lm, row)
    start = start.detach()
    step, expected = 1e-3, []
    with torch.no_grad():
        for place in range(16):
            lm.model.norm.weight[place] += step
            _, now = losses(lm, row)
            expected.append(2 * (start.exp() * (start - now)).sum(1).mean() / step**2)
            lm.model.norm.weight[place] -= step
    expected = torch.stack(expected)
    assert (found.sum() / expected.sum()).item() == pytest.approx(1, abs=0.08)
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.9


def test_full_fine_tuning_follows_the_formula():
    """Six steps, clipped, against plain transformers and AdamW."""
    control = Given(weight=3.0)
    module, record, _ = run(Full(), control=control, stage=CONSTANT)
    torch.manual_seed(0)
    lm = tiny_lm("llama", torch.float64)
    start = copy.deepcopy(lm)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2, weight_decay=0.0)
    rows = tiny_examples(LENGTHS)
    for step in range(6):
        first = 8 * (step % 3)
        loss = torch.cat([losses(lm, row)[0] for row in rows[first : first + 8]]).mean()
        origin = dict(start.named_parameters())
        parts = [
            (control._fisher[name] * (weight - origin[name].detach()).square()).sum() / 2
            for name, weight in lm.named_parameters()
        ]
        assert record.steps[step]["forgetting/ewc/loss"] == pytest.approx(sum(parts).item(), rel=1e-6, abs=1e-12)
        optimizer.zero_grad()
        (loss + 3.0 * sum(parts)).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 0.5)
        optimizer.step()
    assert_same(module.policy.lm, lm, 1e-7)


def test_lora_is_held_by_the_fisher_matrix_of_the_weights():
    """At the start every A has a gradient of zero, so a Fisher matrix of A would be zero: this one is of B A."""
    control = Given(weight=1.0)
    module, record, _ = run(LoRA(rank=3, alpha=5), control=control)
    assert all(one.max() > 0 for one in control._fisher.values())
    dense = changes(module)
    for name, layer in module.strategy._adapters(module.policy.lm).items():
        down, up = (factor.detach().clone().requires_grad_() for factor in layer.factors)
        part = (control._fisher[f"{name}.weight"] * (layer.scale * up @ down).square()).sum() / 2
        change = next(one for one in module.strategy.changes(module.policy.lm) if one.name == f"{name}.weight")
        ours = torch.autograd.grad(control.term(change), layer.factors)
        for mine, theirs in zip(ours, torch.autograd.grad(part, (down, up)), strict=True):
            assert theirs.abs().max() > 0
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    plain, _, _ = run(LoRA(rank=3, alpha=5))

    def held(changed):
        return sum((control._fisher[name] * one.square()).sum() for name, one in changed.items())

    strong, _, _ = run(LoRA(rank=3, alpha=5), control=Given(weight=1000.0))
    assert held(changes(strong)) < held(dense) < held(changes(plain))
    assert record.steps[0]["forgetting/ewc/loss"] == pytest.approx(0, abs=1e-20)


def test_it_is_made_once(monkeypatch):
    first = Given()
    run(Full(), control=first)
    monkeypatch.setattr(ewc, "fisher", None)  # read, not made
    second = Given()
    run(Full(), control=second)
    for name, one in first._fisher.items():
        assert torch.equal(one, second._fisher[name])
    with pytest.raises(TypeError):
        run(Full(), control=Given(seed=1))


def test_what_it_cannot_do_is_refused_in_a_sentence(tmp_path):
    for strategy in (PrefixTuning(3), PromptTuning(3)):
        with pytest.raises(ConfigError, match="changes no weight of the model"):
            run(strategy, control=Given())
    module, _, _ = run(LoRA(rank=3))
    save_adapter(module.strategy, module.policy.lm, tmp_path / "adapter", "base")
    with pytest.raises(ConfigError, match="merge that first"):
        run(LoRA(rank=3, from_adapter=str(tmp_path / "adapter")), control=Given())
    for settings in ({"num_rows": 0}, {"weight": -1.0}):
        with pytest.raises(ConfigError, match="EWC"):
            EWC(**settings)
