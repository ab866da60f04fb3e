from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.batch import Example, PackedBatch, Segments, StepBatch, StepTotals, pack

A = Example([10, 11, 12], [0, 0, 1])
B = Example([20, 21, 22, 23], [0, 0.5, 0, 2])


def test_examples_lie_end_to_end_and_positions_restart():
    batch = pack([A, B])
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 22, 23]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch.segments.lengths == (3, 4)
    assert batch.segments.offsets == (0, 3)
    assert batch.segments.parents == (-1, -1)
    assert batch.num_tokens == 7
    assert batch.inputs_embeds is None


def test_targets_point_at_the_token_before():
    batch = pack([A, B])
    assert batch.target_positions.tolist() == [1, 3, 5]
    assert batch.target_ids.tolist() == [12, 21, 23]
    assert batch.target_weights.tolist() == [1.0, 0.5, 2.0]
    assert batch.target_segments.tolist() == [0, 1, 1]


def test_types_are_int64_and_float32_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        batch = pack([A])
    finally:
        torch.set_default_dtype(torch.float32)
    assert batch.target_weights.dtype == torch.float32
    for name in ("input_ids", "position_ids", "target_positions", "target_ids", "target_segments"):
        assert getattr(batch, name).dtype == torch.int64, name


def test_filler_keeps_its_targets_and_weighs_nothing():
    batch = pack([A, B, A], [7, -1, 4])
    assert batch.examples == (7, -1, 4)
    assert batch.target_ids.tolist() == [12, 21, 23, 12]
    assert batch.target_weights.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert batch.target_segments.tolist() == [0, 1, 1, 2]


def test_examples_are_numbered_from_zero_when_not_said():
    assert pack([A, B]).examples == (0, 1)
    with pytest.raises(ValueError, match="each example needs an index"):
        pack([A, B], [0])


def test_example_without_targets_gives_empty_typed_tensors():
    batch = pack([Example([1, 2], [0, 0])])
    assert batch.target_positions.shape == batch.target_weights.shape == (0,)
    assert batch.target_ids.dtype == torch.int64


def test_num_targets_counts_weights_that_are_not_zero():
    assert (A.num_targets, B.num_targets, Example([1], [0]).num_targets) == (1, 2, 0)


WEIGHTS = st.sampled_from([0, 0, 1, 1.0, 0.5, 0.25, 2])


@st.composite
def example_of(draw, longest=9):
    ids = draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=longest))
    weights = [0, *draw(st.lists(WEIGHTS, min_size=len(ids) - 1, max_size=len(ids) - 1))]
    return Example(ids, weights)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(example_of(), st.integers(-1, 50)), min_size=1, max_size=6))
def test_packed_examples_can_be_read_back(drawn):
    examples, indices = [example for example, _ in drawn], [index for _, index in drawn]
    batch = pack(examples, indices)
    assert batch.examples == tuple(indices)
    ids, places = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
    assert len(ids) == len(places) == batch.num_tokens
    assert batch.target_segments.tolist() == sorted(batch.target_segments.tolist())
    for segment, (example, index) in enumerate(drawn):
        start = batch.segments.offsets[segment]
        end = start + batch.segments.lengths[segment]
        assert ids[start:end] == example.input_ids
        assert places[start:end] == list(range(end - start))
        mine = batch.target_segments == segment
        back = [0.0] * (end - start)
        for position, token, weight in zip(
            batch.target_positions[mine].tolist(),
            batch.target_ids[mine].tolist(),
            batch.target_weights[mine].tolist(),
            strict=True,
        ):
            assert start <= position < end - 1
            assert ids[position + 1] == token
            back[position + 1 - start] = weight
        assert back == ([float(w) for w in example.weights] if index >= 0 else [0.0] * (end - start))
        assert int(mine.sum()) == example.num_targets


def test_runs_join_neighbours_of_one_length_without_parents():
    assert list(Segments([3, 3, 2, 3]).runs()) == [(0, 2), (2, 1), (3, 1)]
    assert list(Segments([3, 3, 3], [-1, 0, 0]).runs()) == [(0, 1), (1, 1), (2, 1)]
    assert list(Segments([3, 3, 3, 3], [-1, 0, -1, -1]).runs()) == [(0, 1), (1, 1), (2, 2)]
    assert list(Segments([]).runs()) == []


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 3), max_size=8), st.data())
def test_runs_cover_every_segment_once_and_are_as_long_as_can_be(lengths, data):
    parents = [data.draw(st.integers(-1, max(-1, min(i - 1, 1)))) for i in range(len(lengths))]
    segments = Segments(lengths, parents)
    runs = list(segments.runs())
    assert [i for first, count in runs for i in range(first, first + count)] == list(range(len(lengths)))
    for first, count in runs:
        assert len({lengths[i] for i in range(first, first + count)}) == 1
        assert count == 1 or all(parents[i] < 0 for i in range(first, first + count))
    for (first, _), (second, _) in pairwise(runs):
        joined = parents[first] < 0 and parents[second] < 0 and lengths[first] == lengths[second]
        assert not joined


def test_ancestors_come_root_first():
    segments = Segments([4, 3, 2, 1, 5], [-1, 0, 1, 0, -1])
    assert [segments.ancestors(i) for i in range(5)] == [[], [0], [0, 1], [0], []]
    assert segments.offsets == (0, 4, 7, 9, 10)
    assert len(segments) == 5
    assert repr(segments) == "Segments(lengths=(4, 3, 2, 1, 5), parents=(-1, 0, 1, 0, -1))"


@pytest.mark.parametrize("lengths", [[0], [3, -1], [2, 0, 2]])
def test_segment_without_tokens_is_refused(lengths):
    with pytest.raises(ValueError, match="a segment needs at least one token, got lengths"):
        Segments(lengths)


@pytest.mark.parametrize(("lengths", "parents"), [([2], [0]), ([2, 2], [1, -1]), ([2, 2], [-1]), ([2], [-1, 0])])
def test_parent_that_does_not_come_before_its_child_is_refused(lengths, parents):
    with pytest.raises(ValueError, match="each parent must be an earlier segment or -1, got"):
        Segments(lengths, parents)


def as_dict(batch):
    fields = {}
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            value = (value.dtype, value.tolist())
        elif isinstance(value, Segments):
            value = (value.lengths, value.parents)
        fields[name] = value
    return fields


def test_to_keeps_every_field_and_drops_masks_of_the_other_device():
    batch = pack([A, B], [5, -1]).replace(segments=Segments([3, 4], [-1, 0]), inputs_embeds=torch.ones(1, 7, 2))
    batch.segments.masks[1, 2, None] = torch.zeros(1)
    moved = batch.to("cpu")
    assert as_dict(moved) == as_dict(batch)
    assert moved.segments.masks == {}
    meta = batch.to("meta")
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert getattr(meta, name).device.type == "meta", name
            assert getattr(meta, name).shape == value.shape, name
    assert meta.examples == (5, -1)
    assert batch.input_ids.device.type == "cpu"


def test_replace_changes_only_what_is_said():
    batch = pack([A, B])
    other = batch.replace(examples=(3, 4))
    assert isinstance(other, PackedBatch)
    assert other.examples == (3, 4)
    assert batch.examples == (0, 1)
    assert other.input_ids is batch.input_ids


def test_step_batch_moves_its_micro_batches_and_keeps_totals():
    totals = StepTotals(weight=3.5, targets=3, tokens=7, examples=2)
    step = StepBatch((pack([A]), pack([B])), totals)
    moved = step.to("meta")
    assert [batch.input_ids.device.type for batch in moved.micro_batches] == ["meta", "meta"]
    assert [batch.num_tokens for batch in moved.micro_batches] == [3, 4]
    assert moved.totals is totals
