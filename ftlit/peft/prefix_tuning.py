"""Prefix tuning: trained keys and values before every example, in every layer.

Li and Liang 2021, arXiv:2101.00190; without the reparametrisation it is P-tuning v2, Liu et al. 2021, arXiv:2110.07602.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache
from typing_extensions import override

from ftlit.batch import PackedBatch, PrefixKV
from ftlit.peft.prompt_tuning import VirtualTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PrefixTuning(VirtualTokens):
    """Trains P keys and values a layer that every token of every example attends to.

    Args:
        num_virtual_tokens: Length of the prefix, P.
        init_std: Standard deviation of the first values. PEFT starts at 1, which disturbs the model far more.
    """

    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    pads_prompts: ClassVar[bool] = False  # the padding would lie between the prefix and the text

    def __init__(self, num_virtual_tokens: int = 20, init_std: float = 0.02) -> None:
        super().__init__(num_virtual_tokens)
        self.init_std = init_std

    @staticmethod
    def _heads(model: PreTrainedModel) -> tuple[int, int, int]:
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_hidden_layers, heads, width

    @override
    def apply(self, model: PreTrainedModel) -> None:
        layers, heads, width = self._heads(model)
        weight = model.get_input_embeddings().weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        values = torch.empty(self.num_virtual_tokens, layers * 2 * heads * width, dtype=dtype, device=weight.device)
        self._attach(model, values.normal_(std=self.init_std))

    def prefix_kv(self, model: PreTrainedModel) -> PrefixKV:
        """Keys and values a layer, each `[H_kv, P, head_dim]`; the matrix holds layer by layer K, then V, as PEFT's."""
        layers, heads, width = self._heads(model)
        both = self._matrix(model).view(self.num_virtual_tokens, layers * 2, heads, width).permute(1, 2, 0, 3)
        dtype = model.get_input_embeddings().weight.dtype
        return {layer: (both[2 * layer].to(dtype), both[2 * layer + 1].to(dtype)) for layer in range(layers)}

    def prepare(self, model: PreTrainedModel, batch: PackedBatch) -> PackedBatch:
        """Shifts positions by P, as if the prefix were tokens: what a filled key-value cache means too."""
        return batch.replace(position_ids=batch.position_ids + self.num_virtual_tokens) if self.active else batch

    @override
    def attention_kwargs(self, model: PreTrainedModel, batch: PackedBatch) -> dict[str, Any]:
        return {"prefix_kv": self.prefix_kv(model)} if self.active else {}

    @override
    def generation_kwargs(self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        if not self.active:
            return super().generation_kwargs(model, input_ids, attention_mask)
        cache = DynamicCache()
        for layer, (key, value) in self.prefix_kv(model).items():
            cache.update(key.expand(len(input_ids), -1, -1, -1), value.expand(len(input_ids), -1, -1, -1), layer)
        ones = attention_mask.new_ones(len(input_ids), self.num_virtual_tokens)
        # generate() takes the first tokens as already in the cache: as many fillers as the prefix is long.
        fillers = input_ids[:, :1].expand(-1, self.num_virtual_tokens)
        return {
            "input_ids": torch.cat([fillers, input_ids], dim=1),
            "attention_mask": torch.cat([ones, attention_mask], dim=1),
            "past_key_values": cache,
        }
