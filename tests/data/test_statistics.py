import numpy as np

from ftlit.data.statistics import Statistics, also_in, duplicates, table
from ftlit.data.store import Measures


def counts_of(lengths):
    counts = Statistics("train")
    lengths = np.array(lengths, np.int64)
    counts.measure(Measures(lengths, lengths // 2, lengths / 2))
    return counts


def test_the_histogram_counts_every_example():
    lines = counts_of([3, 4, 12, 13, 14, 15, 16, 17, 18, 95]).histogram()
    assert lines == [
        "lengths  3 to 95 tokens; median 14, 90% up to 18, 99% up to 95",
        "   0-9  2 " + "█" * 11,
        "  10-19 7 " + "█" * 40,
        *(f"  {low}-{low + 9} 0" for low in range(20, 90, 10)),
        "  90-95 1 ██████",
    ]


def test_the_histogram_of_one_length_is_a_line():
    assert counts_of([7, 7]).histogram() == ["lengths  7 to 7 tokens; median 7, 90% up to 7, 99% up to 7"]
    assert Statistics("train").histogram() == []


def test_notes_say_everything_that_happened():
    counts = counts_of([4, 6])
    counts.rows, counts.refused, counts.windowed_rows, counts.windows = 12, 3, 1, 4
    counts.truncated, counts.duplicates, counts.in_train = 2, 1, 5
    counts.drop("too odd", 2)
    counts.drop("never", 0)
    assert counts.dropped == 2
    assert counts.line() == (
        "train: 12 rows, 3 skipped (cannot be read), 1 of them cut into 4 windows, 2 dropped (too odd), 2 cut to "
        "max_length, 1 duplicate, 5 of them also in train (!); 10 tokens, 5 trained (50%), longest 6"
    )


def test_a_set_is_the_sum_of_its_sources():
    total = Statistics("train")
    for lengths in ([3, 5], [10]):
        one = counts_of(lengths)
        one.rows, one.truncated = len(lengths), 1
        one.drop("odd", 2)
        total.add(one)
    assert (total.rows, total.examples, total.tokens, total.targets, total.longest) == (3, 3, 18, 8, 10)
    assert (total.truncated, total.drops) == (2, {"odd": 4})
    assert sorted(total.lengths.tolist()) == [3, 5, 10]


def digests(*pairs):
    return np.array(pairs, np.uint64).reshape(-1, 2)


def test_duplicates_compare_the_whole_hash():
    assert duplicates(digests((1, 2), (1, 3), (2, 2), (1, 2), (1, 2))) == 2
    assert duplicates(digests()) == 0
    assert also_in(digests((1, 2), (1, 3), (1, 2)), digests((1, 2), (9, 9))) == 2


def test_tables_are_aligned_also_with_wide_letters():
    assert table(("", "rows"), [("中文.json", "1"), ("a", "1,000")]) == [
        "            rows",
        "中文.json      1",
        "a          1,000",
    ]
