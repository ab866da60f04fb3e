"""Added rows: exact fractions, a function of the position, and micro-batches that are the same without them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.batch import Example, pack
from ftlit.data.added import AddedRows
from ftlit.data.packing import FILLER, StepLoader, StepPlanner
from ftlit.errors import ConfigError

lengths = st.lists(st.integers(2, 12), min_size=1, max_size=12)


def examples(sizes, first=0):
    return [Example([first + i] * size, [0] + [1] * (size - 1)) for i, size in enumerate(sizes)]


@settings(max_examples=60, deadline=None)
@given(lengths, st.floats(0.003, 3), st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_tokens_given_are_the_tokens_asked_for_to_half_an_example(sizes, ratio, steps):
    rows = AddedRows("r", examples(sizes), ratio)
    given_tokens, before = 0, 0
    for targets in steps:
        chosen = rows.between(before, before + targets)
        before += targets
        given_tokens += sum(int(rows.targets[i]) for i in chosen)
        assert abs(given_tokens - ratio * before) <= max(rows.targets) / 2 + 1e-6


def test_every_pass_holds_every_example_once_in_an_order_of_its_own():
    rows = AddedRows("r", examples([3] * 20), 1.0)
    passes = [rows.between(40 * n, 40 * (n + 1)) for n in range(3)]
    assert all(sorted(chosen) == list(range(20)) for chosen in passes)
    assert passes[0] != passes[1] != passes[2]
    assert rows.between(0, 120) == [*passes[0], *passes[1], *passes[2]]
    assert AddedRows("r", examples([3] * 20), 1.0, seed=1).between(0, 40) != passes[0]


def test_rows_without_a_trained_token_are_never_taken():
    rows = AddedRows("r", [*examples([4, 4]), Example([7, 7], [0, 0])], 2.0)
    assert set(rows.between(0, 100)) == {0, 1}
    with pytest.raises(ConfigError, match="no trained token"):
        AddedRows("r", [Example([7, 7], [0, 0])], 1.0)
    with pytest.raises(ConfigError, match="ratio"):
        AddedRows("r", examples([3]), 0.0)


@settings(max_examples=60, deadline=None)
@given(
    lengths, lengths, lengths, st.integers(1, 3), st.integers(1, 2), st.integers(1, 3),
    st.one_of(st.none(), st.integers(4, 40)), st.floats(0.05, 2), st.integers(0, 3),
)  # fmt: skip
def test_own_micro_batches_are_the_same_with_and_without(own, one, two, size, accumulate, world, cap, ratio, epoch):
    settings = {"batch_size": size, "accumulate": accumulate, "world": world, "max_tokens": cap}
    added = [AddedRows("a", examples(one, 100), ratio), AddedRows("b", examples(two, 200), ratio / 3)]
    plain = StepPlanner(examples(own), **settings)
    planner = StepPlanner(examples(own), **settings, added_rows=added)
    before = epoch * sum(plain.targets)
    for number, (alone, step) in enumerate(zip(plain.plan(epoch), planner.plan(epoch), strict=True)):
        assert (alone.ranks, alone.totals) == (step.ranks, step.totals)
        assert [s.ranks for s in planner.steps(epoch, number)] == [s.ranks for s in plain.plan(epoch)[number:]]
        after = before + step.totals.targets
        asked = {(k, i) for k, rows in enumerate(added, 1) for i in rows.between(before, after)}
        before = after
        batches = [StepLoader(examples(own), planner, rank).load(step) for rank in range(world)]
        alone_batches = [StepLoader(examples(own), plain, rank).load(alone) for rank in range(world)]
        assert len({len(b.micro_batches) for b in batches}) == 1
        found = set()
        for batch, other in zip(batches, alone_batches, strict=True):
            assert batch.own == len(other.micro_batches)
            for micro in batch.micro_batches:
                places = list(zip(micro.examples, micro.sources, strict=True))
                found |= {(source, example) for example, source in places if source and example != FILLER}
                if cap is not None and len(places) > 1 and any(micro.sources):
                    own_tokens = sum(n for n, s in zip(micro.segments.lengths, micro.sources, strict=True) if s == 0)
                    assert micro.num_tokens <= max(cap, own_tokens)
            bare = batch.only({0})
            assert len(bare.micro_batches) == len(other.micro_batches)
            for left, right in zip(bare.micro_batches, other.micro_batches, strict=True):
                assert torch.equal(left.input_ids, right.input_ids)
                assert torch.equal(left.target_weights, right.target_weights)
                assert left.examples == right.examples
        assert found == asked
        for keep in ({0, 1}, {0, 2}):
            assert len({len(b.only(keep).micro_batches) for b in batches}) == 1


def test_an_epoch_goes_on_where_the_one_before_ended():
    rows = AddedRows("a", examples([5] * 7), 0.3)
    planner = StepPlanner(examples([4, 5, 6, 7, 8]), batch_size=2, added_rows=[rows])
    parts = [part for epoch in range(6) for step in planner.plan(epoch) for rank in step.added[:1] for part in rank]
    taken = [index for part in parts for _, index in part]
    total = sum(planner.targets) * 6
    assert sorted(taken) == sorted(rows.between(0, total))
    assert np.isclose(len(taken) * 4, 0.3 * total, atol=2.1)


def test_part_of_a_batch_is_the_batch_of_the_part():
    some = examples([3, 5, 2, 4])
    batch = pack(some, [4, 5, 6, 7], [0, 1, 0, 2])
    for keep in ({0}, {1}, {0, 2}, {2, 1}):
        chosen = [i for i, source in enumerate(batch.sources) if source in keep]
        alone = pack([some[i] for i in chosen], [batch.examples[i] for i in chosen], [batch.sources[i] for i in chosen])
        part = batch.only(keep)
        assert vars(part).keys() == vars(alone).keys()
        for name, value in vars(alone).items():
            same = getattr(part, name)
            assert torch.equal(value, same) if isinstance(value, torch.Tensor) else repr(value) == repr(same), name
    assert batch.only({0, 1, 2}) is batch
    with pytest.raises(ValueError, match="no segment"):
        batch.only({9})
