from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.batch import Example
from ftlit.data.mixing import Mixture
from ftlit.data.packing import StepLoader, StepPlanner
from ftlit.errors import ConfigError

PROPERTY = settings(max_examples=100, deadline=None, derandomize=True)
SOURCE = st.lists(st.integers(1, 30), min_size=1, max_size=25).map(np.array)
SOURCES = st.lists(st.tuples(SOURCE, st.floats(0.05, 10)), min_size=1, max_size=4)


def mixture_of(sources, **settings):
    return Mixture([targets for targets, _ in sources], [weight for _, weight in sources], **settings)


@PROPERTY
@given(SOURCES, st.integers(0, 3))
def test_over_epochs_every_example_of_a_source_comes_up_equally_often(sources, seed):
    mixture = mixture_of(sources, seed=seed)
    seen = Counter()
    for epoch in range(5):
        order = mixture.order(epoch)
        assert len(order) == len(mixture)
        seen.update(order)
        first = 0
        for (targets, _), count in zip(sources, mixture.counts, strict=True):
            times = [seen[first + i] for i in range(len(targets))]
            assert max(times) - min(times) <= 1
            assert sum(times) == (epoch + 1) * count
            first += len(targets)


@PROPERTY
@given(SOURCES)
def test_an_epoch_holds_every_example_at_least_once(sources):
    mixture = mixture_of(sources)
    assert set(mixture.order(0)) == set(range(sum(len(targets) for targets, _ in sources)))
    assert min(mixture.repeats()) >= 1 or pytest.approx(1) == min(mixture.repeats())
    assert min(mixture.counts[i] - len(sources[i][0]) for i in range(len(sources))) == 0


@PROPERTY
@given(SOURCES, st.integers(0, 9))
def test_shares_of_trained_tokens_are_those_asked_for(sources, seed):
    """Over many epochs: within what rounding the number of examples of each source can do."""
    mixture = mixture_of(sources, seed=seed)
    means = [targets.mean() for targets, _ in sources]
    given_ = [count * mean for count, mean in zip(mixture.counts, means, strict=True)]
    wanted = np.array([weight for _, weight in sources]) / sum(weight for _, weight in sources)
    slack = sum(0.5 * mean for mean in means) / sum(given_)
    assert np.abs(np.array(given_) / sum(given_) - wanted).max() <= slack + 1e-12


def test_shares_of_a_real_sized_epoch_are_close():
    generator = np.random.default_rng(0)
    sources = [(generator.integers(5, 400, size), weight) for size, weight in ((900, 3.0), (4000, 1.0), (150, 0.5))]
    mixture = mixture_of(sources)
    for epoch in range(3):
        assert np.abs(np.array(mixture.shares(epoch)) - np.array([3, 1, 0.5]) / 4.5).max() < 0.01


@PROPERTY
@given(SOURCES, st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_is_a_function_of_seed_and_number(sources, seed, epoch):
    assert mixture_of(sources, seed=seed).order(epoch) == mixture_of(sources, seed=seed).order(epoch)


def test_orders_differ_by_seed_and_epoch():
    sources = [(np.ones(40), 1.0), (np.ones(40), 2.0)]
    orders = {tuple(mixture_of(sources, seed=s).order(e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_epoch_tokens_set_the_length():
    mixture = mixture_of([(np.full(100, 10), 1.0), (np.full(1000, 5), 3.0)], epoch_tokens=400)
    assert mixture.counts == [10, 60]
    assert [len(set(mixture.drawn(0, e)) & set(mixture.drawn(0, e + 1))) for e in range(3)] == [0, 0, 0]


def test_without_shuffle_streams_keep_their_order_and_are_interleaved():
    mixture = mixture_of([(np.ones(2), 1.0), (np.ones(4), 2.0)], shuffle=False)
    assert mixture.order(0) == mixture.order(7) == [2, 0, 3, 4, 1, 5]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_must_be_positive(weight):
    with pytest.raises(ConfigError, match="must be positive"):
        mixture_of([(np.ones(2), weight)])


@PROPERTY
@given(SOURCES, st.integers(1, 3), st.integers(1, 3), st.integers(0, 40))
def test_a_mixed_loader_resumes_at_the_exact_step(sources, batch_size, accumulate, taken):
    examples = [Example([7 * i] * (int(n) + 1), [0.0] + [1.0] * int(n)) for s, _ in sources for i, n in enumerate(s)]

    def loader():
        planner = StepPlanner(
            examples, batch_size=batch_size, accumulate=accumulate, max_tokens=40, mixture=mixture_of(sources, seed=2)
        )
        return StepLoader(examples, planner)

    def take(one, steps):
        found = []
        while len(found) < steps:
            for step in one:
                found.append([batch.examples for batch in step.micro_batches])
                if len(found) == steps:
                    break
        return found

    assert len(loader()) == -(-len(mixture_of(sources)) // (batch_size * accumulate))
    taken %= 2 * len(loader()) + 1
    straight = take(loader(), taken + 3)
    resumed = loader()
    resumed.load_state_dict({"taken": taken})
    assert take(resumed, 3) == straight[taken:]
    first = [i for step in straight[: len(loader())] for part in step for i in part]
    if taken + 3 >= len(loader()):
        assert sorted(first) == sorted(mixture_of(sources, seed=2).order(0))
