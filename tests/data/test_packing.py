import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.batch import Example
from ftlit.data.packing import FILLER, EvalLoader, StepLoader, StepPlanner

PROPERTY = settings(max_examples=120, deadline=None, derandomize=True)
LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=40)
SMALL = st.integers(1, 4)
CAP = st.none() | st.integers(1, 40)


def examples_of(lengths):
    """Example i holds only tokens 100 * i + place; every second token is trained, with weights 1 and 0.5 in turn."""
    return [
        Example(
            [100 * i + place for place in range(length)],
            [0.0 if place % 2 == 0 else (1.0, 0.5)[i % 2] for place in range(length)],
        )
        for i, length in enumerate(lengths)
    ]


def planner_of(lengths, **settings):
    return StepPlanner(examples_of(lengths), **{"batch_size": 2, **settings})


def members(step):
    return [i for rank in step.ranks for part in rank for i in part]


@PROPERTY
@given(LENGTHS, SMALL, SMALL, SMALL, CAP, st.integers(0, 3), st.booleans())
def test_plan_keeps_its_promises(lengths, batch_size, accumulate, world, max_tokens, epoch, shuffle):
    examples = examples_of(lengths)
    planner = StepPlanner(
        examples,
        batch_size=batch_size,
        accumulate=accumulate,
        world=world,
        max_tokens=max_tokens,
        shuffle=shuffle,
        seed=3,
    )
    steps = planner.plan(epoch)
    assert len(steps) == len(planner)
    assert sorted(i for step in steps for i in members(step)) == list(range(len(lengths)))
    size = batch_size * accumulate * world
    assert [len(members(step)) for step in steps[:-1]] == [size] * (len(steps) - 1)
    assert 1 <= len(members(steps[-1])) <= size
    for step in steps:
        assert len(step.ranks) == world
        assert len({len(rank) for rank in step.ranks}) == 1
        assert len(step.ranks[0]) >= 1
        for rank in step.ranks:
            for part in rank:
                assert len(part) <= batch_size
                if max_tokens is not None and len(part) >= 2:
                    assert sum(lengths[i] for i in part) <= max_tokens
        if max_tokens is None:
            assert len(step.ranks[0]) <= accumulate
        chosen = members(step)
        assert step.totals.examples == len(chosen)
        assert step.totals.tokens == sum(lengths[i] for i in chosen)
        assert step.totals.targets == sum(examples[i].num_targets for i in chosen)
        assert step.totals.weight == pytest.approx(sum(sum(examples[i].weights) for i in chosen), abs=1e-12)


@PROPERTY
@given(LENGTHS, st.permutations([1, 2, 3]), st.permutations([1, 2, 3]), CAP, CAP, st.booleans())
def test_examples_of_a_step_depend_on_the_product_alone(lengths, one, other, cap, other_cap, shuffle):
    plans = [
        planner_of(lengths, batch_size=b, accumulate=a, world=w, max_tokens=c, shuffle=shuffle, seed=1).plan(2)
        for (b, a, w), c in ((one, cap), (other, other_cap))
    ]
    first, second = ([(sorted(members(step)), step.totals.examples) for step in plan] for plan in plans)
    assert first == second


def test_a_step_takes_the_next_examples_of_the_order():
    planner = planner_of([3] * 11, accumulate=2, seed=4)
    order = planner.order(1)
    assert [sorted(members(step)) for step in planner.plan(1)] == [
        sorted(order[:4]),
        sorted(order[4:8]),
        sorted(order[8:]),
    ]
    assert len(planner) == 3


def test_orders_follow_from_seed_and_epoch():
    lengths = [2] * 50
    assert planner_of(lengths, seed=5).order(3) == planner_of(lengths, seed=5).order(3)
    orders = [tuple(planner_of(lengths, seed=seed).order(epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 9
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_without_shuffle_the_order_is_that_of_the_rows():
    planner = planner_of([2] * 5, shuffle=False)
    assert planner.order(0) == planner.order(7) == [0, 1, 2, 3, 4]
    assert [sorted(members(step)) for step in planner.plan(3)] == [[0, 1], [2, 3], [4]]


def test_token_cap_cuts_a_step_and_lone_long_examples_stay():
    (step,) = planner_of([9, 3, 3, 3], batch_size=4, max_tokens=6, shuffle=False).plan(0)
    assert step.ranks == (((0,), (1, 3), (2,)),)


def test_no_more_micro_batches_than_needed():
    (step,) = planner_of([4] * 8, batch_size=8, max_tokens=16, shuffle=False).plan(0)
    assert [len(part) for part in step.ranks[0]] == [4, 4]
    (step,) = planner_of([4] * 8, batch_size=8, max_tokens=32, shuffle=False).plan(0)
    assert [len(part) for part in step.ranks[0]] == [8]


def test_ranks_share_tokens_evenly():
    (step,) = planner_of([8, 1, 1, 1, 1, 4], batch_size=6, world=2, shuffle=False).plan(0)
    loads = [sum([8, 1, 1, 1, 1, 4][i] for part in rank for i in part) for rank in step.ranks]
    assert sorted(loads) == [6, 10]
    assert [sum(len(part) for part in rank) for rank in step.ranks] == [3, 3]


def test_rank_without_examples_gets_a_filler_of_the_shortest():
    examples = examples_of([5, 2, 4])
    planner = StepPlanner(examples, batch_size=1, world=4, shuffle=False)
    micro = [next(iter(StepLoader(examples, planner, rank))).micro_batches for rank in range(4)]
    assert [len(batches) for batches in micro] == [1, 1, 1, 1]
    assert sorted(batches[0].examples for batches in micro) == [(FILLER,), (0,), (1,), (2,)]
    filler = next(batches[0] for batches in micro if batches[0].examples == (FILLER,))
    assert filler.input_ids.tolist() == [[100, 101]]
    assert filler.target_weights.tolist() == [0.0]


@PROPERTY
@given(LENGTHS, SMALL, SMALL, CAP)
def test_weights_loaded_over_all_ranks_sum_to_the_planned_total(lengths, batch_size, world, cap):
    examples = examples_of(lengths)
    planner = StepPlanner(examples, batch_size=batch_size, accumulate=2, world=world, max_tokens=cap, seed=9)
    for steps in zip(*(StepLoader(examples, planner, rank) for rank in range(world)), strict=True):
        assert len({len(step.micro_batches) for step in steps}) == 1
        batches = [batch for step in steps for batch in step.micro_batches]
        assert sum(batch.target_weights.double().sum().item() for batch in batches) == steps[0].totals.weight
        tokens = sum(
            length for b in batches for i, length in zip(b.examples, b.segments.lengths, strict=True) if i >= 0
        )
        assert tokens == steps[0].totals.tokens
        assert {step.totals for step in steps} == {steps[0].totals}


def ids_of(step):
    return [batch.input_ids.tolist() for batch in step.micro_batches]


def loader_of(lengths, **settings):
    examples = examples_of(lengths)
    return StepLoader(
        examples, StepPlanner(examples, **{"batch_size": 2, "accumulate": 2, "max_tokens": 8, **settings})
    )


def take(loader, steps):
    """The next steps, over as many epochs as it takes."""
    taken = []
    while len(taken) < steps:
        for step in loader:
            taken.append(step)
            if len(taken) == steps:
                break
    return [ids_of(step) for step in taken]


LOADED = [3, 5, 2, 7, 1, 4, 6, 2, 3, 5, 4]


@pytest.mark.parametrize("steps", range(8))
def test_resumed_loader_yields_exactly_what_would_have_come(steps):
    straight = take(loader_of(LOADED), 11)
    first = loader_of(LOADED)
    take(first, steps)
    state = first.state_dict()
    assert state == {"taken": steps}
    second = loader_of(LOADED)
    second.load_state_dict(state)
    assert take(second, 11 - steps) == straight[steps:]


def test_loader_yields_an_epoch_at_a_time_and_epochs_differ():
    loader = loader_of(LOADED)
    assert len(loader) == 3
    epochs = [[ids_of(step) for step in loader] for _ in range(3)]
    assert [len(epoch) for epoch in epochs] == [3, 3, 3]
    assert epochs[0] != epochs[1] != epochs[2]
    for epoch in epochs:
        tokens = sorted(token for step in epoch for (row,) in step for token in row)
        assert tokens == sorted(token for example in examples_of(LOADED) for token in example.input_ids)


def test_loader_that_resumes_in_an_epoch_crosses_its_border():
    loader = loader_of(LOADED)
    loader.load_state_dict({"taken": 2})
    expected = take(loader_of(LOADED), 5)[2:]
    assert [ids_of(step) for step in loader] == expected
    assert loader.state_dict() == {"taken": 5}


@PROPERTY
@given(LENGTHS, st.integers(1, 5), st.integers(1, 5), CAP)
def test_evaluation_sees_every_example_once_over_all_ranks(lengths, batch_size, world, cap):
    examples = examples_of(lengths)
    loaders = [EvalLoader(examples, batch_size, cap, rank, world) for rank in range(world)]
    batches = [list(loader) for loader in loaders]
    assert {len(rank) for rank in batches} == {len(loader) for loader in loaders}
    assert len({len(rank) for rank in batches}) == 1
    flat = [batch for rank in batches for batch in rank]
    assert sorted(i for batch in flat for i in batch.examples if i != FILLER) == list(range(len(lengths)))
    for batch in flat:
        assert len(batch.examples) <= batch_size
        assert cap is None or len(batch.examples) < 2 or batch.num_tokens <= cap
        if batch.examples == (FILLER,):
            assert not batch.target_weights.any()
        else:
            assert FILLER not in batch.examples
            rows = [token for i in batch.examples for token in examples[i].input_ids]
            assert batch.input_ids.tolist() == [rows]
    weight = sum(batch.target_weights.double().sum().item() for batch in flat)
    assert weight == sum(sum(example.weights) for example in examples)


def test_evaluation_can_be_run_again():
    loader = EvalLoader(examples_of([3, 4, 5]), batch_size=2)
    assert [b.input_ids.tolist() for b in loader] == [b.input_ids.tolist() for b in loader]
    assert len(loader) == 2
