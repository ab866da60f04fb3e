"""Attention over packed segments, plugged into transformers as the implementation named "ftlit".

With a `segments` argument no token sees another example, and cost is linear in the number of examples. Layers of
encoders, which say `is_causal=False` of themselves, see their whole example. Without segments
(`generate`, padded batches of others) the call takes transformers' own path, with the masks that transformers builds
for SDPA: the mask function is registered under our name too, because an implementation without one is given no mask at
all and would be silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ftlit.batch import PrefixKV, Segments
from ftlit.errors import ConfigError
from ftlit.models.tiles import can_tile, tiled_attention

NAME = "ftlit"

# Arguments that models pass along and that change nothing here.
_HARMLESS = {
    *("position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position", "return_dict"),
    "deterministic",
}


def packed_mask(device: torch.device | str) -> Tensor:
    """The `attention_mask` to call a backbone with when segments are given.

    transformers returns a four-dimensional mask unchanged instead of building the `T x T` mask that it would derive
    from the restarting positions; `segment_attention` then ignores it.
    """
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    segments: Segments | None = None,
    prefix_kv: PrefixKV | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention inside each segment (and over its parents' tokens and the prefix), causal unless the layer is not.

    Args:
        module: The attention layer; its `layer_idx` picks the prefix.
        query: `[1, H, T, head_dim]`, positions already applied.
        key: `[1, H_kv, T, head_dim]`; heads are grouped when `H_kv < H`.
        value: `[1, H_kv, T, head_dim]`.
        attention_mask: Used only without segments; with them it is `packed_mask`.
        scaling: Factor on the scores, `head_dim ** -0.5` when left out.
        dropout: Probability of dropping an attention weight.
        sliding_window: A token sees the last `sliding_window` tokens of its own example, itself included; where
            attention is not causal, tokens on both sides that are nearer than this.
        softcap: Scores become `softcap * tanh(score / softcap)` (Gemma 2).
        is_causal: Whether tokens see only what is before them; when left out, what the layer's own `is_causal` says.
        segments: Where the examples lie in the row; None takes transformers' own path.
        prefix_kv: Keys and values that every example sees before its first token.
        s_aux: A score for each head that every token compares its own with and that has no value, `[H]`: a sink
            (gpt-oss).
        kwargs: Anything else a model passes; what is not known to be harmless is refused.

    Returns:
        `[1, T, H, head_dim]` and None.

    Raises:
        ConfigError: If the model passes an argument that this attention does not implement.
        ValueError: If segments with parents meet a layer that is not causal: a parent would have to see its children.
    """
    if segments is None:
        more = attention_mask, scaling, dropout, softcap, is_causal, s_aux, kwargs
        return _unpacked(module, query, key, value, *more)
    strange = [name for name, given in kwargs.items() if given is not None and name not in _HARMLESS]
    if strange:
        raise ConfigError(
            f"{type(module).__name__} passes {', '.join(strange)} to its attention, which packed segments do not "
            "implement yet; this model cannot be trained with ftlit."
        )
    if attention_mask is not None and attention_mask.numel() > 1:
        raise ConfigError(
            f"{type(module).__name__} makes a mask of its own for its attention, which packed segments do not know; "
            "this model cannot be trained with ftlit."
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal and any(parent >= 0 for parent in segments.parents):
        raise ValueError("segments with parents need causal attention")
    past = None if prefix_kv is None else prefix_kv[module.layer_idx]  # type: ignore[index]
    if causal and softcap is None and s_aux is None and not dropout and can_tile(query, key, value):
        return tiled_attention(query, key, value, segments, scaling, sliding_window, past), None
    pieces = []
    for first, count in segments.runs():
        length, offset = segments.lengths[first], segments.offsets[first]
        # [H, count * length, d] -> [count, H, length, d]: equal neighbours share one call.
        q, k, v = (
            t[0].narrow(1, offset, count * length).unflatten(1, (count, length)).transpose(0, 1)
            for t in (query, key, value)
        )
        before_k, before_v = _before(segments, first, key, value, past)
        if before_k:
            k = torch.cat([*(b.expand(count, -1, -1, -1) for b in before_k), k], dim=2)
            v = torch.cat([*(b.expand(count, -1, -1, -1) for b in before_v), v], dim=2)
        mask = _mask(segments, length, k.shape[2] - length, sliding_window, query.device, causal)
        out = _attend(q, k, v, mask, scaling, dropout, softcap, causal, s_aux)
        pieces.append(out.transpose(1, 2).flatten(0, 1))  # [count * length, H, d]
    return torch.cat(pieces)[None], None


def _before(
    segments: Segments, index: int, key: Tensor, value: Tensor, past: tuple[Tensor, Tensor] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values that a segment sees before its own: the prefix, then its ancestors."""
    keys, values = [], []
    if past is not None:
        keys.append(past[0][None])
        values.append(past[1][None])
    for parent in segments.ancestors(index):
        offset, length = segments.offsets[parent], segments.lengths[parent]
        keys.append(key.narrow(2, offset, length))
        values.append(value.narrow(2, offset, length))
    return keys, values


def _mask(
    segments: Segments, queries: int, before: int, window: int | None, device: torch.device, causal: bool = True
) -> Tensor | None:
    """Boolean mask `[queries, before + queries]`, or None where plain (causal) attention says the same."""
    if window is not None and window >= before + queries:
        window = None
    if window is None and (before == 0 or not causal):
        return None
    key = (queries, before, window)
    if key not in segments.masks:
        own = torch.arange(before, before + queries, device=device)[:, None]
        seen = torch.arange(before + queries, device=device)[None]
        allowed = seen <= own if causal else torch.ones(queries, before + queries, dtype=torch.bool, device=device)
        if window is not None:
            allowed &= seen > own - window
            allowed &= seen < own + window
        segments.masks[key] = allowed
    return segments.masks[key]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    causal: bool = True,
    sinks: Tensor | None = None,
) -> Tensor:
    """One attention call, `[B, H, L, d]`; where there is no mask, causal or over everything."""
    groups = query.shape[1] // key.shape[1]
    if softcap is None and sinks is None:
        if (
            groups > 1 and mask is not None and query.is_cuda
        ):  # a mask with grouped heads falls back to slow maths there
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal and mask is None and query.shape[2] > 1,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal and mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(key.shape[2] - query.shape[2])
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:  # one more column, of which nothing is taken
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(value.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout) @ value


def _unpacked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    is_causal: bool | None,
    sinks: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """What transformers would do; SDPA has no soft-cap and no sinks: those are computed here with the same mask."""
    if softcap is None and sinks is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = _attend(query, key, value, attention_mask, scaling, dropout, softcap, causal, sinks)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, segment_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
