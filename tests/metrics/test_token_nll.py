import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ftlit.metrics import TokenNLL

STATES = ("nll", "hits", "weight")


def tensors(tokens, dtype=torch.float32):
    logps, correct, weights = zip(*tokens, strict=True) if tokens else ((), (), ())
    return torch.tensor(logps, dtype=dtype), torch.tensor(correct, dtype=torch.bool), torch.tensor(weights, dtype=dtype)


def measured(*batches):
    metric = TokenNLL()
    for batch in batches:
        metric.update(*batch)
    return {name: value.item() for name, value in metric.compute().items()}


def test_loss_perplexity_and_accuracy_of_three_tokens():
    result = measured(tensors([(-1.0, True, 1.0), (-2.0, False, 1.0), (-6.0, True, 2.0)], torch.float64))
    assert result == {
        "loss": pytest.approx(15 / 4, rel=1e-15),
        "perplexity": pytest.approx(math.exp(3.75), rel=1e-14),
        "accuracy": pytest.approx(3 / 4, rel=1e-15),
    }


def test_fillers_count_nothing():
    real = tensors([(-1.0, True, 1.0), (-2.0, False, 1.0)])
    filler = tensors([(-99.0, True, 0.0), (-99.0, False, 0.0)])
    assert measured(real, filler) == measured(real)


TOKENS = st.lists(
    st.tuples(
        st.floats(-50, 0, width=32, allow_subnormal=False),
        st.booleans(),
        st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]),
    ),
    min_size=1,
    max_size=30,
).filter(lambda tokens: any(weight for _, _, weight in tokens))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(TOKENS, st.lists(st.integers(0, 30), max_size=4))
def test_any_split_equals_the_direct_float64_mean(tokens, cuts):
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    result = measured(*(tensors(tokens[a:b]) for a, b in pairwise(edges)))
    weight = math.fsum(w for _, _, w in tokens)
    loss = math.fsum(-logp * w for logp, _, w in tokens) / weight
    assert result["loss"] == pytest.approx(loss, rel=1e-12, abs=1e-30)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-10)
    assert result["accuracy"] == pytest.approx(math.fsum(w for _, hit, w in tokens if hit) / weight, rel=1e-12)


def test_small_terms_after_a_large_one_are_not_lost():
    large = tensors([(-float(2**24), True, 1.0)])
    small = [tensors([(-1.0, False, 1.0)]) for _ in range(1000)]
    assert measured(large, *small)["loss"] == (2**24 + 1000) / 1001


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_summed_in_float64(dtype):
    logps = torch.full((5000,), -1.0, dtype=dtype)
    metric = TokenNLL()
    metric.update(logps, torch.ones(5000, dtype=torch.bool), torch.ones(5000, dtype=dtype))
    assert metric.weight.item() == 5000
    assert metric.compute()["loss"].item() == 1.0


CASTS = {
    "to": lambda metric: metric.to(torch.float16),
    "to-bfloat16": lambda metric: metric.to(torch.bfloat16),
    "to-device-and-dtype": lambda metric: metric.to("cpu", torch.float16),
    "half": lambda metric: metric.half(),
    "float": lambda metric: metric.float(),
    "set_dtype": lambda metric: metric.set_dtype(torch.float16),
    "parent-half": lambda metric: nn.ModuleDict({"x": metric}).half()["x"],
    "parent-to": lambda metric: nn.ModuleDict({"x": metric}).to(torch.float16)["x"],
}


@pytest.mark.parametrize("cast", CASTS)
def test_sums_stay_float64_whatever_the_model_is_cast_to(cast):
    metric = CASTS[cast](TokenNLL())
    metric.update(*tensors([(-1.0, True, 1.0)]))
    metric = CASTS[cast](metric)
    metric.update(*tensors([(-(2.0**-20), True, 1.0)]))
    assert {getattr(metric, name).dtype for name in STATES} == {torch.float64}
    assert metric.compute()["loss"].item() == (1 + 2.0**-20) / 2
    metric.reset()
    assert {getattr(metric, name).dtype for name in STATES} == {torch.float64}


def test_no_gradient_is_kept():
    logps = torch.tensor([-1.0], requires_grad=True)
    metric = TokenNLL()
    metric.update(logps, torch.tensor([True]), torch.tensor([1.0]))
    assert not metric.nll.requires_grad


def test_reset_starts_anew():
    metric = TokenNLL()
    metric.update(*tensors([(-5.0, True, 1.0)]))
    metric.reset()
    metric.update(*tensors([(-1.0, False, 1.0)]))
    assert metric.compute()["loss"].item() == 1.0


def test_merging_two_ranks_adds_their_sums():
    ranks = TokenNLL(), TokenNLL()
    ranks[0].update(*tensors([(-1.0, True, 1.0)]))
    ranks[1].update(*tensors([(-4.0, False, 2.0)]))
    ranks[0].merge_state(ranks[1])
    assert ranks[0].compute()["loss"].item() == 3.0
    assert all(ranks[0]._reductions[name] is ranks[0]._reductions["nll"] for name in STATES)


def test_nothing_measured_is_not_a_number():
    metric = TokenNLL()
    metric.update(*tensors([]))
    assert all(math.isnan(value.item()) for value in metric.compute().values())
