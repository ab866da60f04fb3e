"""TokenSelection and SampleWeighting: what is trained, and how much, follows from the start model's losses."""

import json
import math

import lightning as L
import numpy as np
import pytest
import torch

from ftlit.batch import Example
from ftlit.data.datamodules import SFTData
from ftlit.data.store import Examples, Joined, measure
from ftlit.errors import ConfigError
from ftlit.forgetting import SampleWeighting, TokenSelection
from ftlit.peft import Full, LoRA
from ftlit.stages import SFT
from ftlit.testing import tiny_examples, tiny_lm, tiny_tokenizer
from ftlit.testing.control_suite import OWN, TinyData
from tests.forgetting.test_replay import losses
from tests.stages.test_step import Data, Record


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIT_CACHE", str(tmp_path / "cache"))


def fit(control, data=None, strategy=None, steps=3):
    torch.manual_seed(0)
    stage = SFT(tiny_lm("llama", torch.float64), strategy or LoRA(rank=3), lr=1e-2, warmup=0, schedule="constant")
    stage.tokenizer = tiny_tokenizer()
    record = Record()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, precision="64-true",
        enable_model_summary=False, max_steps=steps, max_epochs=-1, callbacks=[control, record], num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(stage, data or TinyData())
    return stage, record, trainer.datamodule


def start_losses():
    """NLL of each trained token of each row, one example at a time."""
    lm = tiny_lm("llama", torch.float64)
    return [losses(lm, row)[0].detach().numpy() for row in tiny_examples(OWN)]


def trained(data):
    return [[w for w in row.weights if w] for row in data.sets["train"]]


def test_the_most_surprising_tokens_are_not_trained():
    _, _, data = fit(TokenSelection(share=0.25))
    nll = start_losses()
    every = np.concatenate(nll)
    rows = data.sets["train"]
    left_out, kept_anyway = 0, 0
    limit = np.sort(every)[::-1][int(0.25 * len(every)) - 1]
    for row, before, one in zip(rows, tiny_examples(OWN), nll, strict=True):
        places = [i for i, weight in enumerate(before.weights) if weight]
        keep = one < limit
        if not keep.any():
            keep[one.argmin()] = True
            kept_anyway += 1
        assert [i for i in places if row.weights[i]] == [i for i, kept in zip(places, keep, strict=True) if kept]
        assert list(row.input_ids) == list(before.input_ids)
        left_out += int((~keep).sum())
    assert left_out + kept_anyway >= int(0.25 * len(every)) > left_out - 1
    assert measure(rows).targets.sum() == len(every) - left_out


def test_by_perplexity_as_in_the_paper(capsys):
    nll = start_losses()
    limit = math.exp(float(np.quantile(np.concatenate(nll), 0.6)))
    _, _, data = fit(TokenSelection(max_perplexity=limit))
    for row, one in zip(trained(data), nll, strict=True):
        assert len(row) == max(1, int((one <= math.log(limit)).sum()))
    out = capsys.readouterr().out
    left_out = sum(map(len, nll)) - sum(map(len, trained(data)))
    assert f"token_selection: {left_out:,} of {sum(map(len, nll)):,} trained tokens" in out
    assert "keep one token only" in out


def test_the_gradient_is_that_of_the_tokens_that_are_left():
    stage, record, data = fit(TokenSelection(share=0.25), strategy=Full(), steps=1)
    lm = tiny_lm("llama", torch.float64)
    rows = [Example([int(i) for i in row.input_ids], list(row.weights)) for row in data.sets["train"]][:8]
    torch.cat([losses(lm, row)[0] for row in rows]).mean().backward()
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(record.grads[0][f"policy.lm.{name}"], parameter.grad, rtol=1e-8, atol=1e-10)
    assert stage.step_metrics["train/loss"] > 0


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_an_example_counts_by_its_loss_under_the_start_model(temperature):
    _, record, data = fit(SampleWeighting(temperature), strategy=Full(), steps=1)
    nll = start_losses()
    means = np.array([one.mean() for one in nll])
    weights = np.exp(-means / (temperature * np.median(means)))
    counts = np.array([len(one) for one in nll])
    weights *= counts.sum() / (weights * counts).sum()
    for row, weight, count in zip(trained(data), weights, counts, strict=True):
        assert row == pytest.approx([weight] * count, rel=1e-6)
    assert measure(data.sets["train"]).weights.sum() == pytest.approx(counts.sum(), rel=1e-6)
    lm = tiny_lm("llama", torch.float64)
    total = sum(
        float(np.float32(weight)) * losses(lm, row)[0].sum()
        for weight, row in zip(weights[:8], tiny_examples(OWN)[:8], strict=True)
    )
    (total / (weights * counts)[:8].sum()).backward()
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(record.grads[0][f"policy.lm.{name}"], parameter.grad, rtol=1e-5, atol=1e-6)


def test_equal_weights_change_nothing():
    first, _, _ = fit(SampleWeighting(float("inf")))
    second, _, _ = fit(TokenSelection(share=0.0))
    plain = fit(Record())[0]
    for one, two, three in zip(first.parameters(), second.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, three, rtol=0, atol=1e-12)
        assert torch.equal(two, three)


def test_stored_rows_take_other_weights():
    """Windows of one text share a token that only one of them trains; sources keep their own factors."""
    text = Example(list(range(9)), [0.0] + [1.0] * 8)
    windows, _ = Examples.of([text], [0], [True]).cut(4)
    other = Examples.of(tiny_examples((5, 3)), [0, 1], [False, False])
    joined = Joined([windows, other])
    factors = np.arange(1.0, 1 + joined.measures().targets.sum())
    made = joined.reweighted(factors)
    assert [w for row in made for w in row.weights if w] == factors.tolist()
    assert [list(row.input_ids) for row in made] == [list(row.input_ids) for row in joined]
    assert made.measures().lengths.tolist() == joined.measures().lengths.tolist()
    assert made.measures().weights.sum() == factors.sum()
    assert made.find(3) == joined.find(3)
    factors[::2] = 0
    assert joined.reweighted(factors).measures().targets.sum() == np.count_nonzero(factors)
    assert joined.measures().weights.sum() == joined.measures().targets.sum()  # the old ones are as they were


def test_mixed_sources_are_planned_by_the_tokens_that_are_left(tmp_path):
    for name in ("a", "b"):
        rows = [{"text": f"{name} text number {i} {'x' * i}"} for i in range(9)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = SFTData({str(tmp_path / "a.jsonl"): 3, str(tmp_path / "b.jsonl"): 1}, batch_size=4, cache=False)
    data.use_tokenizer(tiny_tokenizer())
    _, _, data = fit(TokenSelection(share=0.3), data=data, steps=2)
    counts = measure(data.sets["train"]).targets
    before = sum(len(row.input_ids) - 1 for row in data.sets["train"])
    assert counts.sum() == before - int(0.3 * before)
    order = data.mixture.order(0)
    first = sum(int(counts[i]) for i in order if i < 9)
    assert first / sum(int(counts[i]) for i in order) == pytest.approx(0.75, abs=0.1)
    assert data.rendered(0)
    assert data.where(0)


def test_what_they_cannot_do_is_refused_in_a_sentence():
    for control in (TokenSelection(), SampleWeighting()):
        with pytest.raises(ConfigError, match="use it with SFT"):
            fit(control, data=Data(tiny_examples(OWN)))
    for make, settings in (
        (TokenSelection, {"share": 1.0}), (TokenSelection, {"max_perplexity": 0.5}),
        (TokenSelection, {"share": 0.1, "max_perplexity": 2.5}), (SampleWeighting, {"temperature": 0.0}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=make.__name__):
            make(**settings)
