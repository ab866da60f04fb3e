import itertools
import math

import numpy as np
import pytest

from ftlit.metrics.forgetting import PairedChange, t_quantile, task_sequence


def documents(generator, count, change=0.02, within=0.6, between=0.05, skewed=False):
    """Documents of unequal length whose tokens hang together: sums of changes, and tokens."""
    lengths = generator.integers(5, 60, size=count)
    own = generator.standard_normal(count) * between
    if skewed:
        own = between * (generator.exponential(size=count) - 1)
    sums = [(change + own[i]) * n + within * generator.standard_normal(n).sum() for i, n in enumerate(lengths)]
    return np.array(sums), lengths


def coverage(count, skewed, runs=1500, resamples=400):
    """How often the interval and the one-sided bound hold the true change, which is 0.02."""
    generator = np.random.default_rng(7)
    two = one = 0
    for run in range(runs):
        paired = PairedChange(*documents(generator, count, skewed=skewed), resamples=resamples, seed=run)
        low, high = paired.interval()
        two += low <= 0.02 <= high
        one += paired.upper() >= 0.02
    return two / runs, one / runs


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("count", [25, 60, 150])
def test_nominal_95_percent_covers_95_percent(count, skewed):
    for share in coverage(count, skewed):
        assert 0.93 <= share <= 0.97


def test_ignoring_documents_would_not_cover():
    """The same data as single tokens: what a bootstrap over tokens would say."""
    generator = np.random.default_rng(3)
    inside, runs = 0, 400
    for _ in range(runs):
        lengths = generator.integers(5, 60, size=60)
        own = generator.standard_normal(60) * 0.3
        tokens = np.concatenate([0.02 + own[i] + 0.6 * generator.standard_normal(n) for i, n in enumerate(lengths)])
        half = 1.96 * tokens.std(ddof=1) / math.sqrt(len(tokens))
        inside += abs(tokens.mean() - 0.02) <= half
    assert inside / runs < 0.8


def test_estimate_and_standard_error_against_loops():
    generator = np.random.default_rng(0)
    sums, counts = documents(generator, 30)
    one = PairedChange(sums, counts)
    total = tokens = 0.0
    for d, n in zip(sums, counts, strict=True):
        total, tokens = total + d, tokens + n
    change = total / tokens
    assert one.change == pytest.approx(change, rel=1e-12)
    assert (one.documents, one.tokens) == (30, counts.sum())
    squares = 0.0
    for d, n in zip(sums, counts, strict=True):
        squares += (d - change * n) ** 2
    assert one.standard_error == pytest.approx(math.sqrt(30 / 29 * squares) / tokens, rel=1e-12)


def test_with_equal_documents_the_standard_error_is_that_of_their_means():
    means = np.random.default_rng(1).standard_normal(50)
    one = PairedChange(means * 8, np.full(50, 8))
    assert one.standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(50), rel=1e-12)


def test_draws_are_the_resampled_ratio():
    """All 27 resamples of three documents, with their probabilities, against the drawn distribution."""
    sums, counts = np.array([1.0, -2.0, 4.0]), np.array([3, 1, 8])
    expected = sorted(
        sum(sums[i] for i in chosen) / sum(counts[i] for i in chosen)
        for chosen in itertools.product(range(3), repeat=3)
    )
    draws = PairedChange(sums, counts, resamples=40_000)._draws
    values, shares = np.unique(np.round(expected, 9), return_counts=True)
    drawn, times = np.unique(np.round(draws, 9), return_counts=True)
    assert np.array_equal(values, drawn)
    assert np.abs(times / 40_000 - shares / 27).max() < 0.01


def test_interval_of_many_documents_is_the_normal_one():
    one = PairedChange(*documents(np.random.default_rng(2), 3000), resamples=4000)
    low, high = one.interval()
    assert low == pytest.approx(one.change - 1.96 * one.standard_error, abs=0.1 * one.standard_error)
    assert high == pytest.approx(one.change + 1.96 * one.standard_error, abs=0.1 * one.standard_error)
    assert one.upper() == pytest.approx(one.change + 1.645 * one.standard_error, abs=0.1 * one.standard_error)
    assert one.change < one.upper(0.9) < one.upper(0.95) < one.upper(0.99)


def test_blocks_of_draws_are_one_distribution(monkeypatch):
    from ftlit.metrics import forgetting

    given = documents(np.random.default_rng(4), 200)
    whole = PairedChange(*given).interval()
    monkeypatch.setattr(forgetting, "_BLOCK", 1000)
    assert PairedChange(*given).interval() == whole


def test_the_same_numbers_give_the_same_interval_and_no_global_generator_is_used():
    given = documents(np.random.default_rng(5), 40)
    state = np.random.get_state()[1].copy()
    first = PairedChange(*given).interval()
    assert PairedChange(*given).interval() == first
    assert PairedChange(*given, seed=1).interval() != first
    assert np.array_equal(np.random.get_state()[1], state)


def test_nothing_changed():
    one = PairedChange(np.zeros(20), np.full(20, 7))
    assert (one.change, one.standard_error, *one.interval(), one.upper()) == (0, 0, 0, 0, 0)


def test_one_document_says_nothing_of_its_spread():
    one = PairedChange([1.0], [10])
    assert one.change == 0.1
    assert one.interval() == (-math.inf, math.inf)
    assert one.upper() == one.standard_error == math.inf


@pytest.mark.parametrize(("sums", "counts"), [([], []), ([1.0], [1, 2]), ([1.0, 2.0], [3, 0])])
def test_refused(sums, counts):
    with pytest.raises(ValueError, match="document"):
        PairedChange(sums, counts)


@pytest.mark.parametrize(
    ("level", "freedom", "expected"),  # tables: Abramowitz and Stegun 1964, table 26.10
    [
        (0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 3, 3.182), (0.95, 5, 2.015), (0.975, 10, 2.228),
        (0.975, 30, 2.042), (0.95, 60, 1.671), (0.025, 10, -2.228),
    ],
)  # fmt: skip
def test_t_quantile(level, freedom, expected):
    assert t_quantile(level, freedom) == pytest.approx(expected, abs=2e-3 if freedom != 3 else 1e-2)


# ---- tasks in sequence ----------------------------------------------------------------------------------------------

TABLE = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.75, 0.5, 0.95]]
START = [0.1, 0.15, 0.05]


def test_a_sequence_of_tasks_against_its_definition():
    one = task_sequence(TABLE, START)
    assert one.acc == pytest.approx((0.75 + 0.5 + 0.95) / 3)
    assert one.bwt == pytest.approx(((0.75 - 0.9) + (0.5 - 0.8)) / 2)
    assert one.fwt == pytest.approx(((0.2 - 0.15) + (0.3 - 0.05)) / 2)
    assert one.forgetting == pytest.approx(((0.9 - 0.75) + (0.8 - 0.5)) / 2)


def test_forgetting_is_measured_from_the_best_earlier_stage_or_from_the_first():
    table = [[0.5, 0.6, 0], [0.9, 0.4, 0], [0.7, 0.3, 1]]  # task 0 was best after task 1, task 1 before it was learnt
    assert task_sequence(table).forgetting == pytest.approx(((0.9 - 0.7) + (0.6 - 0.3)) / 2)
    first = task_sequence(table, reference="first")
    assert first.forgetting == pytest.approx(((0.5 - 0.7) + (0.4 - 0.3)) / 2)
    assert first.forgetting == pytest.approx(-first.bwt)


def test_losses_are_negated():
    losses = (-np.array(TABLE)).tolist()
    start = [-value for value in START]
    assert task_sequence(losses, start, lower_is_better=True) == task_sequence(TABLE, START)


def test_what_is_not_known_is_not_a_number():
    assert math.isnan(task_sequence(TABLE).fwt)
    one = task_sequence([[0.5]], [0.1])
    assert one.acc == 0.5
    assert all(math.isnan(value) for value in one[1:])


@pytest.mark.parametrize(
    "given",
    [
        {"scores": [[1.0, 2.0]]},
        {"scores": []},
        {"scores": TABLE, "start": [0.1]},
        {"scores": TABLE, "reference": "best"},
    ],
)
def test_a_table_that_does_not_fit(given):
    with pytest.raises(ValueError, match=r"task|max or first"):
        task_sequence(**given)
