import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.batch import Example, pack
from ftlit.data.store import Examples, Joined, measure

PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)
WEIGHT = st.sampled_from([0.0, 0.0, 1.0, 0.5, 2.0])


@st.composite
def drawn(draw, longest=12):
    length = draw(st.integers(1, longest))
    ids = draw(st.lists(st.integers(0, 50_000), min_size=length, max_size=length))
    return Example(ids, [0.0, *draw(st.lists(WEIGHT, min_size=length - 1, max_size=length - 1))])


MANY = st.lists(drawn(), min_size=1, max_size=12)


def stored(examples, windowed=False):
    return Examples.of(examples, range(len(examples)), [windowed] * len(examples))


def lists(examples):
    return [(list(map(int, e.input_ids)), list(map(float, e.weights))) for e in examples]


@PROPERTY
@given(MANY, MANY)
def test_what_is_stored_comes_back_and_is_measured_as_lists_are(first, second):
    joined = Joined([stored(first), stored(second)])
    assert lists(joined) == lists(first + second) == lists(Examples.joined([stored(first), stored(second)]))
    for ours, theirs in zip(measure(joined), measure(first + second), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    assert lists(joined[1:3]) == lists((first + second)[1:3])
    assert joined.find(len(first)) == (1, 0)
    assert joined.find(-1) == (1, len(second) - 1)


def test_an_index_past_the_end_is_refused():
    with pytest.raises(IndexError):
        Joined([stored([Example([1], [0])])])[1]


@PROPERTY
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(2, 20))
def test_windows_train_every_token_of_a_document_but_the_first_once(lengths, most):
    documents = [Example([1000 * d + i for i in range(n)], [0.0] + [1.0] * (n - 1)) for d, n in enumerate(lengths)]
    cut, over = stored(documents, windowed=True).cut(most)
    assert not over.any()
    seen = []
    for example, row in zip(cut, cut.rows, strict=True):
        assert len(example.input_ids) <= most
        assert example.weights[0] == 0
        seen += [int(token) for token, weight in zip(example.input_ids, example.weights, strict=True) if weight]
        # What a token is predicted from is the text right before it.
        assert np.all(np.diff(example.input_ids) == 1)
        assert example.input_ids[0] // 1000 == row
    assert seen == [1000 * d + i for d, n in enumerate(lengths) for i in range(1, n)]
    assert cut.measures().targets.sum() == len(seen)


def test_an_example_that_loses_its_start_keeps_what_every_text_begins_with():
    long, short, other = ([first, *range(2, 2 + n)] for first, n in ((1, 8), (1, 3), (9, 8)))
    whole = stored([Example(ids, [0.0] + [1.0] * (len(ids) - 1)) for ids in (long, short, other)])
    cut, _ = whole.cut(5, "start", opening=[1])
    assert lists(cut) == [
        ([1, 6, 7, 8, 9], [0, 0, 1, 1, 1]),
        ([1, 2, 3, 4], [0, 1, 1, 1]),
        ([5, 6, 7, 8, 9], [0, 1, 1, 1, 1]),
    ]
    assert lists(whole)[0][0] == long  # the rows are as they were


@PROPERTY
@given(MANY, st.integers(2, 12), st.sampled_from(["end", "start", "drop"]))
def test_cutting_keeps_one_side_and_says_what_it_cut(examples, most, truncate):
    cut, over = stored(examples).cut(most, truncate)
    expected = []
    for example in examples:
        ids, weights = list(example.input_ids), list(example.weights)
        if len(ids) > most and truncate == "drop":
            continue
        if len(ids) > most and truncate == "start":
            ids, weights = ids[-most:], [0.0, *weights[-most:][1:]]
        expected.append((ids[:most], weights[:most]))
    assert lists(cut) == expected
    assert over.tolist() == [len(example.input_ids) > most for example in examples]
    measures = cut.measures()
    assert measures.targets.tolist() == [sum(1 for w in weights if w) for _, weights in expected]
    assert measures.weights.tolist() == [sum(weights) for _, weights in expected]


@PROPERTY
@given(MANY)
def test_packing_stored_examples_is_packing_lists(examples):
    ours, theirs = pack(list(stored(examples))), pack(examples)
    for name in ("input_ids", "position_ids", "target_positions", "target_ids", "target_weights", "target_segments"):
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist()


def test_a_token_takes_eight_bytes():
    examples = stored([Example(list(range(1000)), [0.0] + [1.0] * 999)] * 50)
    assert examples.ids.nbytes + examples.weights.nbytes == 8 * 50_000
    cut, _ = examples.cut(100)
    assert np.shares_memory(cut[0].input_ids, examples.ids)


@PROPERTY
@given(MANY)
def test_the_fingerprint_is_of_the_tokens_and_not_of_how_they_are_held(examples):
    whole = Joined([stored(examples)]).fingerprint()
    padded = [Example([*e.input_ids, 7, 7], [*e.weights, 0.0, 1.0]) for e in examples]
    views = stored(padded)
    views = Examples(views.ids, views.weights, views.starts, views.stops - 2, views.rows, views.windowed, views.values)
    assert Joined([views]).fingerprint() == whole
    changed = [Example([examples[0].input_ids[0] + 1, *examples[0].input_ids[1:]], examples[0].weights), *examples[1:]]
    assert Joined([stored(changed)]).fingerprint() != whole
    assert Joined([stored(examples[::-1])]).fingerprint() == whole or lists(examples[::-1]) != lists(examples)


def test_files_come_back_mapped(tmp_path):
    examples = stored([Example([1, 2, 3] * 100, [0.0, 1.0, 0.5] + [1.0] * 297), Example([4], [0.0])], windowed=True)
    examples.save(tmp_path / "x", refused={"3": "why"})
    loaded, more = Examples.load(tmp_path / "x")
    assert isinstance(loaded.ids, np.memmap)
    assert lists(loaded) == lists(examples)
    assert loaded.windowed.all()
    assert more == {"refused": {"3": "why"}}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("torn", ["ids.npy", "weights.npy", "starts.npy", "index.json"])
@pytest.mark.parametrize("how", ["short", "gone", "empty"])
def test_torn_files_are_noticed(tmp_path, torn, how):
    stored([Example([1, 2, 3], [0.0, 1.0, 1.0])]).save(tmp_path / "x", refused={})
    path = tmp_path / "x" / torn
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if how == "short" else b"")
    with pytest.raises(ValueError, match=r"."):
        Examples.load(tmp_path / "x")


def test_saving_again_replaces(tmp_path):
    for token in (1, 2):
        stored([Example([token, 9], [0.0, 1.0])]).save(tmp_path / "x")
    assert lists(Examples.load(tmp_path / "x")[0])[0][0] == [2, 9]
    assert json.loads((tmp_path / "x" / "index.json").read_text())["sizes"]


def test_no_examples_at_all():
    nothing = Examples.joined([])
    assert len(nothing) == 0
    cut, over = nothing.cut(5)
    assert len(cut) == len(over) == 0
    assert nothing.measures().targets.sum() == 0
