"""The meter against plain transformers, one document at a time, in float64."""

import copy

import numpy as np
import pytest
import torch

from ftlit.forgetting import measuring
from ftlit.forgetting.documents import Documents
from ftlit.forgetting.drift import OUTSIDE, drift, start_norms
from ftlit.forgetting.measuring import Meter
from ftlit.metrics.forgetting import PairedChange
from ftlit.peft import Full, LoRA, PrefixTuning, PromptTuning
from ftlit.testing import tiny_examples, tiny_lm

from .stages import disturb, stage_of

DOCUMENTS = tiny_examples((9, 4, 14, 12, 7, 5))
METHODS = {
    "LoRA": lambda: LoRA(rank=2),
    "LoRA on the output layer": lambda: LoRA(rank=2, target_modules=["lm_head", "q_proj"]),
    "LoRA with a trained module": lambda: LoRA(rank=2, modules_to_save=["norm"]),
    "Full": Full,
    "PrefixTuning": lambda: PrefixTuning(num_virtual_tokens=2),
    "PromptTuning": lambda: PromptTuning(num_virtual_tokens=2),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))


def distributions(lm, example, strategy=None):
    """Log-probabilities of all tokens at the scored places of one document alone, `[targets, V]`, and the targets."""
    ids = torch.tensor([list(example.input_ids)])
    if strategy is None:
        logits = lm(input_ids=ids).logits[0]
    else:  # virtual tokens or prefixes, as generation gives them
        given = dict(strategy.generation_kwargs(lm, ids, torch.ones_like(ids)))
        mask, cache = given.pop("attention_mask"), given.pop("past_key_values", None)
        known = 0 if cache is None else cache.get_seq_length()
        inputs = {name: value[:, known:] for name, value in given.items()}
        positions = (mask.cumsum(-1) - 1)[:, known:]
        out = lm(**inputs, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits = out.logits[0, -ids.shape[1] :]
    places = torch.tensor([place for place, weight in enumerate(example.weights) if weight])
    return torch.log_softmax(logits.double(), -1)[places - 1], ids[0, places]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kl", "keep"), [(False, False), (True, False), (True, True)])
@torch.no_grad()
def test_against_one_document_at_a_time(method, kl, keep):
    stage = stage_of(METHODS[method](), dtype=torch.float64, precision="64-true")
    base = tiny_lm(dtype=torch.float64).eval()
    meter = Meter({"a": DOCUMENTS}, batch_tokens=20, keep_states=keep)
    meter.prepare(stage.trainer, stage)
    disturb(stage, 0.3)
    one = meter.measure(stage.trainer, stage, kl=kl)["a"]

    virtual = isinstance(stage.strategy, PrefixTuning | PromptTuning)
    lm = copy.deepcopy(stage.policy.lm).eval()
    sums, counts, divergences, same, now_nll = [], [], [], [], []
    for example in DOCUMENTS:
        start, targets = distributions(base, example)
        now, _ = distributions(lm, example, stage.strategy if virtual else None)
        nll = [-table.gather(1, targets[:, None])[:, 0] for table in (start, now)]
        sums.append(float((nll[1] - nll[0]).sum()))
        counts.append(len(targets))
        now_nll.append(float(nll[1].sum()))
        divergences.append(float((start.exp() * (start - now)).sum()))
        same.append(int((start.argmax(1) == now.argmax(1)).sum()))
    tokens = sum(counts)
    assert (one.documents, one.tokens) == (len(DOCUMENTS), tokens)
    assert one.change == pytest.approx(sum(sums) / tokens, abs=1e-9)
    assert abs(one.change) > 0.01
    assert one.nll == pytest.approx(sum(now_nll) / tokens, abs=1e-9)
    assert one.nll - one.start_nll == pytest.approx(one.change, abs=1e-9)
    assert one.agreement == sum(same) / tokens
    assert one.perplexity_ratio == pytest.approx(np.exp(one.change))
    expected = PairedChange(sums, counts)
    assert (one.low, one.high) == pytest.approx(expected.interval(), abs=1e-9)
    assert one.upper(0.9) == pytest.approx(expected.upper(0.9), abs=1e-9)
    if kl:
        assert one.kl == pytest.approx(sum(divergences) / tokens, abs=1e-9)
    else:
        assert one.kl is None


def test_at_the_start_nothing_has_changed():
    for peft in (LoRA(rank=2), Full()):
        stage = stage_of(peft)
        meter = Meter({"a": DOCUMENTS})
        meter.prepare(stage.trainer, stage)
        one = meter.measure(stage.trainer, stage, kl=True)["a"]
        assert (one.change, one.low, one.high, one.agreement) == (0, 0, 0, 1)
        assert one.kl == pytest.approx(0, abs=1e-6)


def test_windows_of_a_document_are_one_document():
    stage = stage_of()
    examples = DOCUMENTS
    owners = np.array([3, 3, 3, 7, 7, 9])
    meter = Meter({"apart": examples, "together": Documents(examples, owners)})
    meter.prepare(stage.trainer, stage)
    disturb(stage)
    found = meter.measure(stage.trainer, stage)
    apart, together = found["apart"], found["together"]
    assert (apart.documents, together.documents) == (6, 3)
    assert together.change == pytest.approx(apart.change, abs=1e-12)
    assert together.paired.sums[0] == pytest.approx(apart.paired.sums[:3].sum(), abs=1e-12)
    assert (together.low, together.high) != (apart.low, apart.high)


@pytest.mark.parametrize("batch_tokens", [1, 11, 1000])
def test_how_documents_are_batched_does_not_show(batch_tokens):
    stage = stage_of(dtype=torch.float64, precision="64-true")
    meters = [Meter({"a": DOCUMENTS}, tokens) for tokens in (batch_tokens, 20)]
    for meter in meters:
        meter.prepare(stage.trainer, stage)
    disturb(stage)
    found = [meter.measure(stage.trainer, stage, kl=True)["a"] for meter in meters]
    np.testing.assert_allclose(found[0].paired.sums, found[1].paired.sums, rtol=0, atol=1e-10)
    assert found[0].kl == pytest.approx(found[1].kl, abs=1e-10)


def test_nothing_of_the_model_is_touched():
    stage = stage_of(LoRA(rank=2, dropout=0.5))
    stage.policy.train()
    stage.policy.lm.get_input_embeddings().eval()  # a mode of its own
    modes = [module.training for module in stage.policy.modules()]
    before = {name: parameter.detach().clone() for name, parameter in stage.policy.named_parameters()}
    state = torch.random.get_rng_state()
    meter = Meter({"a": DOCUMENTS})
    meter.prepare(stage.trainer, stage)
    first = meter.measure(stage.trainer, stage, kl=True)["a"]
    assert meter.measure(stage.trainer, stage, kl=True)["a"].paired.sums.tolist() == first.paired.sums.tolist()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in stage.policy.modules()] == modes
    for name, parameter in stage.policy.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_start_scores_come_from_the_cache_also_after_training(monkeypatch, tmp_path):
    stage = stage_of()
    Meter({"a": DOCUMENTS}).prepare(stage.trainer, stage)
    disturb(stage)
    whole = measuring.Meter._score
    expected = Meter({"a": DOCUMENTS, "b": DOCUMENTS[:2]})
    expected.prepare(stage.trainer, stage)

    def never(*args, **kwargs):
        raise AssertionError("scored again")

    monkeypatch.setattr(Meter, "_score", never)
    again = Meter({"a": DOCUMENTS, "b": DOCUMENTS[:2]})
    again.prepare(stage.trainer, stage)
    for sets in ({"a": DOCUMENTS[1:]}, {"a": tiny_examples((9, 4, 14, 12, 7, 5), seed=1)}):
        with pytest.raises(AssertionError, match="scored again"):
            Meter(sets).prepare(stage.trainer, stage)
    other = stage_of(seed=1)
    with pytest.raises(AssertionError, match="scored again"):
        Meter({"a": DOCUMENTS}).prepare(other.trainer, other)
    monkeypatch.setattr(Meter, "_score", whole)
    for file in (tmp_path / "cache").rglob("*.npz"):
        file.write_bytes(file.read_bytes()[:100])
    torn = Meter({"a": DOCUMENTS, "b": DOCUMENTS[:2]})
    torn.prepare(stage.trainer, stage)
    found = [meter.measure(stage.trainer, stage)["a"].change for meter in (expected, again, torn)]
    assert found[0] == found[1]
    assert found[2] == pytest.approx(found[0], abs=1e-6)


def test_a_cache_that_cannot_be_written_is_said(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    stage = stage_of()
    Meter({"a": DOCUMENTS}).prepare(stage.trainer, stage)
    assert "start scores are not kept" in capsys.readouterr().out


# ---- drift ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["LoRA", "LoRA on the output layer", "LoRA with a trained module", "Full"])
def test_drift_against_the_weights_themselves(method):
    """Each weight as the merged model has it, less the weight of the base model."""
    stage = stage_of(METHODS[method](), dtype=torch.float64, precision="64-true", family="llama_untied")
    lm, strategy = stage.policy.lm, stage.strategy
    norms = start_norms(lm, strategy)
    assert drift(lm, strategy, norms).overall == 0
    disturb(stage)
    found = drift(lm, strategy, norms)
    merged = copy.deepcopy(lm)
    strategy.merge(merged)
    start = dict(tiny_lm("llama_untied", torch.float64).named_parameters())
    moved, size = {}, {}
    for name, parameter in merged.named_parameters():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else OUTSIDE
        moved[layer] = moved.get(layer, 0) + float((parameter - start[name]).detach().square().sum())
        size[layer] = size.get(layer, 0) + float(start[name].square().sum())
    assert set(found.layers) == {OUTSIDE, 0, 1}
    for layer, value in found.layers.items():
        assert value == pytest.approx((moved[layer] / size[layer]) ** 0.5, rel=1e-9)
    assert found.overall == pytest.approx((sum(moved.values()) / sum(size.values())) ** 0.5, rel=1e-9)


def test_a_strategy_that_changes_no_weight_has_no_drift():
    stage = stage_of(PromptTuning(num_virtual_tokens=2))
    assert drift(stage.policy.lm, stage.strategy, start_norms(stage.policy.lm, stage.strategy)) is None
