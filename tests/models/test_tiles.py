"""The tiles against attention written out over the whole row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlit.batch import Segments
from ftlit.models.tiles import TILE, _plan, tiled_attention


def dense(query, key, value, segments, scaling, window, past):
    """Every token against every other, with what may be seen written down by definition."""
    prefix = 0 if past is None else past[0].shape[1]
    owner = [i for i, length in enumerate(segments.lengths) for _ in range(length)]
    depth = []
    for i, length in enumerate(segments.lengths):
        start = prefix + sum(segments.lengths[a] for a in segments.ancestors(i))
        depth += range(start, start + length)
    keys, values = key[0], value[0]
    if past is not None:
        keys, values = torch.cat([past[0], keys], 1), torch.cat([past[1], values], 1)
    tokens = len(owner)
    allowed = torch.zeros(tokens, prefix + tokens, dtype=torch.bool)
    for t in range(tokens):
        line = {owner[t], *segments.ancestors(owner[t])}
        for u in range(-prefix, tokens):
            seen = u < 0 or (owner[u] in line and (owner[u] != owner[t] or u <= t))
            at = prefix + u if u < 0 else depth[u]
            allowed[t, prefix + u] = seen and (window is None or depth[t] - at < window)
    groups = query.shape[1] // key.shape[1]
    keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
    scores = (query[0] @ keys.transpose(1, 2) * scaling).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ values).transpose(0, 1)[None]


@st.composite
def rows(draw):
    lengths = draw(st.lists(st.integers(1, 40) | st.integers(TILE - 2, 3 * TILE), min_size=1, max_size=4))
    parents = [draw(st.integers(-1, i - 1)) if draw(st.booleans()) else -1 for i in range(len(lengths))]
    return Segments(lengths, parents)


@given(
    segments=rows(),
    heads=st.sampled_from([(4, 2), (3, 1), (2, 2)]),
    window=st.sampled_from([None, 5, 70]),
    prefix=st.sampled_from([0, 3]),
)
@settings(max_examples=40, deadline=None)
def test_output_and_gradients_are_those_of_dense_attention(segments, heads, window, prefix):
    generator = torch.Generator().manual_seed(sum(segments.lengths))

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    tokens = sum(segments.lengths)
    query = numbers(1, heads[0], tokens, 6)
    key, value = numbers(1, heads[1], tokens, 6), numbers(1, heads[1], tokens, 6)
    past = (numbers(heads[1], prefix, 6), numbers(heads[1], prefix, 6)) if prefix else None
    ours = tiled_attention(query, key, value, segments, 0.7, window, past)
    theirs = dense(query, key, value, segments, 0.7, window, past)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    inputs, above = [query, key, value, *(past or ())], numbers(*ours.shape).detach()
    for a, b in zip(torch.autograd.grad(ours, inputs, above), torch.autograd.grad(theirs, inputs, above), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_gradcheck():
    segments = Segments([3, 5, 2], [-1, 0, 0])
    inputs = [torch.randn(1, heads, 10, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    assert torch.autograd.gradcheck(lambda q, k, v: tiled_attention(q, k, v, segments), inputs)


@pytest.mark.parametrize("lengths", [[32] * 64, [128] * 16, [500, 20, 1300, 228]])
def test_work_is_linear_in_short_examples_and_never_past_the_diagonal(lengths):
    """Scores computed, against those needed: no more than a tile's width too many for each query."""
    tiles = _plan(Segments(lengths), 0, None, torch.float32)
    computed = sum((tile.stop - tile.start) * sum(b - a for a, b in tile.keys) for tile in tiles)
    needed = sum(n * (n + 1) // 2 for n in lengths)
    assert computed <= needed + sum(lengths) * TILE
    assert sum(tile.stop - tile.start for tile in tiles) == sum(lengths)
    assert len(tiles) <= sum(-(-n // TILE) for n in lengths)


def test_short_neighbours_share_a_tile():
    short = TILE // 6
    assert len(_plan(Segments([short] * 12), 0, None, torch.float32)) == 2
    assert len(_plan(Segments([20] + [short] * 6, [-1] + [0] * 6), 0, None, torch.float32)) == 2


def test_keys_that_lie_side_by_side_are_read_without_a_copy():
    """The first answer follows its prompt; the second does not, and a prefix lies before all."""
    segments = Segments([20, TILE + 10, TILE + 10], [-1, 0, 0])
    assert [len(tile.keys) for tile in _plan(segments, 0, None, torch.float32)] == [1, 1, 1, 2, 2]
    assert [len(tile.keys) for tile in _plan(segments, 3, None, torch.float32)] == [1, 1, 1, 2, 2]


def test_a_window_reaches_no_further_back_because_there_is_a_parent():
    window = 40
    segments = Segments([20, 30, 300], [-1, 0, 1])
    for prefix in (0, 3):
        for tile in _plan(segments, prefix, window, torch.float32)[2:]:
            seen = sum(stop - start for start, stop in tile.keys)
            assert seen <= tile.stop - tile.start + window - 1
            assert tile.bias.shape == (tile.stop - tile.start, seen)
