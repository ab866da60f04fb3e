import itertools
import math

import pytest
import torch

from ftlit.metrics.classification import ClassificationMetric
from ftlit.metrics.intervals import wilson
from ftlit.metrics.rewards import RankingMetric


def f1_of(said, wanted):
    """From counts of two lists of yes and no."""
    both = sum(a and b for a, b in zip(said, wanted, strict=True))
    return 2 * both / (sum(said) + sum(wanted)) if sum(said) + sum(wanted) else 0.0


def area_of(scores, wanted):
    """The share of (yes, no) pairs in which the yes has the higher score; a tie is half."""
    yes = [s for s, w in zip(scores, wanted, strict=True) if w]
    no = [s for s, w in zip(scores, wanted, strict=True) if not w]
    return sum((a > b) + (a == b) / 2 for a in yes for b in no) / (len(yes) * len(no))


def means(scores, said, wanted):
    """Mean F1 and mean area over the columns."""
    f1 = [f1_of(said[:, n].tolist(), wanted[:, n].tolist()) for n in range(scores.shape[1])]
    areas = [area_of(scores[:, n].tolist(), wanted[:, n].tolist()) for n in range(scores.shape[1])]
    return sum(f1) / len(f1), sum(areas) / len(areas)


def filled(scores, labels, weights, multi_label=False, cut=(2, 5)):
    """The metric over three batches, the last with a filler."""
    metric = ClassificationMetric(scores.shape[1], multi_label)
    losses = torch.arange(len(scores), dtype=torch.float32)
    bounds = [0, *cut, len(scores)]
    for first, last in itertools.pairwise(bounds):
        part = slice(first, last)
        metric.update(scores[part], labels[part], losses[part], weights[part])
    metric.update(scores[:1] + 100, labels[:1], losses[:1] + 100, torch.zeros(1))
    return {name: value.item() for name, value in metric.compute().items()}


def test_one_label_a_row_against_loops():
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(30, 3, generator=generator), torch.randint(3, (30,), generator=generator)
    weights = torch.rand(30, generator=generator) + 0.5
    found = filled(scores, labels, weights)
    hits = (scores.argmax(1) == labels).sum().item()
    assert found["accuracy"] == pytest.approx(hits / 30)
    assert (found["accuracy_low"], found["accuracy_high"]) == wilson(hits, 30)
    assert found["loss"] == pytest.approx(((torch.arange(30) * weights).sum() / weights.sum()).item(), rel=1e-6)
    columns = [torch.nn.functional.one_hot(numbers, 3) for numbers in (scores.argmax(1), labels)]
    f1, area = means(scores.double().softmax(1), *columns)
    assert (found["f1"], found["auroc"]) == pytest.approx((f1, area), abs=1e-6)


def test_several_labels_a_row_against_loops():
    generator = torch.Generator().manual_seed(1)
    scores, labels = torch.randn(30, 4, generator=generator), torch.randint(2, (30, 4), generator=generator)
    found = filled(scores, labels, torch.ones(30), multi_label=True)
    right = (scores > 0).long() == labels
    assert found["accuracy"] == pytest.approx(right.double().mean().item())
    assert found["exact_match"] == pytest.approx(right.all(1).double().mean().item())
    f1, area = means(scores, (scores > 0).long(), labels)
    assert (found["f1"], found["auroc"]) == pytest.approx((f1, area), abs=1e-6)


def test_labels_that_no_row_has_do_not_count_in_the_area():
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.5, 0.0, -1.0]])
    found = filled(scores, torch.tensor([0, 1, 0]), torch.ones(3), cut=(1, 2))
    assert found["auroc"] == 1.0
    assert math.isnan(filled(scores, torch.tensor([0, 0, 0]), torch.ones(3), cut=(1, 2))["auroc"])


def test_rankings_by_hand():
    metric = RankingMetric()
    metric.update(*(torch.tensor(v) for v in ([1.0, 2.0], [0.0, 2.0], [0.3, 0.7], [1.0, 2.0], [4, 5])))
    metric.update(
        *(torch.tensor(v) for v in ([1.0, 3.0, 9.0], [5.0, 1.0, 0.0], [4.0, 0.1, 9.0], [2.0, 2.0, 0.0], [5, 5, 0]))
    )
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found["accuracy"] == pytest.approx((1 + 1.5 / 3) / 2)  # row 4: right; row 5: a tie, wrong, right
    assert found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"]
    assert found["loss"] == pytest.approx((0.3 + 2 * (0.7 + 4 + 0.1)) / 7)
    assert found["margin"] == pytest.approx((1 + 2 * (0 - 4 + 2)) / 7)
    assert found["rewards/chosen"] - found["rewards/rejected"] == pytest.approx(found["margin"])
    assert sorted(metric.all_differences.tolist()) == [-4, 0, 1, 2]
