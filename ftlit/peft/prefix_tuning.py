"""Prefix tuning: trained keys and values before every example, in every layer.

Li and Liang 2021, arXiv:2101.00190; without the reparametrisation it is P-tuning v2, Liu et al. 2021, arXiv:2110.07602.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typing_extensions import override

from ftlit.batch import PackedBatch, PrefixKV
from ftlit.errors import ConfigError
from ftlit.peft.prompt_tuning import VirtualTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PrefixTuning(VirtualTokens):
    """Trains P keys and values a layer that every token of every example attends to.

    Args:
        num_virtual_tokens: Length of the prefix, P.
        init_std: Standard deviation of the first values. PEFT starts at 1, which disturbs the model far more.

    Raises:
        ConfigError: When applied to a model whose layers have keys and values of several sizes, or share them.
    """

    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    pads_prompts: ClassVar[bool] = False  # the padding would lie between the prefix and the text

    def __init__(self, num_virtual_tokens: int = 20, init_std: float = 0.02) -> None:
        super().__init__(num_virtual_tokens)
        self.init_std = init_std
        self._sizes = (0, 0, 0)  # layers, heads and their width, of the model that it was applied to

    @override
    def apply(self, model: PreTrainedModel) -> None:
        self._sizes = layers, heads, width = _heads(model)
        weight = model.get_input_embeddings().weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        values = torch.empty(self.num_virtual_tokens, layers * 2 * heads * width, dtype=dtype, device=weight.device)
        self._attach(model, values.normal_(std=self.init_std))

    def prefix_kv(self, model: PreTrainedModel) -> PrefixKV:
        """Keys and values a layer, each `[H_kv, P, head_dim]`; the matrix holds layer by layer K, then V, as PEFT's."""
        layers, heads, width = self._sizes
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


@torch.no_grad()
def _heads(model: PreTrainedModel) -> tuple[int, int, int]:
    """How many layers have keys and values, how many heads these have, and their width: seen in a run of two tokens.

    What a config says of it has a meaning of its own in many models.

    Raises:
        ConfigError: If one matrix of PEFT's layout cannot hold them.
    """
    layers = model.config.get_text_config().num_hidden_layers
    attended, cached = _keys_and_values(model)
    sizes = {tuple(shape[1::2]) for pair in attended.values() for shape in pair}
    own = not cached or cached == attended
    if sorted(attended) != list(range(layers)) or len(sizes) != 1 or not own:
        raise ConfigError(
            f"{type(model).__name__} cannot be trained with PrefixTuning: its {layers} layers do not each have keys "
            "and values of one size of their own; use PromptTuning or LoRA."
        )
    heads, width = sizes.pop()
    return layers, heads, width


Shapes = dict[int, tuple[tuple[int, ...], tuple[int, ...]]]


def _keys_and_values(model: PreTrainedModel) -> tuple[Shapes, Shapes]:
    """Shapes of keys and values by layer: those that attention is given, and those that a cache keeps."""
    name = model.config.get_text_config()._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get(name, sdpa_attention_forward)
    attended: Shapes = {}

    def watch(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        attended[module.layer_idx] = tuple(key.shape), tuple(value.shape)
        return attend(module, query, key, value, *args, **kwargs)

    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    was, _ = model.training, model.eval()
    ALL_ATTENTION_FUNCTIONS[name] = watch
    try:
        cache = getattr(model.base_model(input_ids=ids), "past_key_values", None)
    except AttributeError as error:
        raise ConfigError(f"{type(model).__name__} cannot be trained with PrefixTuning: {error}") from None
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]  # what was registered under the name is there again
        model.train(was)
    kept: Any = {number: layer for number, layer in enumerate(getattr(cache, "layers", [])) if layer.keys is not None}
    return attended, {number: (tuple(layer.keys.shape), tuple(layer.values.shape)) for number, layer in kept.items()}
