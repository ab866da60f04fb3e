"""TRL 1.16 as the anchor of SFT with LoRA: the same loss and gradient norm at every optimizer step."""

import functools
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ftlit
from ftlit.batch import Example
from ftlit.data.formats.base import Conversation, Message
from ftlit.data.templating import ChatTemplate
from ftlit.objectives.sft import DFT, LabelSmoothing
from ftlit.stages import SFT
from ftlit.testing import tiny_lm, tiny_tokenizer

trl = pytest.importorskip("trl")

pytestmark = pytest.mark.xdist_group("trl_sft")

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def bench():
    """`peers` with the names of `measure` that it is used with."""
    sys.path.insert(0, str(BENCH))
    try:
        peers, measure = importlib.import_module("peers"), importlib.import_module("measure")
        yield SimpleNamespace(**{**vars(measure), **vars(peers)})
    finally:
        sys.path.remove(str(BENCH))
        for name in ("peers", "measure"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def examples():
    """16 conversations of different lengths, every third with two answers."""
    template = ChatTemplate(tiny_tokenizer())
    made = []
    for i in range(16):
        turns = [Message("user", "Say " + "ab" * (i * 5 % 9)), Message("assistant", "cd " * (1 + i * 7 % 11))]
        if i % 3 == 0:
            turns += [Message("user", "Again"), Message("assistant", f"No. {i}")]
        made += template.encode(Conversation(tuple(turns)))
    assert len(made) == 16
    return made


@pytest.fixture(scope="module")
def settings(bench):
    """Four steps of four examples; the token cap cuts steps into several micro-batches."""
    return bench.Settings(batch_size=4, max_tokens=150)


@pytest.fixture(scope="module")
def adapter(bench, settings):
    return bench.initial_adapter(tiny_lm("llama"), settings.rank)


@pytest.fixture(scope="module")
def ours(bench, examples, settings, adapter):
    return bench.run_ftlit(examples, tiny_lm("llama"), tiny_tokenizer(), adapter, settings)


@pytest.mark.parametrize(("configuration", "micro"), [("bucketed", 4), ("bucketed", 2), ("packed", 4), ("packed", 1)])
def test_every_step_agrees(bench, examples, settings, adapter, ours, configuration, micro):
    theirs = bench.run_trl(
        examples,
        tiny_lm("llama"),
        tiny_tokenizer(),
        adapter,
        settings._replace(micro=micro),
        configuration=configuration,
    )
    assert len(ours) == 4
    assert all(value <= TOLERANCE for apart in bench.differences(ours, theirs) for value in apart)
    # The comparison covers clipping and a moving model.
    assert all(step.grad_norm > settings.clip for step in ours)
    assert abs(ours[0].lr - ours[-1].lr) > 0


def test_a_trained_token_after_the_end_token_is_seen(bench, examples, settings, adapter, ours):
    """What TRL's own tokenization would do with a template that closes a turn with a line break."""
    (line_break,) = tiny_tokenizer()("\n", add_special_tokens=False)["input_ids"]
    longer = [Example([*ids, line_break], [*weights, 1.0]) for ids, weights, *_ in examples]
    theirs = bench.run_trl(longer, tiny_lm("llama"), tiny_tokenizer(), adapter, settings)
    assert all(apart.loss > 1e-3 for apart in bench.differences(ours, theirs))


@pytest.mark.parametrize("configuration", ["single", "padded"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_plain_loop_agrees_too(bench, examples, settings, adapter, method, configuration):
    settings = settings._replace(method=method)
    runs = [
        run(examples, tiny_lm("llama"), tiny_tokenizer(), adapter, settings, **options)
        for run, options in ((bench.run_ftlit, {}), (bench.run_plain, {"configuration": configuration}))
    ]
    assert all(value <= TOLERANCE for apart in bench.differences(*runs) for value in apart)


def test_trl_trains_every_weight_the_same(bench, examples, settings, adapter):
    settings = settings._replace(method="full")
    ours = bench.run_ftlit(examples, tiny_lm("llama"), tiny_tokenizer(), adapter, settings)
    theirs = bench.run_trl(examples, tiny_lm("llama"), tiny_tokenizer(), adapter, settings)
    assert all(value <= TOLERANCE for apart in bench.differences(ours, theirs) for value in apart)


def test_examples_of_one_length(bench, examples):
    made = bench.of_length(examples, 40, 5)
    assert [len(example.input_ids) for example in made] == [40] * 5
    assert all(example.weights[0] == 0 and example.num_targets for example in made)


@pytest.mark.parametrize(
    ("theirs", "objective"), [({"loss_type": "dft"}, DFT()), ({"label_smoothing_factor": 0.2}, LabelSmoothing(0.2))]
)
def test_other_objectives_train_the_same_adapter(bench, examples, settings, adapter, monkeypatch, theirs, objective):
    monkeypatch.setattr(trl, "SFTConfig", functools.partial(trl.SFTConfig, **theirs))
    monkeypatch.setattr(ftlit, "SFT", functools.partial(SFT, objective=objective), raising=False)
    models = tiny_lm("llama"), tiny_lm("llama")
    ours = bench.run_ftlit(examples, models[0], tiny_tokenizer(), adapter, settings)
    other = bench.run_trl(examples, models[1], tiny_tokenizer(), adapter, settings)
    assert [step.grad_norm for step in ours] == pytest.approx([step.grad_norm for step in other], rel=TOLERANCE)
    trained = [
        {n.replace(".default.weight", ""): p for n, p in lm.named_parameters() if p.requires_grad} for lm in models
    ]
    assert trained[0].keys() == trained[1].keys()
    for name, parameter in trained[0].items():
        torch.testing.assert_close(parameter, trained[1][name], rtol=0, atol=1e-4)
    plain = bench.run_ftlit(examples, tiny_lm("llama"), tiny_tokenizer(), adapter, settings)
    assert plain[0].loss == pytest.approx(ours[0].loss, rel=1e-6)  # the NLL is logged, whatever is minimized
