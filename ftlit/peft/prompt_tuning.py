"""Prompt tuning: trained embeddings before every example (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from ftlit.batch import PackedBatch, Segments
from ftlit.errors import ConfigError
from ftlit.peft.base import Change, PEFTStrategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARAMETER = "prompt_embeddings"


class VirtualTokens(PEFTStrategy):
    """What prompt tuning and prefix tuning share: one trained matrix at the root of a frozen model.

    Args:
        num_virtual_tokens: Rows of the matrix, P.

    Raises:
        ConfigError: If there is not at least one virtual token.
    """

    mergeable: ClassVar[bool] = False

    def __init__(self, num_virtual_tokens: int) -> None:
        if num_virtual_tokens < 1:
            raise ConfigError(
                f"{type(self).__name__} needs num_virtual_tokens of at least 1, got {num_virtual_tokens}."
            )
        self.num_virtual_tokens = num_virtual_tokens

    def _attach(self, model: PreTrainedModel, values: Tensor) -> None:
        model.requires_grad_(False)
        model.register_parameter(PARAMETER, nn.Parameter(values))

    @staticmethod
    def _matrix(model: PreTrainedModel) -> Tensor:
        return model.get_parameter(PARAMETER)

    @override
    def changes(self, model: PreTrainedModel) -> Iterator[Change]:
        return iter(())

    @override
    @contextmanager
    def start(self, model: PreTrainedModel) -> Iterator[None]:
        was, self.active = self.active, False
        try:
            yield
        finally:
            self.active = was

    @override
    def not_between(self, model: PreTrainedModel) -> str | None:
        return (
            f"{type(self).__name__} changes no weight: its start is the model without virtual tokens, and nothing lies "
            "between with and without."
        )

    @override
    def peft_config(self, model: PreTrainedModel) -> dict[str, Any]:
        config = model.config.get_text_config()
        return {
            "peft_type": self.peft_type,
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_transformer_submodules": 1,
            "num_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "token_dim": config.hidden_size,
        }

    @override
    @classmethod
    def from_peft(cls, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> PEFTStrategy:
        if set(state) != {PARAMETER}:
            raise ConfigError(f"a {cls.peft_type} adapter holds one tensor {PARAMETER!r}, got {sorted(state)}.")
        return cls(num_virtual_tokens=state[PARAMETER].shape[0])


class PromptTuning(VirtualTokens):
    """Trains P embeddings that every example sees before its first token.

    They start as embeddings of randomly chosen tokens of the vocabulary, which the paper found better than noise.

    Args:
        num_virtual_tokens: Trained embeddings, P.
    """

    peft_type: ClassVar[str | None] = "PROMPT_TUNING"

    def __init__(self, num_virtual_tokens: int = 20) -> None:
        super().__init__(num_virtual_tokens)

    @override
    def apply(self, model: PreTrainedModel) -> None:
        _check_embeddings(model)
        embed = model.get_input_embeddings()
        chosen = torch.randint(embed.weight.shape[0], (self.num_virtual_tokens,), device="cpu")  # the same on any GPU
        with torch.no_grad():
            values = embed(chosen.to(embed.weight.device))
        self._attach(model, values.to(torch.promote_types(values.dtype, torch.float32)).clone())

    def prepare(self, model: PreTrainedModel, batch: PackedBatch) -> PackedBatch:
        """Puts the P embeddings before each segment that has no parent and moves positions and targets along."""
        if not self.active:
            return batch
        virtual, segments = self.num_virtual_tokens, batch.segments
        device = batch.input_ids.device
        embeds = model.get_input_embeddings()(batch.input_ids)[0]
        prompt = self._matrix(model).to(embeds.dtype)
        own = torch.arange(virtual, device=device)
        rows, positions, shifts, lengths = [], [], [], []
        shift = 0
        for offset, length, parent in zip(segments.offsets, segments.lengths, segments.parents, strict=True):
            if parent < 0:
                rows.append(own)
                positions.append(own)
                shift += virtual
            rows.append(torch.arange(virtual + offset, virtual + offset + length, device=device))
            positions.append(batch.position_ids[0, offset : offset + length] + virtual)
            shifts.append(shift)
            lengths.append(length + (virtual if parent < 0 else 0))
        # index_select, not fancy indexing: the prompt's rows repeat, and on a CPU only its backward is repeatable. (On
        # a GPU it adds in any order, so that runs agree up to rounding.)
        inputs = torch.cat([prompt, embeds]).index_select(0, torch.cat(rows))
        # A target moves with the segment that holds its state: a branch's first token is predicted from its parent.
        moved = torch.tensor(shifts, device=device).repeat_interleave(torch.tensor(segments.lengths, device=device))
        return batch.replace(
            inputs_embeds=inputs[None],
            position_ids=torch.cat(positions)[None],
            segments=Segments(lengths, segments.parents),
            target_positions=batch.target_positions + moved[batch.target_positions],
        )

    @override
    def generation_kwargs(self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        if not self.active:
            return super().generation_kwargs(model, input_ids, attention_mask)
        embeds = model.get_input_embeddings()(input_ids)
        prompt = self._matrix(model).to(embeds.dtype)
        # Between padding and text, not before the padding: a sliding window counts every place of the row.
        padding = (attention_mask == 0).sum(1).tolist()
        rows = [torch.cat([row[:pad], prompt, row[pad:]]) for row, pad in zip(embeds, padding, strict=True)]
        ones = attention_mask.new_ones(len(input_ids), self.num_virtual_tokens)
        return {"inputs_embeds": torch.stack(rows), "attention_mask": torch.cat([attention_mask, ones], dim=1)}


@torch.no_grad()
def _check_embeddings(model: PreTrainedModel) -> None:
    """Tokens must say the same when they are given as embeddings: some models look at the tokens a second time.

    Raises:
        ConfigError: If they do not, as in Gemma 3n, whose layers have embeddings of their own.
    """
    embed = model.get_input_embeddings()
    ids = torch.arange(2, device=embed.weight.device)[None]
    was, _ = model.training, model.eval()
    try:
        by_token = model.base_model(input_ids=ids).last_hidden_state
        by_embedding = model.base_model(inputs_embeds=embed(ids)).last_hidden_state
        same = bool((by_token - by_embedding).abs().max() <= 1e-4 * by_token.abs().max())
    except (IndexError, TypeError, ValueError, RuntimeError):
        same = False
    finally:
        model.train(was)
    if not same:
        raise ConfigError(
            f"{type(model).__name__} cannot be trained with PromptTuning: its layers look at the tokens "
            "themselves, and not only at their embeddings; use LoRA."
        )
