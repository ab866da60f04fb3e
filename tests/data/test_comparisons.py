"""What is left of comparisons: which pairs, cut how, and what is said of the others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.batch import Example, Pair, pack
from ftlit.data.comparisons import Comparisons, Crossed, Lost
from ftlit.data.store import Examples, Joined
from ftlit.errors import ConfigError


def made(*rows, rankings="all"):
    """Comparisons of `(prompt tokens, [answer tokens], grades, margin, weight)`."""
    pieces, numbers = [], []
    for row, (prompt, answers, *more) in enumerate(rows):
        grades, margin, weight = [*more, *((range(len(answers), 0, -1), 0.0, 1.0)[len(more) :])]
        pieces.append(Example(prompt, [0.0] * len(prompt), margin))
        pieces += [Example(a, [weight] * len(a), grade) for a, grade in zip(answers, grades, strict=True)]
        numbers += [row] * (1 + len(answers))
    return Comparisons(Examples.of(pieces, numbers, [False] * len(pieces)), rankings)


def test_an_example_is_the_prompt_and_its_answers():
    example = made(([1, 2], [[3], [4, 5]], (1.0, 0.0), 2.0, 0.5))[0]
    assert list(example.input_ids) == [1, 2, 3, 4, 5]
    assert list(example.weights) == [0, 0, 0.5, 0.5, 0.5]
    assert example.answers.lengths == (1, 2)
    assert example.answers.pairs == (Pair(0, 1, 0.5, 2.0),)


@pytest.mark.parametrize(
    ("rankings", "grades", "pairs"),
    [
        ("all", (3, 2, 1), [(0, 1), (0, 2), (1, 2)]),
        ("best", (3, 2, 1), [(0, 1), (0, 2)]),
        ("all", (3, 1, 1), [(0, 1), (0, 2)]),
        ("all", (3, 3, 1), [(0, 2), (1, 2)]),
        ("best", (3, 3, 1), [(0, 2)]),
    ],
)
def test_pairs_of_a_ranking(rankings, grades, pairs):
    comparisons = made(([1], [[2], [3], [4]], grades), rankings=rankings)
    assert [pair[:2] for pair in comparisons.pairs(0)] == pairs
    assert comparisons.measures().weights.tolist() == [len(pairs)]


def test_single_answers():
    comparisons = made(([1], [[2]], (1.0,)), ([1], [[2]], (0.0,)))
    assert [comparisons.pairs(i) for i in (0, 1)] == [(Pair(0, -1),), (Pair(-1, 0),)]
    assert comparisons.has_single
    assert comparisons.labelled() == (1, 1)
    assert made(([1], [[2], [3]])).labelled() == (0, 0)


def test_what_the_rows_have():
    plain = made(([1], [[2], [3]]))
    assert (plain.has_single, plain.has_margins, plain.has_weights) == (False, False, False)
    full = made(([1], [[2], [3]], (1, 0), 1.0, 2.0))
    assert (full.has_margins, full.has_weights) == (True, True)


def test_what_cannot_be_compared_is_counted():
    comparisons = made(
        ([1], [[2], []]),
        ([1], [[2, 3], [2, 3]]),
        ([1], [[2], [3]], (1.0, 1.0)),
        ([1], [[], [2], [3], [2]]),
        ([1], [[2], [3]]),
    )
    left, lost = comparisons.fit(100, "start")
    assert lost == Lost(empty=1, identical=2, answers_dropped=2)
    assert left.rows.tolist() == [3, 4]
    assert left[0].answers.lengths == (1, 1)


def one(prompt, *answers):
    """A comparison of different tokens, of some lengths."""
    return made((list(range(prompt)), [[100 * (n + 1) + i for i in range(length)] for n, length in enumerate(answers)]))


@pytest.mark.parametrize(
    ("truncate", "prompt", "answers", "left"),
    [
        ("start", 10, (4, 6), ([*range(6, 10)], (4, 6))),  # the longest answer leaves room for 4
        ("start", 10, (9, 2), ([8, 9], (8, 2))),  # a quarter of max_length is the prompt's
        ("start", 1, (11, 2), ([0], (9, 2))),  # and what it does not use is the answer's
        ("end", 8, (4, 1), ([*range(8)], (2, 1))),
    ],
)
def test_cutting(truncate, prompt, answers, left):
    fitted, lost = one(prompt, *answers).fit(10, truncate)
    example = fitted[0]
    own = len(example.input_ids) - sum(example.answers.lengths)
    assert (list(example.input_ids[:own]), example.answers.lengths) == left
    assert lost.prompts_cut == (own < prompt)
    assert lost.answers_cut == (example.answers.lengths != answers)


def test_a_prompt_that_loses_its_start_keeps_what_every_text_begins_with():
    whole = one(10, 4, 6)  # of which 4 tokens of the prompt stay
    fitted, _ = whole.fit(10, "start", opening=[0])
    assert [*fitted[0].input_ids[:4]] == [0, 7, 8, 9]
    assert [*whole[0].input_ids[:10]] == [*range(10)]  # the rows are as they were
    for opening, kept in (([5], [6, 7, 8, 9]), ([0, 1, 2, 3, 4], [6, 7, 8, 9]), ([0, 1], [0, 1, 8, 9])):
        assert [*one(10, 4, 6).fit(10, "start", opening)[0][0].input_ids[:4]] == kept
    assert [*one(4, 4, 6).fit(10, "start", [0])[0][0].input_ids[:4]] == [0, 1, 2, 3]


def test_cut_away_whole():
    assert one(12, 2, 3).fit(10, "end")[1] == Lost(cut_away=1)
    # What is left of the answers is alike.
    assert made(([1, 2], [[3, 4, 5, 6], [3, 4, 5, 7]])).fit(4, "end")[1] == Lost(cut_away=1)
    assert one(12, 2, 3).fit(10, "drop")[1] == Lost(long=1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.lists(st.integers(1, 12), min_size=2, max_size=4)), max_size=6),
    st.integers(2, 20),
    st.sampled_from(["start", "end", "drop"]),
)
def test_nothing_is_lost_silently(shapes, length, truncate):
    """Every row is kept or counted; what is kept fits, and its answers begin where they began."""
    parts = [one(prompt, *answers) for prompt, answers in shapes]
    for part, (prompt, answers) in zip(parts, shapes, strict=True):
        fitted, lost = part.fit(length, truncate)
        assert len(fitted) + lost.empty + lost.identical + lost.long + lost.cut_away == 1
        for example in fitted:
            own = len(example.input_ids) - sum(example.answers.lengths)
            assert own + max(example.answers.lengths) <= length
            ids = list(example.input_ids)
            begin = own
            for number, size in enumerate(example.answers.lengths):
                assert ids[begin : begin + size] == [100 * (number + 1) + i for i in range(size)]
                begin += size
            assert ids[:own] == list(range(prompt))[prompt - own :] or ids[:own] == list(range(own))
            if truncate == "start" and own < prompt:
                assert own >= length // 4 or own + max(answers) == length


def test_measures_count_the_prompt_once():
    comparisons = made(([1, 2, 3], [[4], [5, 6]]), ([1], [[2], [3], [4]], (3, 2, 1), 0.0, 0.5))
    lengths, targets, weights = Joined([comparisons]).measures()
    assert (lengths.tolist(), targets.tolist(), weights.tolist()) == ([6, 4], [3, 3], [1.0, 1.5])


def test_the_hash_sees_grades_weights_and_margins():
    rows = [
        ([1], [[2], [3]]),
        ([1], [[3], [2]]),
        ([1], [[2], [3]], (1, 0), 1.0),
        ([1], [[2], [3]], (1, 0), 0.0, 0.5),
        ([1, 2], [[2], [3]]),
    ]
    hashes = [Joined([made(row)]).fingerprint() for row in rows]
    assert len(set(hashes)) == len(rows)
    assert Joined([made(rows[0])]).fingerprint() == hashes[0]


def test_pieces_survive_the_cache(tmp_path):
    pieces = made(([1, 2], [[3], [4, 5]], (1.0, 0.0), 2.0, 0.5)).pieces
    pieces.save(tmp_path / "kept")
    again = Comparisons(Examples.load(tmp_path / "kept")[0])
    assert again[0].answers.pairs == (Pair(0, 1, 0.5, 2.0),)
    assert np.array_equal(again[0].input_ids, [1, 2, 3, 4, 5])


def test_prompts_are_crossed_with_answers_to_the_next_other_prompt():
    rows = made(
        ([1, 2, 3, 4], [[5, 6], [7]]), ([8], [[9, 10]], (1,)), ([8], [[11]], (0,)), ([12, 13], [[14, 15, 16]], (1,))
    )
    own = pack([rows[0], rows[1], rows[3], rows[0]], [0, 1, 3, -1])
    crossed = Crossed(rows, None, 5).of(own)
    assert crossed.input_ids.tolist() == [[1, 2, 3, 4, 9, 8, 14, 15, 16, 12, 13, 5, 6, 7, 1, 2, 3, 4, 9]]
    assert crossed.segments.lengths == (4, 1, 1, 3, 2, 2, 1, 4, 1)  # 5 less a prompt of 4 is 1
    assert crossed.segments.parents == (-1, 0, -1, 2, -1, 4, 4, -1, 7)
    assert crossed.examples == (0, 0, 1, 1, 3, 3, 3, -1, -1)
    assert crossed.target_weights.tolist() == [1] * 7 + [0]  # a filler counts nothing


def test_rows_of_one_prompt_are_crossed_with_others():
    rows = made(*(([prompt], [[9]], (1,)) for prompt in (1, 2, 1, 1)))
    assert Crossed(rows, None, 99)._next == [1, 2, 1, 1]
    one = made(([1], [[9]], (1,)))
    assert Crossed(one, rows, 99)._next == [1]
    with pytest.raises(ConfigError, match="at least two prompts"):
        Crossed(one, one, 99)
