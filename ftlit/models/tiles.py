"""Causal attention over packed segments on a CPU, in tiles of a few queries.

A tile is a matrix product of some queries with the keys that they may see and little else, so work is linear in the
number of examples and no key after the last query of a tile is touched. Neighbours that fit into one tile share it,
whatever their lengths. torch's own kernel takes 1.4 times as long for examples of some hundred tokens and 1.8 times for
short ones, most of it in backward. The weights are computed again in backward: nothing but queries, keys and values is
kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftlit.batch import Segments

# Queries of a tile, at most: enough to keep a matrix product busy, few enough for the scores to stay in a cache.
TILE = 128


class _Tile(NamedTuple):
    """Some queries and what they see.

    Attributes:
        start: First query.
        stop: One after the last query.
        keys: Stretches of keys, one after another; neighbours are one.
        bias: Added to the scores with the last keys, 0 or minus infinity, `[queries, some]`; all see the other keys.
    """

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]
    bias: Tensor


def can_tile(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether these are for `tiled_attention`: half precision has no fast products of this shape on a CPU."""
    full = query.dtype in (torch.float32, torch.float64) and query.dtype == key.dtype == value.dtype
    return query.device.type == "cpu" and full and not torch.is_autocast_enabled("cpu")


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None = None,
    window: int | None = None,
    past: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention inside each segment, over its parents and over a prefix.

    Args:
        query: `[1, H, T, head_dim]`.
        key: `[1, H_kv, T, head_dim]`; heads are grouped when `H_kv < H`.
        value: `[1, H_kv, T, head_dim]`.
        segments: Where the examples lie in the row.
        scaling: Factor on the scores, `head_dim ** -0.5` when left out.
        window: A token sees the last `window` tokens of its own example, itself included.
        past: Keys and values of the prefix, each `[H_kv, P, head_dim]`.

    Returns:
        `[1, T, H, value_dim]`; values may have another width than keys.
    """
    prefix = 0
    keys, values = key[0], value[0]
    if past is not None:
        prefix = past[0].shape[1]
        keys, values = torch.cat([past[0], keys], dim=1), torch.cat([past[1], values], dim=1)
    place = (prefix, window, query.dtype)
    if place not in segments.plans:
        with query.device:  # a context of the caller's may say that new tensors lie elsewhere
            segments.plans[place] = _plan(segments, prefix, window, query.dtype)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Attention.apply(query[0], keys, values, segments.plans[place], scaling)[None]


def _plan(segments: Segments, prefix: int, window: int | None, dtype: torch.dtype) -> list[_Tile]:
    """Cuts all queries into tiles."""
    tiles: list[_Tile] = []
    index = 0
    while index < len(segments):
        length, offset = segments.lengths[index], segments.offsets[index]
        before = [(0, prefix)] if prefix else []
        for parent in segments.ancestors(index):
            begin = prefix + segments.offsets[parent]
            before.append((begin, begin + segments.lengths[parent]))
        earlier = sum(stop - start for start, stop in before)
        if length <= TILE and (window is None or window >= earlier + length):
            count = _neighbours(segments, index, earlier, window)
            tiles.append(_shared(segments, index, count, prefix, before, dtype))
            index += count
            continue
        step = -(-length // -(-length // TILE))
        tiles += [
            _one(offset, first, min(first + step, length), prefix, before, window, dtype)
            for first in range(0, length, step)
        ]
        index += 1
    return tiles


def _neighbours(segments: Segments, first: int, earlier: int, window: int | None) -> int:
    """How many segments from `first` on, all with the same parent, fit into one tile."""
    count, total = 1, segments.lengths[first]
    while first + count < len(segments) and segments.parents[first + count] == segments.parents[first]:
        length = segments.lengths[first + count]
        total += length
        if total > TILE or (window is not None and window < earlier + length):
            break
        count += 1
    return count


def _shared(
    segments: Segments, first: int, count: int, prefix: int, before: list[tuple[int, int]], dtype: torch.dtype
) -> _Tile:
    """The tile of some short neighbours: each sees itself and what all see before it."""
    lengths = torch.tensor(segments.lengths[first : first + count])
    owner = torch.repeat_interleave(torch.arange(count), lengths)
    allowed = (owner[:, None] == owner[None]).tril()
    start = segments.offsets[first]
    stop = start + len(owner)
    return _Tile(start, stop, _joined([*before, (prefix + start, prefix + stop)]), _bias(allowed, dtype))


def _one(
    offset: int,
    first: int,
    last: int,
    prefix: int,
    before: list[tuple[int, int]],
    window: int | None,
    dtype: torch.dtype,
) -> _Tile:
    """The tile of the tokens `first` to `last` of one segment that starts at `offset`."""
    earlier = sum(stop - start for start, stop in before)
    keys = [*before, (prefix + offset, prefix + offset + last)]
    if window is None or window >= earlier + last:
        allowed = torch.ones(last - first, last - first, dtype=torch.bool).tril()
    else:
        begin = max(-earlier, first - window + 1)  # the first key that any of them sees
        keys = _without(keys, earlier + begin)
        own = torch.arange(first, last)[:, None]
        seen = torch.arange(begin, last)[None]
        allowed = (seen <= own) & (seen > own - window)
    return _Tile(offset + first, offset + last, _joined(keys), _bias(allowed, dtype))


def _without(stretches: list[tuple[int, int]], number: int) -> list[tuple[int, int]]:
    """Stretches of keys without the first so many keys."""
    left = []
    for start, stop in stretches:
        gone = min(number, stop - start)
        number -= gone
        if start + gone < stop:
            left.append((start + gone, stop))
    return left


def _joined(stretches: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same keys in as few stretches as can be: one is read without a copy."""
    found: list[tuple[int, int]] = []
    for start, stop in stretches:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return tuple(found)


def _bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))


def _gather(states: Tensor, stretches: tuple[tuple[int, int], ...]) -> Tensor:
    """The states of some stretches, `[H_kv, M, head_dim]`; a view where there is one stretch."""
    if len(stretches) == 1:
        start, stop = stretches[0]
        return states[:, start:stop]
    return torch.cat([states[:, start:stop] for start, stop in stretches], dim=1)


def _scatter_add(grads: Tensor, grad: Tensor, stretches: tuple[tuple[int, int], ...]) -> None:
    """The reverse of `_gather`."""
    parts = grad.split([stop - start for start, stop in stretches], dim=1)
    for (start, stop), part in zip(stretches, parts, strict=True):
        grads[:, start:stop] += part


def _weights(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    """Attention weights, `[H_kv, G * n, M]`, of scaled queries `[H_kv, G * n, head_dim]`."""
    scores = torch.bmm(query, key.transpose(1, 2))
    rows, columns = bias.shape
    scores.unflatten(1, (-1, rows))[..., scores.shape[2] - columns :].add_(bias)
    return torch.softmax(scores, dim=-1)


class _Attention(torch.autograd.Function):
    """Heads that share keys lie one below the other in one matrix, so that keys are neither copied nor summed over."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: list[_Tile], scaling: float) -> Tensor:
        heads, tokens, _ = query.shape
        grouped = query.unflatten(0, (key.shape[0], -1))  # [H_kv, G, T, d]
        out = query.new_empty(tokens, heads, value.shape[2])
        for start, stop, stretches, bias in tiles:
            rows = (grouped[:, :, start:stop] * scaling).flatten(1, 2)
            weights = _weights(rows, _gather(key, stretches), bias)
            mixed = torch.bmm(weights, _gather(value, stretches)).view(heads, stop - start, -1)
            out[start:stop] = mixed.transpose(0, 1)
        ctx.save_for_backward(query, key, value)
        ctx.tiles, ctx.scaling = tiles, scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        heads, _, width = query.shape
        grouped = query.unflatten(0, (key.shape[0], -1))
        grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        grad_key, grad_value = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (key, value))
        for start, stop, stretches, bias in ctx.tiles:
            rows = (grouped[:, :, start:stop] * ctx.scaling).flatten(1, 2)
            keys, values = _gather(key, stretches), _gather(value, stretches)
            weights = _weights(rows, keys, bias)
            above = grad[start:stop].transpose(0, 1).reshape(*rows.shape[:2], -1)
            scores = torch._softmax_backward_data(torch.bmm(above, values.transpose(1, 2)), weights, -1, rows.dtype)
            part = torch.bmm(scores, keys).mul_(ctx.scaling)
            grad_query[:, start:stop] = part.view(heads, stop - start, width)
            if len(stretches) == 1:
                begin, end = stretches[0]
                grad_value[:, begin:end].baddbmm_(weights.transpose(1, 2), above)
                grad_key[:, begin:end].baddbmm_(scores.transpose(1, 2), rows)
            else:
                _scatter_add(grad_value, torch.bmm(weights.transpose(1, 2), above), stretches)
                _scatter_add(grad_key, torch.bmm(scores.transpose(1, 2), rows), stretches)
        return grad_query, grad_key, grad_value, None, None
