"""Intervals of margins and accuracies: over the rows, by weight, whatever the batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.metrics.intervals import bootstrap, wilson
from ftlit.metrics.pairs import PairMetric


def compute(margins, weights, rows, cuts=()):
    metric = PairMetric(("count",), lambda sums: {})
    for part in torch.tensor_split(torch.arange(len(rows)), [c for c in sorted(cuts) if c < len(rows)]):
        metric.add({"count": torch.ones(())}, *(torch.tensor(values)[part] for values in (margins, weights, rows)))
    return {name: value.item() for name, value in metric.compute().items()}


def test_one_pair_a_row():
    found = compute([0.5, -0.25, 1.0, 2.0], [1.0, 1.0, 1.0, 0.0], [0, 1, 2, -1])
    low, high = bootstrap([0.5, -0.25, 1.0])
    assert (found["rewards/margins_low"], found["rewards/margins_high"]) == (low, high)
    assert (found["rewards/accuracies_low"], found["rewards/accuracies_high"]) == wilson(2, 3)


def test_rows_of_several_pairs_are_drawn_whole_and_by_weight():
    found = compute([1.0, 3.0, -1.0], [2.0, 1.0, 1.0], [7, 7, 9])
    for name, values in (("margins", [5 / 3, -1.0]), ("accuracies", [1.0, 0.0])):
        ends = bootstrap(values, [3.0, 1.0])
        assert (found[f"rewards/{name}_low"], found[f"rewards/{name}_high"]) == pytest.approx(ends)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 3), st.sampled_from([0.5, 1.0])), min_size=1, max_size=9), st.data())
def test_batches_do_not_matter(pairs, data):
    margins, weights = map(list, zip(*pairs, strict=True))
    rows = data.draw(st.lists(st.integers(0, 4), min_size=len(pairs), max_size=len(pairs)))
    cuts = data.draw(st.lists(st.integers(1, 9), max_size=3))
    assert compute(margins, weights, rows, cuts) == pytest.approx(compute(margins, weights, rows))


def test_no_pairs():
    assert compute([1.0], [0.0], [0]) == {}
